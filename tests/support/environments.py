"""Creates virtual environments for install tests, and lists the files and commands that must work in them."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.readme import REPOSITORY

PACKAGES = ("meanflow_core", "pipelines", "deploy")

# Imports every module and opens data files of each kind.
IMPORT_EVERYTHING = """
import importlib, json, pkgutil
from pathlib import Path
packages = [importlib.import_module(name) for name in ("meanflow_core", "pipelines", "deploy")]
modules = [module.name for package in packages for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in modules:
    importlib.import_module(name)
from meanflow_core.autoencoder import load_autoencoder
from meanflow_core.portable import NETWORK_MODULES, merged_source
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.judge.network import load_judge
load_autoencoder(str(SHIPPED_AUTOENCODER))
load_judge(SHIPPED_JUDGE)
compile(merged_source(NETWORK_MODULES), "merged", "exec")
deploy = Path(packages[2].__file__).parent
assert (deploy / "web" / "index.html").read_text().startswith("<!doctype html>")
assert json.loads((deploy / "grafana" / "endpoint.json").read_text())
for name in ("serve.yaml", "jobs/train.sh", "jobs/runtime_env.yaml", "kuberay/overlays/small/kustomization.yaml"):
    assert (deploy / name).is_file(), name
print(len(modules), "modules;", *sorted({str(Path(package.__file__).parents[1]) for package in packages}))
"""


def tracked_files() -> list[str]:
    """Paths of the files that git tracks, relative to the repository's root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.split("\0") if name]


def copy_files(names: list[str], folder: Path) -> None:
    """Copies files of the repository to `folder`, keeping their relative paths and modes."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)


def command_modules() -> list[str]:
    """The modules that `python -m` can run, found in the sources, so that tests include new ones."""
    found = []
    for name in tracked_files():
        if name.split("/")[0] in PACKAGES and name.endswith(".py"):
            text = (REPOSITORY / name).read_text()
            if 'if __name__ == "__main__":' in text or name.endswith("/__main__.py"):
                found.append(name.removesuffix(".py").removesuffix("/__main__").replace("/", "."))
    return sorted(found)


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and an empty folder to run its commands in."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> "Environment":
        """Creates the environment with this interpreter's Python version and bundled pip."""
        (folder / "empty").mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        return cls(folder)

    @property
    def empty(self) -> Path:
        """The default working directory of commands."""
        return self.folder / "empty"

    @property
    def python(self) -> str:
        """Path of the environment's interpreter."""
        return str(self.folder / "venv" / "bin" / "python")

    def run(self, *command: str, timeout_seconds: float = 600, cwd: Path | None = None, **environment: str) -> str:
        """Runs a command and returns its output (stdout and stderr). `python` is the environment's interpreter.

        Raises AssertionError if the command fails, or if it takes too long; then it is terminated.
        """
        removed = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_CONSTRAINT", "PIP_USER")
        inherited = {key: value for key, value in os.environ.items() if key not in removed}
        process = subprocess.Popen(
            list(command),
            cwd=cwd or self.empty,
            env={
                **inherited,
                "PATH": f"{Path(self.python).parent}:{inherited['PATH']}",
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                "PYTHONNOUSERSITE": "1",
                **environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout_seconds)
        except BaseException:
            process.terminate()
            output, _ = process.communicate()
            message = f"did not finish within {timeout_seconds:.0f} s: {' '.join(command)}\n{output[-6000:]}"
            raise AssertionError(message) from None
        assert process.returncode == 0, f"{' '.join(command)}\n{output[-6000:]}"
        return output

    def help_of(self, module: str) -> str:
        """The output of `python -m module --help`."""
        return self.run("python", "-m", module, "--help", timeout_seconds=120)

    def import_everything(self) -> str:
        """Imports every module and opens data files of each kind; returns the folder that contains the packages."""
        last = self.run("python", "-c", IMPORT_EVERYTHING, timeout_seconds=300).splitlines()[-1]
        count, _, places = last.partition(" modules; ")
        assert int(count) >= 70
        return places
