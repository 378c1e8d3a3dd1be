"""Records that commands of ours wrote, altered: one line for each mistake, or the rest is kept, which is said."""

import json
from pathlib import Path

import pytest
import yaml
from support.episodes import small_result
from support.general import load_script, short_words

from vla0_trl.benchmarks.ablation import Ablation
from vla0_trl.evaluation.episode_log import EpisodeLog, read_episodes
from vla0_trl.evaluation.metrics import aggregate
from vla0_trl.evaluation.report.page import write_report
from vla0_trl.evaluation.report.summary import load_runs
from vla0_trl.manifest import damage, trained_on
from vla0_trl.run_files import read_energy, read_state

RUN = {"checkpoint": "run", "checkpoint_hash": "abcdef0123456789", "protocol": {"success_coverage": 0.95}}
ROWS = [
    {"task": "Push", "seed": seed, "success": seed == 1, "steps": 20, "seconds": 1.0, "model_seconds": 0.5}
    | {"model_calls": 4, "max_coverage": 0.5, **RUN}
    for seed in range(3)
]
ERRORS = {"rmse": 1.0, "first_rmse": 1.0}
FILES = {
    "eval/results.json": RUN | aggregate(ROWS) | {"seeds": {"": [0, 2]}, "command": "python eval.py"},
    "eval/offline.json": RUN
    | {"dataset": "d", "episodes": "0:1", "num_frames": 3, "token_accuracy": 0.5, "baselines": {"mean": ERRORS}}
    | ERRORS,
    "run/trainer_state.json": {
        "global_step": 2,
        "max_steps": 2,
        "epoch": 1.0,
        "log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}],
    },
    "run/energy.json": {"kwh": 0.5, "seconds": 60.0, "samples": 16},
    "run/run.json": {"global_batch": 8},
    "run/checkpoint.json": {"files": {}, "trained_on": {"dataset": "d", "episodes": [0], "seeds": [0]}},
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An evaluation, and the training of its checkpoint."""
    for name, record in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(record))
    (tmp_path / "eval/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_whole_ones_are_read(folder, capsys):
    (run,) = load_runs([folder / "eval"])
    assert (len(run.episodes), run.energy["kwh"], run.log_history[1]["loss"]) == (3, 0.5, 1.0)
    assert capsys.readouterr().err == ""
    assert trained_on(folder / "run") == FILES["run/checkpoint.json"]["trained_on"]


REFUSED = [
    ("results", {"success_rate": "x"}, "success_rate is 'x', wanted a number from 0 to 1"),
    ("results", {"success_rate": None}, "success_rate is null"),
    ("results", {"success_rate_interval": [0, 2]}, "success_rate_interval is [0, 2], wanted a list of 2 values"),
    ("results", {"num_episodes": -1}, "num_episodes is -1, wanted a whole number"),
    ("results", {"num_episodes": 10**400}, "num_episodes is 1000"),
    ("results", {"mean_steps": float("nan")}, "mean_steps is nan, wanted a number"),
    ("results", {"protocol": []}, "protocol is [], wanted an object with fields"),
    ("results", {"protocol": {}}, "results.json: protocol: success_coverage is absent"),
    ("results", {"seeds": {"": [0]}}, "seeds is {'': [0]}, wanted an object whose values are a list of 2 values"),
    ("results", {"versions": "2"}, "versions is '2', wanted an object with fields"),
    ("results", {"command": ["python"]}, "command is ['python'], wanted text"),
    ("results", {"checkpoint": 3}, "checkpoint is 3, wanted text"),
    ("offline", {"token_accuracy": 2}, "token_accuracy is 2, wanted a number from 0 to 1"),
    ("offline", {"baselines": {"mean": 1}}, "baselines is {'mean': 1}, wanted an object whose values are an object"),
    (
        "offline",
        {"baselines": {"mean": {"rmse": "x", "first_rmse": 1}}},
        "baseline mean: rmse is 'x', wanted a number",
    ),
    ("offline", {"dataset": None}, "dataset is null, wanted text"),
    ("offline", {"checkpoint_hash": "other"}, "run eval_offline.py again"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=short_words)
def test_a_wrong_field_is_named(folder, name, change, message):
    file = folder / f"eval/{name}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError) as error:
        load_runs([folder / "eval"])
    assert message in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


LINES = [
    ("{", "is not JSON"),
    ("[]", "found [], wanted an object"),
    ("\0", "is not JSON"),
    ('{"a": ' * 50_000, "is nested too deep"),
    ({"seed": "1"}, "seed is '1', wanted a whole number"),
    ({"seed": -1}, "seed is -1"),
    ({"success": 1}, "success is 1, wanted true or false"),
    ({"steps": float("inf")}, "steps is inf"),
    ({"seconds": "long"}, "seconds is 'long'"),
    ({"model_calls": 10**12}, "model_calls is 1000000000000, wanted a whole number from 0 to 1000000000"),
    ({"max_coverage": None}, "max_coverage is null, wanted a number"),
    ({"suite": "../../x", "task_id": 0}, "suite is '../../x', wanted a suite's name"),
    ({"suite": "libero_object"}, "task_id is absent"),
    ({"protocol": "a"}, "protocol is 'a', wanted an object"),
]


@pytest.mark.parametrize(("line", "message"), LINES, ids=lambda value: repr(value)[:40])
def test_a_damaged_episode_is_left_out_and_said(folder, capsys, line, message):
    """The other episodes count, and the evaluation runs this one again."""
    text = json.dumps(ROWS[1] | line) if isinstance(line, dict) else line
    (folder / "eval/episodes.jsonl").write_text("\n".join([json.dumps(ROWS[0]), text, json.dumps(ROWS[2]), ""]))
    assert [row["seed"] for row in read_episodes(folder / "eval")] == [0, 2]
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {folder}/eval/episodes.jsonl, line 2: ") and message in said
    assert said.count("\n") == 1
    load_runs([folder / "eval"])
    assert "results.json counts 3 episodes, episodes.jsonl has 2: run the evaluation again" in capsys.readouterr().err


STATES = ["{", "[]", {"log_history": "x"}, {"global_step": "2"}, {"epoch": -1}, {"epoch": "1"}]


@pytest.mark.parametrize("change", STATES, ids=str)
def test_a_damaged_state_of_a_training_is_said(folder, capsys, change):
    file = folder / "run/trainer_state.json"
    file.write_text(change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change))
    assert read_state(Path("run")) is None
    assert load_runs([folder / "eval"])[0].log_history == []
    said = capsys.readouterr().err
    assert said.startswith("warning: run/trainer_state.json: ") and said.count("\n") == 1


@pytest.mark.parametrize("entry", [None, 3, {"loss": 1.0}, {"step": "2"}, {"step": -1}], ids=str)
def test_of_a_damaged_log_the_other_entries_are_kept(folder, capsys, entry):
    file = folder / "run/trainer_state.json"
    log = [{"step": 1, "loss": 2.0}, entry, {"step": 3, "loss": 1.0, "grad_norm": "nan"}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"log_history": log}))
    assert read_state(folder / "run")["log_history"] == [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.0}]
    assert "1 log entries are damaged and left out" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}", '{"kwh": "x", "seconds": 1, "samples": 1}', '{"kwh": NaN}', "[" * 100_000])
def test_damaged_energy_is_said(folder, capsys, text):
    (folder / "run/energy.json").write_text(text)
    assert read_energy(folder / "run") is None
    said = capsys.readouterr().err
    assert "the energy that was measured is not known any more" in said and said.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "{}", '{"global_batch": "8"}', '{"global_batch": 0}', '{"global_batch": 1e30}'])
def test_a_damaged_run_file(folder, text):
    (folder / "run/run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json: "):
        load_script("recipes/curves.py").read_run(folder / "run")


@pytest.mark.parametrize("files", [[], {"a": "x"}, {"a": -1}, {"a": None}, "all", 3], ids=str)
def test_a_damaged_manifest_is_no_whole_checkpoint(folder, files):
    (folder / "run/checkpoint.json").write_text(json.dumps({"files": files}))
    assert damage(folder / "run") == "checkpoint.json is damaged"


@pytest.mark.parametrize(
    "change", [[], {"seeds": 3}, {"seeds": [{}]}, {"seeds": [["a"]]}, {"episodes": ["0"]}], ids=str
)
def test_what_a_checkpoint_was_trained_on_is_known_or_not(folder, change):
    known = FILES["run/checkpoint.json"]["trained_on"]
    record = {"files": {}, "trained_on": known | change if isinstance(change, dict) else change}
    (folder / "run/checkpoint.json").write_text(json.dumps(record))
    assert trained_on(folder / "run") == {}


ABLATION = {
    "config": "c.yaml",
    "recipe": "r.py",
    "evaluation": "e.py",
    "published_source": "A",
    "published_episodes": 64,
    "arms": {"a": {"train": {"mask_max": 0.1}, "published": 57.8}},
}
ABLATIONS = [
    ({"config": None}, "config is null, wanted a line of text"),
    ({"recipe": 3}, "recipe is 3, wanted a line of text"),
    ({"published_episodes": "64"}, "published_episodes is '64', wanted a whole number from 1 to 1000000000"),
    ({"published_episodes": 10**12}, "published_episodes is 1000000000000"),
    ({"arms": []}, "arms is [], wanted an object"),
    ({"arms": None}, "arms is null"),
    ({"arms": {"a": 3}}, "arms is {'a': 3}, wanted an object whose values are an object with fields"),
    ({"arms": {3: {}}}, "arms is {3: {}}, wanted an object with at most 1000 names"),
    ({"arms": {"a": {"train": 3}}}, "arm 'a': train is 3, wanted an object"),
    ({"arms": {"a": {"train": {"mask_max": float("nan")}}}}, "arm 'a': train is {'mask_max': nan}, wanted"),
    ({"arms": {"a": {"evaluate": ["x"]}}}, "arm 'a': evaluate is ['x'], wanted an object"),
    ({"arms": {"a": {"published": 570}}}, "arm 'a': published is 570, wanted a rate from 0 to 100, or words"),
    ({"arms": {"a": {"published": [1]}}}, "arm 'a': published is [1]"),
    ({"arm": {}}, "unknown keys ['arm']"),
    ({"arms": {"a": {"trian": {}}}}, "arm 'a': unknown keys ['trian']"),
    ("a: [", "is not YAML"),
    ("- a", "found ['a'], wanted an object with fields"),
    ("a: &a [*a, *a]", "config is absent"),
    ("a: " + "[" * 5000, "is nested too deep"),
    ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
    ("\x01", "is not YAML"),
]


@pytest.mark.parametrize(("change", "message"), ABLATIONS, ids=lambda value: repr(value)[:40])
def test_an_ablation_file(tmp_path, change, message):
    file = tmp_path / "ablation.yaml"
    file.write_text(change if isinstance(change, str) else yaml.safe_dump(ABLATION | change))
    with pytest.raises(ValueError) as error:
        Ablation.load(file)
    assert message in str(error.value) and all(line.startswith(str(file)) for line in str(error.value).split("\n"))


def test_what_pages_show_is_text(folder):
    """A name with markup in it, in each place where a record reaches the page."""
    evil = "<script>alert(1)</script>"
    rows = [row | {"task": evil, "checkpoint": evil} for row in ROWS]
    (folder / "eval/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = FILES["eval/results.json"] | {"checkpoint": evil, "command": evil, "versions": {evil: evil}}
    target = folder / f"{evil.replace('/', '_')} $x_$"
    (folder / "eval").rename(target)
    (target / "results.json").write_text(json.dumps(results | {"machine": {"cpu": evil}, "git_commit": evil}))
    (target / "offline.json").write_text(json.dumps(FILES["eval/offline.json"] | {"dataset": evil, "episodes": evil}))
    write_report(folder / "report.html", load_runs([target]), evil)
    page = (folder / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "$x_$</text>" in page  # drawn literally, not as mathematics


def test_a_line_of_another_simulator_costs_no_other_line(tmp_path, capsys):
    with EpisodeLog(tmp_path, RUN) as log:
        rows = [log.append(small_result(seed)) for seed in (1, 2, 3)]
    rows[0] |= {"suite": "libero_object", "task_id": 0}
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["seed"] for row in read_episodes(tmp_path)] == [2, 3]
    assert "the line of libero_object 0 1 is of another simulator than most; it is left out" in capsys.readouterr().err
    with EpisodeLog(tmp_path, RUN) as log:
        assert log.missing([1, 2, 3]) == [1]
        log.append(small_result(1))
    assert [row["seed"] for row in read_episodes(tmp_path)] == [1, 2, 3]
