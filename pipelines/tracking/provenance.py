"""Code versions and datasets of a run, as recorded in MLflow."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag

from pipelines import storage


def code_identity() -> dict[str, str]:
    """The git commit, whether tracked files are modified, and package versions. Values may be "unknown"."""
    commit, dirty = "unknown", "unknown"
    # An installed package may be inside another repository that does not track it.
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


def latents_dataset(
    location: str, content_sha256: str, *, num_samples: int, num_classes: int, source: str, context: str
) -> DatasetInput:
    """A latent dataset for `MlflowClient.log_inputs`.

    Args:
        location: Location of the latents.
        content_sha256: Hash of the dataset's content.
        num_samples: Number of samples.
        num_classes: Number of classes.
        source: Location of the encoded images.
        context: "training" or "validation".
    """
    uri = storage.redact(location)
    profile = {"num_samples": num_samples, "num_classes": num_classes, "images": storage.redact(source)}
    dataset = Dataset(
        # MLflow keeps one dataset per name and digest, with the first location that was logged.
        name=f"{context}: {uri}"[-500:],
        digest=content_sha256[:36],  # MLflow's limit; the parameter data.sha256 has the full hash
        source_type="latents",
        source=json.dumps({"uri": uri}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _git(*arguments: str) -> str | None:
    """Runs git in this module's folder. Returns its output, or None if it fails."""
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
