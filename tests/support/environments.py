"""New environments that the project is installed into, and what an installed project must be able to do there."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.readme import REPOSITORY

PACKAGES = ("meanflow_core", "pipelines", "deploy")

# Every module is imported, and everything that lies beside the code is opened.
USES_EVERYTHING = """
import importlib, json, pkgutil, sys
from pathlib import Path
packages = [importlib.import_module(name) for name in ("meanflow_core", "pipelines", "deploy")]
found = [module.name for package in packages for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in found:
    importlib.import_module(name)
from deploy.app import build_app
from deploy.http import WEB
from deploy.jobs.job_file import read_job_file
from deploy.validate import KUBERAY, render
from meanflow_core.autoencoder import load_autoencoder
from meanflow_core.portable import NETWORK_MODULES, merged_source
from pipelines.demo.__main__ import SERVE_CONFIG
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.evaluate.judge import load_judge
deploy = WEB.parent
load_autoencoder(str(SHIPPED_AUTOENCODER))
load_judge(SHIPPED_JUDGE)
assert (WEB / "index.html").read_text().startswith("<!doctype html>")
assert json.loads((deploy / "grafana" / "endpoint.json").read_text())
assert SERVE_CONFIG.is_file()
assert {read_job_file(path).submission_id for path in (deploy / "jobs").glob("*.yaml")}
assert render(KUBERAY / "base") and render(KUBERAY / "overlays" / "small")
compile(merged_source(NETWORK_MODULES), "merged", "exec")
print(len(found), "modules;", *sorted({str(Path(package.__file__).parents[1]) for package in packages}))
"""


def tracked_files() -> list[str]:
    """Paths of the files that git has, from the repository's root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.split("\0") if name]


def copy_files(names: list[str], folder: Path) -> None:
    """Copies files of the repository, with their folders."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((REPOSITORY / name).read_bytes())


def command_modules() -> list[str]:
    """The modules that `python -m` starts, by looking: what is added has to work, too."""
    found = []
    for name in tracked_files():
        if name.split("/")[0] in PACKAGES and name.endswith(".py"):
            text = (REPOSITORY / name).read_text()
            if 'if __name__ == "__main__":' in text or name.endswith("/__main__.py"):
                found.append(name.removesuffix(".py").removesuffix("/__main__").replace("/", "."))
    return sorted(found)


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds nothing of this one, and an empty folder where its commands run."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> "Environment":
        """Makes it, with this interpreter's version and the pip that comes with it."""
        (folder / "empty").mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        return cls(folder)

    @property
    def empty(self) -> Path:
        """Where commands run."""
        return self.folder / "empty"

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.folder / "venv" / "bin" / "python")

    def run(self, *command: str, patience_seconds: float = 600, cwd: Path | None = None, **environment: str) -> str:
        """Runs a command to its end and returns its output; `python` is this environment's.

        Raises AssertionError where it fails or outlasts its time; it is then asked to end.
        """
        kept = {
            key: value
            for key, value in os.environ.items()
            if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_CONSTRAINT", "PIP_USER")
        }
        process = subprocess.Popen(
            list(command),
            cwd=cwd or self.empty,
            env={
                **kept,
                "PATH": f"{Path(self.python).parent}:{kept['PATH']}",
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
            output, _ = process.communicate(timeout=patience_seconds)
        except BaseException:
            process.terminate()
            output, _ = process.communicate()
            raise AssertionError(
                f"not done in {patience_seconds:.0f} s: {' '.join(command)}\n{output[-6000:]}"
            ) from None
        assert process.returncode == 0, f"{' '.join(command)}\n{output[-6000:]}"
        return output

    def help_of(self, module: str) -> str:
        """What `python -m module --help` prints."""
        return self.run("python", "-m", module, "--help", patience_seconds=120)

    def uses_everything(self) -> str:
        """Imports every module and opens every data file; returns the folder that they lie in."""
        last = self.run("python", "-c", USES_EVERYTHING, patience_seconds=300).splitlines()[-1]
        count, _, places = last.partition(" modules; ")
        assert int(count) >= 70
        return places
