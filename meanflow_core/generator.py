"""Generators: build, save and load a MeanFlowPipeline.

The network's class is imported by its name in model_index.json: from this package, or from a module of the user's on the
Python path. Loading runs no code from the folder.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMapEulerDiscreteScheduler, SchedulerMixin
from diffusers.utils import logging as diffusers_logging

from meanflow_core.autoencoder import Autoencoder, load_autoencoder
from meanflow_core.config import SamplingConfig
from meanflow_core.generator_folder import read_settings
from meanflow_core.networks.forward_mode import find_network_class
from meanflow_core.networks.interface import NetworkModel
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.portable import add_code
from meanflow_core.predictions import Prediction
from meanflow_core.references import reference_of

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


def load_network(folder: Path) -> NetworkModel:
    """Loads the network of a generator folder in float32, for inference, from safetensors.

    Raises ValueError if the folder is not a generator of this format, if its network's class cannot be imported, or if it
    has no weights.
    """
    name = read_settings(folder).get("network_class")
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
    settings = read_settings(folder)
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
