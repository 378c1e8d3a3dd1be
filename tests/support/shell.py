"""`python -m vla0_trl.check` on a machine where something is broken, by what a real one would do to the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support.general import REPOSITORY

COMMAND = [sys.executable, "-m", "vla0_trl.check"]


class Shell:
    """The command in an environment of its own: `broken` lies before everything else on its import path."""

    def __init__(self, folder: Path):
        self.broken, self.libraries, self.home = folder / "broken", folder / "lib", folder / "home"
        for path in (self.broken, self.libraries, self.home):
            path.mkdir()
        path = os.pathsep.join([str(self.broken), str(REPOSITORY)])
        self.env = os.environ | {"PYTHONPATH": path, "HF_HOME": str(self.home), "HF_HUB_OFFLINE": "1"}
        self.env |= {"LD_LIBRARY_PATH": str(self.libraries)}
        for name in ("MUJOCO_GL", "LIBERO_ASSETS", "HF_TOKEN", "HF_ENDPOINT", "NO_COLOR"):
            self.env.pop(name, None)

    def distribution(self, name: str, number: str, *needs: str) -> None:
        """Make `name` look installed in this version."""
        folder = self.broken / f"{name}-{number}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}"]
        (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {need}" for need in needs)]) + "\n")

    def module(self, name: str, code: str) -> None:
        """Put this code in a package's place."""
        (self.broken / name).mkdir()
        (self.broken / name / "__init__.py").write_text(code)

    def run(self, *words: str, prefix: tuple[str, ...] = (), **settings) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*prefix, *COMMAND, *words], env=self.env, cwd=self.home, capture_output=True, text=True, **settings
        )

    def check(self, name: str, *words: str, **settings) -> tuple[str, str, str]:
        """Status, text and fix of one check; the exit status must follow."""
        done = self.run(name, "--json", *words, **settings)
        [found] = json.loads(done.stdout)["checks"]
        assert done.returncode == (found["status"] == "failure"), done.stderr
        assert bool(found["fix"]) == (found["status"] != "ok")
        return found["status"], found["text"], found["fix"]
