"""What a run was made from: code versions and datasets, as MLflow records them."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag

from pipelines import storage


def code_identity() -> dict[str, str]:
    """The running code: git commit, whether tracked files differ from it, and versions; "unknown" outside of git."""
    commit, dirty = "unknown", "unknown"
    # An installed package may lie inside another repository, which does not track it.
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


def latents_used(
    location: str, content_sha256: str, *, num_samples: int, num_classes: int, source: str, context: str
) -> DatasetInput:
    """A latent dataset as an entry of a run's dataset list.

    source: location of the images that were encoded. context: "training" or "validation".
    """
    place = storage.shown(location)
    profile = {"num_samples": num_samples, "num_classes": num_classes, "images": storage.shown(source)}
    dataset = Dataset(
        name=f"{context}: {place}"[-500:],  # MLflow keeps one dataset per name and digest, with its first location
        digest=content_sha256[:36],  # MLflow's limit; the parameter data.sha256 has the whole hash
        source_type="latents",
        source=json.dumps({"uri": place}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _git(*arguments: str) -> str | None:
    """The output of a git command in this package's folder; None if it fails."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
