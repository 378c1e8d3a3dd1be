"""Simulators, video and policy: they work, or each failure is made to happen."""

import json
import resource
from pathlib import Path

import pytest
from support.general import libero_assets

from vla0_trl.envs.libero.protocol import TESTED_MUJOCO
from vla0_trl.envs.libero.setup import DEVICES

pytestmark = pytest.mark.slow  # every check is a process


# -- what is not installed


def test_what_is_optional_and_not_installed_is_a_warning(shell):
    hidden = "import sys; sys.modules |= dict.fromkeys(['bitsandbytes', 'libero', 'av', 'msgpack'])"
    (shell.broken / "sitecustomize.py").write_text(hidden)
    done = shell.run(
        "adam_8bit", "libero", "libero_assets", "libero_osmesa", "libero_egl", "video", "serving", "--json"
    )
    found = {check["name"]: (check["status"], check["fix"]) for check in json.loads(done.stdout)["checks"]}
    extras = {"adam_8bit": "train8bit", "libero": "libero", "video": "convert", "serving": "serve"}
    assert found == {
        name: ("warning", f'pip install -c requirements.lock -e ".[{extra}]"') for name, extra in extras.items()
    }
    assert done.returncode == 0


# -- simulators


def test_pusht_draws_or_says_why_not(shell):
    status, text, _ = shell.check("pusht")
    assert status == "ok" and text.startswith("96 × 96 px drawn in ")
    shell.module("pygame", "raise ImportError('libSDL2.so: cannot open shared object file')")
    status, text, fix = shell.check("pusht")
    assert (status, text) == ("failure", "ImportError: libSDL2.so: cannot open shared object file")
    assert "pygame" in fix


def test_another_mujoco_is_a_failure(shell):
    libero_assets()
    shell.distribution("mujoco", "3.4.0")
    status, text, fix = shell.check("libero")
    assert status == "failure" and text.startswith(f"MuJoCo 3.4.0, but {TESTED_MUJOCO} is what was tested")
    assert fix == f"pip install mujoco=={TESTED_MUJOCO}"


def test_liberos_assets_are_found_or_told(shell):
    shell.env["LIBERO_ASSETS"] = str(Path(libero_assets()).resolve())
    assert shell.check("libero_assets")[:2] == ("ok", shell.env["LIBERO_ASSETS"])
    shell.env["LIBERO_ASSETS"] = str(shell.home)
    status, text, _ = shell.check("libero_assets")
    assert status == "failure" and "is not LIBERO's assets folder" in text
    del shell.env["LIBERO_ASSETS"]
    assert shell.check("libero_assets")[:2] == (
        "warning",
        "not on this machine; the first evaluation or recording downloads them",
    )
    assert shell.check("libero_osmesa")[:2] == ("warning", "not tried: it needs LIBERO's assets")


def test_libero_draws_by_osmesa_or_says_what_is_missing(shell):
    shell.env |= {"LIBERO_ASSETS": libero_assets(), "MUJOCO_GL": "osmesa"}
    status, text, _ = shell.check("libero_osmesa")
    assert status == "ok" and text.startswith("256 × 256 px drawn in ")
    for name in ("libOSMesa.so", "libOSMesa.so.8", "libOSMesa.so.6"):
        (shell.libraries / name).write_bytes(b"")  # a library that does not load
    status, _, fix = shell.check("libero_osmesa")
    assert (status, fix) == ("failure", "apt-get install libosmesa6")


def test_a_renderer_that_is_not_needed_may_crash(shell):
    shell.env |= {"LIBERO_ASSETS": libero_assets(), "MUJOCO_GL": "osmesa"}
    shell.module("mujoco", "import os; os.abort()")
    if not (DEVICES / "nvidia0").exists():
        shell.env["CUDA_VISIBLE_DEVICES"] = "0"  # else it ends before it draws
    found = [shell.check(name)[:2] for name in ("libero_osmesa", "libero_egl")]
    assert [status for status, _ in found] == ["failure", "warning"]
    assert all(text.startswith("crashed (SIGABRT)") for _, text in found)


def test_a_library_that_hangs_is_given_up(shell):
    shell.env |= {"LIBERO_ASSETS": libero_assets(), "MUJOCO_GL": "osmesa"}
    shell.module("mujoco", "import time; time.sleep(1000)")
    assert shell.check("libero_osmesa", "--timeout", "10")[:2] == ("failure", "no answer within 10 s")


# -- video and policy


def test_an_mp4_is_decoded_or_the_failure_told(shell):
    pytest.importorskip("av", reason="needs the extra [convert]")
    assert shell.check("video")[0] == "ok"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, 256))

    status, text, _ = shell.check("video", preexec_fn=limit)
    assert status == "failure" and text.startswith("WriteError: ffmpeg could not write ")


def test_the_nano_policy_answers_and_no_library_is_heard(shell):
    done = shell.run("adam_8bit", "policy")
    first, *lines, last = done.stdout.splitlines()
    assert first.startswith("vla0_trl ") and last == "ok 2, warning 0, failure 0" and done.stderr == ""
    assert [line.split(":")[0] for line in lines] == ["ok       8-bit Adam", "ok       nano policy"]
    shell.module("tokenizers", "raise ImportError('built for another Python')")
    assert shell.check("policy")[0] == "failure"


def test_fast_decoding_that_fails_its_check_is_a_warning(shell):
    broken = "from vla0_trl.policy.speculative.tree_forward import TreeForward; TreeForward.prompt = None"
    (shell.broken / "sitecustomize.py").write_text(broken)
    status, text, fix = shell.check("policy")
    assert status == "warning" and text.endswith("fast decoding failed its check, see eval/README.md")
    assert fix.startswith("nothing to fix: answers are right")


def test_a_server_answers_or_says_why_not(shell):
    status, text, _ = shell.check("serving")
    assert status == "ok" and text.startswith("a chunk over ws:// in ")
    shell.module("websockets", "raise ImportError('broken')")
    assert shell.check("serving")[0] == "failure"
