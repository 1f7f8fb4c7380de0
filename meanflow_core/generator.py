"""Generator folders: build, save, find and load a MeanFlowPipeline.

The network's class is imported by its name in model_index.json: from this package, or from a module of the user's on the
Python path. Loading runs no code from the folder.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMapEulerDiscreteScheduler, SchedulerMixin
from diffusers.utils import logging as diffusers_logging

from meanflow_core.autoencoder import Autoencoder, load_autoencoder
from meanflow_core.config import SamplingConfig
from meanflow_core.formats import require_format_version
from meanflow_core.networks.forward_mode import find_network_class
from meanflow_core.networks.interface import NetworkModel
from meanflow_core.pipeline import FORMAT_VERSION, MeanFlowPipeline
from meanflow_core.portable import add_code
from meanflow_core.predictions import Prediction
from meanflow_core.references import reference_of

PROVENANCE_FILE = "provenance.json"
# Entries of model_index.json that are arguments of the pipeline.
_SETTINGS = (
    "id2label",
    "wnids",
    "prediction",
    "guidance_scale",
    "guidance_interval_start",
    "guidance_interval_end",
    "network_class",
)


def build_pipeline(
    network: NetworkModel,
    vae: Autoencoder,
    class_names: Sequence[str],
    *,
    wnids: Sequence[str] = (),
    prediction: Prediction = "average_velocity",
    scheduler: SchedulerMixin | None = None,
    sampling: SamplingConfig | None = None,
) -> MeanFlowPipeline:
    """Builds a pipeline from a trained network and its autoencoder.

    class_names: the name of each class, in the order of the ids. wnids: their WordNet ids, if any. prediction: what the
    network predicts, as in `MeanFlowPipeline`. scheduler: default: FlowMapEulerDiscreteScheduler. sampling: default guidance
    of the pipeline.
    """
    sampling = sampling or SamplingConfig()
    return MeanFlowPipeline(
        network,
        vae,
        scheduler or FlowMapEulerDiscreteScheduler(),
        id2label={str(label): name for label, name in enumerate(class_names)},
        wnids={str(label): wnid for label, wnid in enumerate(wnids)},
        prediction=prediction,
        guidance_scale=sampling.guidance_scale,
        guidance_interval_start=sampling.guidance_interval_start,
        guidance_interval_end=sampling.guidance_interval_end,
        network_class=reference_of(type(network)),
    )


def save_generator(pipeline: MeanFlowPipeline, folder: Path, *, portable: bool = False) -> None:
    """Saves a pipeline as a generator folder. Loading it requires this package, unless it is portable.

    portable: adds the code, so that diffusers alone can load the folder, with
    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
    """
    pipeline.save_pretrained(folder)
    if portable:
        add_code(folder)


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


def load_network(folder: Path) -> NetworkModel:
    """Loads the network of a generator folder in float32, for inference, from safetensors.

    Raises ValueError if the folder is not a generator of this format, if its network's class cannot be imported, or if it
    has no weights.
    """
    name = _read_settings(folder).get("network_class")
    if not isinstance(name, str):
        raise ValueError(f"model_index.json in {folder} does not name the network_class; publish the generator again")
    network_class = find_network_class(name)
    if not issubclass(network_class, NetworkModel):
        raise ValueError(f"the network_class of {folder} must be a NetworkModel, but {name} is not")
    if not (folder / "transformer" / "config.json").is_file():
        raise ValueError(f"no transformer/config.json in {folder}; a generator is a folder written by save_pretrained")
    diffusers_logging.disable_progress_bar()
    try:
        network = network_class.from_pretrained(
            folder / "transformer", dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False
        )
    except OSError as error:
        raise ValueError(f"cannot read the weights of the network in {folder}: {error}") from error
    return network.eval().requires_grad_(False)


def _load_scheduler(folder: Path) -> SchedulerMixin:
    try:
        name = json.loads((folder / "scheduler_config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read the scheduler in {folder}: {error}") from error
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(f"the scheduler in {folder} must be a diffusers scheduler, but got {name!r}")
    scheduler: Any = found
    return scheduler.from_pretrained(folder)


def load_pipeline(folder: Path, device: str | torch.device = "cpu") -> MeanFlowPipeline:
    """Loads a generator folder, portable or not, in float32, for inference.

    Raises ValueError if it is not a generator of this package or has another format version.
    """
    settings = _read_settings(folder)
    for name in ("vae", "scheduler"):
        if not (folder / name).is_dir():
            raise ValueError(f"no {name}/ in {folder}; a generator is a complete folder written by save_pretrained")
    pipeline = MeanFlowPipeline(
        load_network(folder),
        load_autoencoder(str(folder / "vae")),
        _load_scheduler(folder / "scheduler"),
        **{name: settings[name] for name in _SETTINGS if name in settings},
    )
    return pipeline.to(device)


def _read_settings(folder: Path) -> dict[str, Any]:
    """Reads model_index.json. Raises ValueError if it is missing or damaged, or has another format version."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"no model_index.json in {folder}; a generator is a folder written by save_pretrained")
    try:
        settings = dict(json.loads(index.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model_index.json in {folder} is damaged: {error}") from error
    require_format_version(settings.get("format_version"), FORMAT_VERSION, f"the generator in {folder}")
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
    _read_settings(found[0])
    return found[0]
