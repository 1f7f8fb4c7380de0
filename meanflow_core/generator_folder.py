"""Generator folders, without torch: find them, and read their settings and their origin."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meanflow_core.formats import GENERATOR_FORMAT_VERSION, require_format_version

PROVENANCE_FILE = "provenance.json"


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads model_index.json. Raises ValueError if it is missing or damaged, or has another format version."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"no model_index.json in {folder}; a generator is a folder written by save_pretrained")
    try:
        settings = dict(json.loads(index.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model_index.json in {folder} is damaged: {error}") from error
    require_format_version(settings.get("format_version"), GENERATOR_FORMAT_VERSION, f"the generator in {folder}")
    return settings


def find_generator(folder: Path) -> Path:
    """Finds the generator in a folder: the folder itself, or the only one below it with a model_index.json.

    A model downloaded from a registry contains the generator and other files. Raises ValueError if there is no
    generator, if there are several, or if it has another format version.
    """
    found = sorted(path.parent for path in folder.rglob("model_index.json"))
    if folder in found:
        found = [folder]
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found[:5]) or "none"
        raise ValueError(
            f"{folder} must contain one generator (a folder with a model_index.json), but found {names}; "
            f"`meanflow train` writes one and prints its location"
        )
    read_settings(found[0])
    return found[0]


def write_provenance(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Writes provenance.json into a generator folder: the generator's origin, as JSON values.

    Training writes "run_id" and "tracking_uri" (its MLflow run), "preset", "step", "ema_decay", "data" and "data_sha256".
    """
    (folder / PROVENANCE_FILE).write_text(json.dumps(dict(provenance), indent=2) + "\n")


def read_provenance(folder: Path) -> dict[str, Any]:
    """Reads a generator's provenance.json. Empty if there is none, for example in a converted generator.

    Raises ValueError for a damaged file.
    """
    file = folder / PROVENANCE_FILE
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; delete it, or publish the generator again") from error
