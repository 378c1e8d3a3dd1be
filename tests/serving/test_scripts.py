"""eval/serve.py and eval/check_server.py: what they refuse, what they say, and that a robot needs little."""

import subprocess
import sys

import pytest
from support.general import REPOSITORY, load_script
from support.random_policies import build_policy
from support.serving import served

from vla0_trl.config import VLAConfig
from vla0_trl.serving.codec import pack, unpack
from vla0_trl.serving.layouts import Layout
from vla0_trl.serving.requests import RequestReader

SERVE, CHECK = load_script("eval/serve.py"), load_script("eval/check_server.py")


def arguments(**changes):
    return SERVE.Arguments(**{"model_name_or_path": "runs/pusht"} | changes)


@pytest.mark.parametrize("text", ["", "short", "two words-of-a-key-file", "a" * 20 + "\n" + "b" * 20])
def test_a_key_file_holds_one_long_word(text, tmp_path):
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(ValueError, match="must hold one key of at least 16 characters"):
        SERVE.read_key(path)
    path.write_text("0123456789abcdef\n")
    assert SERVE.read_key(path) == "0123456789abcdef"


def test_a_certificate_needs_its_key(tmp_path):
    assert SERVE.tls_context(arguments()) is None
    with pytest.raises(ValueError, match="--tls_cert and --tls_key belong together"):
        SERVE.tls_context(arguments(tls_cert=tmp_path / "cert"))


@pytest.mark.parametrize(
    "words, error",
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines move this robot"),
        (["--layout", "ur5"], "--layout ur5 is no file, and none of plain, libero"),
        (["--api_key_file", "absent"], "absent"),
        (["--max_batch", "0"], "--max_batch 0 must be at least 1"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(words, error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--model_name_or_path", "absent", *words])
    with pytest.raises(SystemExit) as caught:
        SERVE.main()
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and error in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    "p95_ms, executed, fits, words",
    [
        (90, 5, True, "p95 in control steps at 10 Hz: 1; asked 2 ahead, of a chunk of 8 remain 5"),
        (300, 8, True, "p95 in control steps at 10 Hz: 3; asked 4 ahead, of a chunk of 8 remain 4"),
        (
            310,
            8,
            False,
            "of a chunk of 8 remain 3; a robot that prefetches stops for up to 2 steps",
        ),
        (90, 1, False, "remain 1; a robot that prefetches stops for up to 1 steps"),
        (2000, 8, False, "remain 0; a robot that prefetches stops for up to 21 steps"),
    ],
)
def test_the_verdict_counts_steps(p95_ms, executed, fits, words):
    found, line = CHECK.verdict({"fps": 10, "chunk_size": 8, "n_action_steps": executed}, p95_ms)
    assert found == fits and words in line


def test_a_server_is_measured(monkeypatch, capsys):
    with served(build_policy("nano")) as server:
        words = [f"ws://127.0.0.1:{server.port}", "--num_clients", "1", "3", "--requests", "4", "--image_side", "48"]
        monkeypatch.setattr(sys, "argv", ["check_server.py", *words])
        with pytest.raises(SystemExit):
            CHECK.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["robots 1", "robots 3"] * 2
    assert lines[0].endswith("of 4 replies") and lines[1].endswith("of 12 replies")


@pytest.mark.parametrize("keys, state_dim", [(["observation/state"], 0), ([], 2)])
def test_a_server_that_reads_no_state_is_sent_none(keys, state_dim):
    config = build_policy("nano").config.replace(use_state=False, state_dim=state_dim, state_stats=None)
    reader = RequestReader(Layout("observation/{camera}", keys), config)
    message = CHECK.message_for(reader.describe() | {"state_dim": state_dim}, 48)
    assert message.keys() == {"observation/image", "prompt"}
    assert reader.read(unpack(pack(message))).observation["state"] is None


def test_a_robots_computer_needs_no_torch():
    code = (
        "import sys; import vla0_trl.serving.client;"
        "assert not {'torch', 'transformers', 'trl', 'PIL', 'yaml', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=60)


def test_a_server_decodes_and_executes_as_an_evaluation_does():
    config = VLAConfig(chunk_size=8, n_action_steps=5)
    assert arguments(ensemble_size=4, ensemble_weights="vla0_v2").execution_of(config).ensemble_weights == "vla0_v2"
    assert (
        arguments(n_action_steps=3).execution_of(config.replace(n_action_steps=None, ensemble_size=4)).n_action_steps
        == 3
    )
    assert arguments(decoding="parallel", refine=2).decoding_options(config).refine == 2
