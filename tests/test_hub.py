"""Uploads, against a Hub on loopback: huggingface_hub's own client sends real bytes. What is wrong is one line."""

import json
import sys

import pytest
from huggingface_hub import constants
from support.episodes import SmallSource, small_config
from support.hub import READER, STRANGER, WRITER, LocalHub

from vla0_trl.command_line import parse
from vla0_trl.data.arguments import ConversionArguments, command_line_errors
from vla0_trl.hub import HubError, open_repository, upload


@pytest.fixture
def hub(monkeypatch):
    """The Hub of this process, which is otherwise offline; uploads go the way without hf_xet's own protocol."""
    with LocalHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield server


def push(folder, *words, source=None) -> None:
    """A converter's main() with these flags."""
    args = parse(ConversionArguments, "", ["--output_dir", str(folder), *words])
    with command_line_errors(args):
        args.convert(source or SmallSource(), small_config())


def test_a_dataset_is_uploaded_private_and_whole_and_not_sent_twice(hub, tmp_path, capsys):
    push(tmp_path / "d", "--push_to_hub", "me/small")
    repository = hub.repositories["datasets", "me/small"]
    assert repository.private
    manifest = json.loads((tmp_path / "d" / "conversion.json").read_text())
    files = repository.commits[-1].files
    assert files.keys() == {".gitattributes", "conversion.json", *manifest["files"]}
    for name, size in manifest["files"].items():
        handed_out = next(data for path, data in files.items() if path == name)
        stored = next((data for data in hub.large.values() if len(data) == size), handed_out)
        assert stored == (tmp_path / "d" / name).read_bytes()
    assert f"{hub.url}/datasets/me/small at revision {repository.commits[-1].sha}" in capsys.readouterr().out
    sent = hub.uploads
    (tmp_path / "d" / "notes.txt").write_text("mine")  # stays here
    push(tmp_path / "d", "--push_to_hub", "small")  # converted already, and the id without its owner
    assert hub.uploads == sent == 2 and len(repository.commits) == 2


def test_public_is_said(hub, tmp_path):
    push(tmp_path / "d", "--push_to_hub", "me/small", "--public")
    assert not hub.repositories["datasets", "me/small"].private


def test_a_broken_upload_goes_on(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    open_repository("me/d", "dataset")
    files = {f"{number}.bin": bytes([number]) * 1000 for number in range(4)}
    hub.fail_uploads = 3
    with pytest.raises(HubError, match=r"^me/d: the upload was not finished: .* sends only what is missing$"):
        upload(files, "me/d", "dataset", "four files")
    assert len(hub.repositories["datasets", "me/d"].commits) == 1
    arrived = dict(hub.large)
    assert 1 <= len(arrived) <= 2
    hub.fail_uploads = 0
    upload(files, "me/d", "dataset", "four files")
    puts = [path for _, path, status, _ in hub.requests("^PUT") if status == 200]
    assert len(puts) == len(set(puts)) == len(hub.large) == 4  # none twice


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("stranger/small", WRITER, 'rights to create a dataset under the namespace "stranger" (logged in as me'),
        ("me/small", READER, "the token's role is 'read'; it needs 'write', and an id such as me/…"),
        ("me/small", "hf_expired", "not logged in, or the token is not valid: run `hf auth login`, or set HF_TOKEN"),
        ("stranger/theirs", WRITER, "Forbidden: you don't have the rights to write to stranger/theirs"),
        ("me//small", WRITER, "Repo id must be in the form"),
    ],
)
def test_what_is_wrong_with_a_repository_is_one_line_before_any_work(
    name, token, said, hub, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    open_repository("stranger/theirs", "dataset", private=False)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(sys, "argv", ["convert_x.py"])
    with pytest.raises(SystemExit) as exit_info:
        push(tmp_path / "d", "--push_to_hub", name)
    line = capsys.readouterr().err or str(exit_info.value.code)
    assert line.startswith("error: ") and said in line and line.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_no_connection_is_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"^dataset repository 'me/d' can't be written to: no answer from http://127"):
        open_repository("me/d", "dataset")
