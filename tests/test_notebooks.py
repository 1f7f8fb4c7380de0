"""Executes the tutorials' notebooks in a Jupyter kernel, with options that make each command a matter of seconds."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.readme import REPOSITORY
from tests.test_own_images import SMALLER as SMALLER_OWN_IMAGES

nbformat = pytest.importorskip("nbformat", reason="requires the extra docs")
nbclient = pytest.importorskip("nbclient", reason="requires the extra docs")

SMALLER = {
    "first-images": {
        "pipelines.demo.images": "--num-train 80 --num-val 40",
        "meanflow encode": "--num-workers 1",
        "meanflow train": "--num-workers 1 --num-steps 6 --optimizer.warmup-steps 1 --optimizer.cooldown-steps 2",
        "meanflow evaluate": "--num-samples 20 --num-workers 1 --steps 1",
    },
    "own-images": {
        **{f"meanflow {module.removeprefix('pipelines.')}": options for module, options in SMALLER_OWN_IMAGES.items()},
    },
}
# What each shell command writes: one that fails does not stop a notebook.
PRODUCTS = {
    "first-images": (
        "build/first/images/LOC_synset_mapping.txt", "build/first/latents/manifest.json", "build/first/check.png",
        "build/first/runs/first/generator/README.md", "build/first/report/table.md",
    ),
    "own-images": (
        "runs/photos-vae/config.json", "photos-latents/manifest.json", "photos-latents-validation/manifest.json",
        "photos-check.png", "runs/photos/generator/README.md", "photos-report/nearest.png",
        "more-latents/manifest.json", "runs/more-photos/generator/README.md",
    ),
}  # fmt: skip
pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("name", SMALLER)
def test_notebook_executes(name, tmp_path):
    folder = tmp_path / "docs/tutorials"
    folder.mkdir(parents=True)
    (tmp_path / "pipelines").symlink_to(REPOSITORY / "pipelines")  # the paths of the demo's autoencoder and judge
    for photos in ("photos", "more-photos"):
        shutil.copytree(REPOSITORY / "tests/data/clothing", tmp_path / photos)
    notebook = nbformat.read(REPOSITORY / f"docs/tutorials/{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = "\n".join(smaller(line, SMALLER[name]) for line in cell.source.splitlines())
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_TMPDIR": "/tmp"}
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    for product in PRODUCTS[name]:
        assert (tmp_path / product).is_file(), product


def smaller(line: str, options: dict[str, str]) -> str:
    return line + "".join(f" {words}" for command, words in options.items() if line.startswith("!") and command in line)
