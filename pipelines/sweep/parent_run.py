"""The MLflow run of a whole sweep or comparison, which contains the runs of its trainings."""

import json
from collections.abc import Mapping
from typing import Any

import ray
from pyarrow import fs

from pipelines import storage
from pipelines.cluster import start_ray
from pipelines.errors import InputError
from pipelines.tracking.provenance import code_identity
from pipelines.tracking.run import Run
from pipelines.tracking.server import resolve_tracking_uri

FILE = "parent_run.json"


def begin_or_resume(
    location: str, experiment: str, parameters: Mapping[str, Any], tracking_folder: str | None = None
) -> Run:
    """Begins the run of the sweep in a folder, or resumes the one that the folder names.

    experiment: MLflow experiment. tracking_folder: where MLflow's database is unless MLFLOW_TRACKING_URI is set. Default:
    location. Raises InputError if MLflow cannot be reached or does not have the run, or if the folder holds something else.
    """
    start_ray(needed_cpus=1)
    tracking_uri = resolve_tracking_uri(tracking_folder or location, sum(node["Alive"] for node in ray.nodes()))
    filesystem, folder = storage.open_storage(location)
    if filesystem.get_file_info(f"{folder}/{FILE}").type == fs.FileType.File:
        run = Run(tracking_uri, json.loads(storage.read_bytes(filesystem, f"{folder}/{FILE}"))["run_id"])
        run.resume()
        return run
    others = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    others = [info for info in others if not info.base_name.startswith("mlflow")]  # MLflow's database is made first
    if others:
        raise InputError(
            f"{location} must be empty or hold {FILE}, but holds {others[0].base_name}; choose a new folder"
        )
    run = Run.begin(tracking_uri, experiment, folder.rpartition("/")[2], parameters, code_identity())
    storage.write_bytes(filesystem, f"{folder}/{FILE}", json.dumps({"run_id": run.run_id}).encode())
    return run
