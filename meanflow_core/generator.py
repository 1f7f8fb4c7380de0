"""Generators as folders: making one of a trained network, finding one, opening one.

Networks are opened by name from this package's list, whatever code a folder may hold.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMapEulerDiscreteScheduler
from diffusers.utils import logging as diffusers_logging

from meanflow_core.autoencoder import load_autoencoder
from meanflow_core.config import SamplingConfig
from meanflow_core.formats import require_known_format
from meanflow_core.imf_transformer import ImprovedMeanFlowDiT
from meanflow_core.networks import NETWORKS, AnyNetwork, without_velocity_head
from meanflow_core.pipeline import FORMAT_VERSION, MeanFlowPipeline
from meanflow_core.portable import add_code

PROVENANCE_FILE = "provenance.json"


def build_pipeline(
    network: AnyNetwork,
    vae: AutoencoderKL,
    class_names: Sequence[str],
    *,
    wnids: Sequence[str] = (),
    is_flow_matching: bool = False,
    sampling: SamplingConfig | None = None,
) -> MeanFlowPipeline:
    """A pipeline around a network and its autoencoder, class i carrying the i-th name, and WordNet id if there are any.

    is_flow_matching: the network learnt velocities alone. sampling: its guidance unless asked otherwise.
    """
    sampling = sampling or SamplingConfig()
    pipeline = MeanFlowPipeline(
        network,
        vae,
        FlowMapEulerDiscreteScheduler(),
        id2label={str(label): name for label, name in enumerate(class_names)},
        wnids={str(label): wnid for label, wnid in enumerate(wnids)},
        prediction="velocity" if is_flow_matching else "average_velocity",
        guidance_scale=sampling.guidance_scale,
        guidance_interval_start=sampling.guidance_interval_start,
        guidance_interval_end=sampling.guidance_interval_end,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def for_sampling(network: AnyNetwork) -> AnyNetwork:
    """The network without what only training needs."""
    return without_velocity_head(network) if isinstance(network, ImprovedMeanFlowDiT) else network


def save_generator(pipeline: MeanFlowPipeline, folder: Path, *, portable: bool = False) -> None:
    """Writes a generator's folder, which opens where this package is installed.

    portable: the folder holds the code too, and opens with diffusers alone, by
    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
    """
    pipeline.save_pretrained(folder)
    if portable:
        add_code(folder)


def write_provenance(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Writes provenance.json into a generator's folder: what it was made from, as JSON values.

    Training writes "run_id" and "tracking_uri" (its MLflow run), "preset", "step", "ema_decay", "data" and "data_sha256".
    """
    (folder / PROVENANCE_FILE).write_text(json.dumps(dict(provenance), indent=2) + "\n")


def read_provenance(folder: Path) -> dict[str, Any]:
    """The content of a generator's provenance.json; empty without one, for example after a conversion.

    Raises ValueError for a damaged file.
    """
    file = folder / PROVENANCE_FILE
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; delete it, or publish the generator again") from error


def load_network(folder: Path) -> AnyNetwork:
    """Opens a network's folder in float32: one of this package's, from safetensors, with no code from the folder.

    Raises ValueError where there is no such folder, or its network is not among them.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"no config.json in {folder}; a network is a folder that save_pretrained wrote")
    content = json.loads(config.read_text())
    name = content.get("_class_name") if isinstance(content, dict) else None
    if name not in NETWORKS:
        raise ValueError(f"the network in {folder} is a {name!r}, but known are {', '.join(NETWORKS)}")
    diffusers_logging.disable_progress_bar()  # of loading a handful of files
    try:
        network = NETWORKS[name].from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False
        )
    except OSError as error:
        raise ValueError(f"the network in {folder} has no weights that can be read: {error}") from error
    return network.eval().requires_grad_(False)


def load_pipeline(folder: Path, device: str | torch.device = "cpu") -> MeanFlowPipeline:
    """Opens a generator's folder, portable or not, in float32 on a device: safetensors only, gradients off.

    Raises ValueError where it is no generator of this package, or one that a later release wrote.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"no model_index.json in {folder}; a generator is a folder that save_pretrained wrote")
    settings = _read_settings(folder)
    for name in ("vae", "scheduler"):
        if not (folder / name).is_dir():
            raise ValueError(f"no {name}/ in {folder}; a generator is a folder that save_pretrained wrote whole")
    known = ("id2label", "wnids", "prediction", "guidance_scale", "guidance_interval_start", "guidance_interval_end")
    pipeline = MeanFlowPipeline(
        load_network(folder / "transformer"),
        load_autoencoder(str(folder / "vae")),
        FlowMapEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        **{name: settings[name] for name in known if name in settings},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _read_settings(folder: Path) -> dict[str, Any]:
    """What a generator's model_index.json says. Raises ValueError where it is damaged, or of a later release."""
    try:
        settings = dict(json.loads((folder / "model_index.json").read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model_index.json in {folder} is damaged: {error}") from error
    require_known_format(settings.get("format_version", 0), FORMAT_VERSION, f"the generator in {folder}")
    return settings


def find_generator(folder: Path) -> Path:
    """The generator in a folder: the folder itself, or the one below it that has a model_index.json.

    A model downloaded from a registry holds the generator among its other files. Raises ValueError where there is
    none, or several, or a later release wrote it.
    """
    found = [path.parent for path in sorted(folder.rglob("model_index.json"))]
    if folder in found:
        found = [folder]
    if len(found) != 1:
        which = "".join(
            f"{', ' if number else ': '}{path.relative_to(folder)}" for number, path in enumerate(found[:5])
        )
        raise ValueError(
            f"wanted a generator, a folder with a model_index.json, in {folder}, but found {len(found)}{which}; "
            f"pipelines.train writes one and prints its place"
        )
    _read_settings(found[0])
    return found[0]
