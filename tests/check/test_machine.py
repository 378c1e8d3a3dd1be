"""Versions, disk, Hub, GPU and optimizer: each failure is made to happen."""

import json
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import pytest
import torch
from support.general import REPOSITORY
from support.shell import Shell

from vla0_trl.envs.libero.setup import DEVICES

pytestmark = pytest.mark.slow  # every check is a process


# -- packages


@pytest.mark.parametrize(
    ("lock", "status", "text"),
    [
        (None, "ok", "there is no requirements.lock to compare with (only a checkout has it): torch "),
        (
            "numpy=={numpy} \\\n    --hash=sha256:aa\n    # via vla0_trl\nzarr==0.1 ; python_version < '3'\n",
            "ok",
            "those",
        ),
        (
            "--only-binary :all:\nnumpy==0.1\nnot-installed==1\n",
            "warning",
            "1 differ from requirements.lock: numpy {numpy} (",
        ),
    ],
)
def test_versions_are_compared_with_the_lock(lock, status, text, shell):
    """A checkout of its own, of which only the lock differs."""
    (shell.broken / "vla0_trl").symlink_to(REPOSITORY / "vla0_trl")
    versions = {"numpy": version("numpy")}
    if lock is not None:
        (shell.broken / "requirements.lock").write_text(lock.format(**versions))
    found = shell.check("packages")
    assert found[0] == status and found[1].startswith(text.format(**versions))


def test_a_version_out_of_bounds_is_a_failure(shell):
    shell.distribution("vla0_trl", "0.1.0", "transformers>=5.17", "absent-package>=1", 'numpy>=99; extra == "dev"')
    shell.distribution("transformers", "5.0.0")
    status, text, fix = shell.check("packages")
    assert (status, text) == ("failure", "transformers 5.0.0 (needs >=5.17), absent-package is not installed")
    assert fix == "pip install -c requirements.lock -e ."


# -- disk


def test_a_disk_that_takes_no_file_is_a_failure(shell):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))

    status, text, fix = shell.check("disk", "--output_dir", "runs/new", preexec_fn=limit)
    assert status == "failure" and text.startswith(f"1 MiB can't be written into {shell.home} (File too large), ")
    assert "--output_dir" in fix and not (shell.home / "runs").exists()


@pytest.mark.parametrize(
    ("size", "status", "text"), [("64k", "failure", "No space left"), ("64m", "warning", "0.1 GiB")]
)
def test_a_small_disk_is_told(size, status, text, shell, tmp_path):
    """A file system of this size, that only this process sees."""
    script = f'mount -t tmpfs -o size={size} tmpfs "{shell.home}" && exec "$@"'
    prefix = ("unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh")
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare and mount namespaces, to make a small disk")
    found = shell.check("disk", "--output_dir", str(shell.home / "runs"), prefix=prefix)
    assert found[0] == status and text in found[1]


# -- Hub


class Hub(BaseHTTPRequestHandler):
    """The two answers of the Hub that the check asks for; one token is good."""

    def do_GET(self) -> None:
        good = self.headers.get("Authorization") in (None, "Bearer hf_good")
        body = {"id": "x", "modelId": "x", "siblings": []} if "/models/" in self.path else {"name": "somebody"}
        data = json.dumps(body if good else {"error": "Invalid credentials"}).encode()
        self.send_response(200 if good else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(shell) -> Iterator[Shell]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shell.env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    yield shell
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("token", "status", "text"),
    [
        (None, "warning", "answers, nobody is logged in"),
        ("hf_good", "ok", "answers, logged in as somebody"),
        ("hf_bad", "failure", "the Hub refuses the token"),
    ],
)
def test_the_hub_answers_and_knows_us(token, status, text, hub):
    hub.env |= {} if token is None else {"HF_TOKEN": token}
    found = hub.check("hub")
    assert found[0] == status and text in found[1] and "hf_" not in found[1]
    assert found[2].startswith("" if status == "ok" else "hf auth login")


def test_no_network_is_a_failure_unless_it_is_on_purpose(shell):
    assert shell.check("hub")[:2] == (
        "ok",
        "offline on purpose (HF_HUB_OFFLINE): models and datasets come from folders and the cache",
    )
    shell.env |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    status, text, fix = shell.check("hub")
    assert status == "failure" and text.startswith("http://127.0.0.1:9 can't be reached: ConnectError")
    assert "HF_HUB_OFFLINE=1" in fix


# -- GPU and optimizer


def test_without_a_gpu_it_says_what_a_cpu_is_good_for(shell):
    shell.env["CUDA_VISIBLE_DEVICES"] = ""
    assert shell.check("gpu")[:2] == ("warning", "hidden: CUDA_VISIBLE_DEVICES is empty")
    if torch.cuda.is_available() or (DEVICES / "nvidiactl").exists():
        return
    del shell.env["CUDA_VISIBLE_DEVICES"]
    status, text, fix = shell.check("gpu")
    assert status == "warning" and text.startswith("none: ") and "GiB free or more" in fix


def test_adam_8bit(shell):
    pytest.importorskip("bitsandbytes", reason="needs the extra [train8bit]")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert shell.check("adam_8bit")[1] == f"bitsandbytes {version('bitsandbytes')} steps a tensor on {device}"
    shell.module("bitsandbytes", "raise OSError('libbitsandbytes.so: undefined symbol')")
    status, text, _ = shell.check("adam_8bit")
    assert (status, text) == ("failure", "OSError: libbitsandbytes.so: undefined symbol")
