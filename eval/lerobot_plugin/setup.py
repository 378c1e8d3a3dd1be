"""Builds the plugin with the client of vla0_trl's server in it, which stands once in this repository."""

from setuptools import setup
from setuptools.command.build_py import build_py

SERVING = "../../vla0_trl/serving"


class WithClient(build_py):
    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        carried = [(package, name, f"{SERVING}/{name}.py") for name in ("client", "codec", "safety")]
        return [*super().find_package_modules(package, package_dir), *carried]


setup(cmdclass={"build_py": WithClient})
