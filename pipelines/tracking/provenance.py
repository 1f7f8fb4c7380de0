"""What a run was made of: code versions and datasets, as MLflow records them."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import TypeVar

from mlflow.entities import Dataset, DatasetInput, InputTag

from pipelines import storage
from pipelines.latents.manifest import Manifest

T = TypeVar("T")


def code_identity() -> dict[str, str]:
    """Which code runs: git commit, whether tracked files differ from it, and versions; "unknown" outside of git."""
    commit, dirty = "unknown", "unknown"
    # A package that is installed may lie in the folders of some other repository, which does not track it.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is not None:
        commit = _git("rev-parse", "HEAD") or "unknown"
        changes = _git("status", "--porcelain", "--untracked-files=no")
        dirty = "unknown" if changes is None else str(bool(changes)).lower()
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "meanflow_ray": _version("meanflow-ray"),
        **{name: _version(name) for name in ("torch", "ray", "diffusers", "mlflow")},
        "python": platform.python_version(),
    }


def latents_used(location: str, manifest: Manifest, context: str) -> DatasetInput:
    """A latent dataset as MLflow lists a run's data sets. context: "training" or "validation"."""
    place, source = storage.shown(location), storage.shown(manifest.source)
    about = {"num_samples": manifest.num_samples, "num_classes": len(manifest.class_names), "images": source}
    dataset = Dataset(
        name=f"{context}: {place}"[-500:],  # MLflow keeps one data set per name and digest, with its first place
        digest=manifest.content_sha256[:36],  # MLflow takes no longer ones; the parameter data.sha256 has it whole
        source_type="latents",
        source=json.dumps({"uri": place}),
        profile=json.dumps(about),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _git(*arguments: str) -> str | None:
    """What git says about this package's folder; None where it cannot."""
    try:
        asked = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
