"""Warm starts: initialize the network from a generator or a public checkpoint instead of randomly."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from meanflow_core.autoencoder import load_autoencoder
from meanflow_core.config import GuidedLossConfig, TrainingConfig
from meanflow_core.generator import load_network
from meanflow_core.interop.conversion import convert_checkpoint, find_source, ignore_step_size
from meanflow_core.interop.readers import read_checkpoint
from meanflow_core.latents import LatentNormalization
from meanflow_core.networks.building import build_network, require_same_architecture
from meanflow_core.networks.dit import MeanFlowDiT
from meanflow_core.networks.interface import NetworkModel
from pipelines.errors import InputError
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.manifest import Manifest
from pipelines.tracking.registry import fetch_generator
from pipelines.train.job import TrainJob

logger = logging.getLogger(__name__)

# Epochs without guidance when fine-tuning a flow-matching network. Source: zhuyu-cs/MeanFlow, "SiT".
UNGUIDED_EPOCHS = 20


@dataclass(frozen=True)
class InitialNetwork:
    """A pretrained network."""

    network: NetworkModel
    """The network, of the configured architecture and size, in float32."""
    is_flow_matching: bool
    """Whether it was trained with flow matching and predicts only instantaneous velocities."""


def load_initial_network(job: TrainJob, manifest: Manifest) -> InitialNetwork | None:
    """Loads the network of --init-from and --init-source; None without --init-from.

    A flow-matching network was trained with t - r = 0 only. It is modified to predict the same instantaneous velocity
    for every t - r; training then learns the dependence on t - r. Raises InputError if the network is missing, has
    another architecture or size, or was trained on latents with another normalization.
    """
    location, source = job.init_from, job.init_source
    if location is None:
        return None
    with torch.device("meta"):
        expected = build_network(job.config.network, **manifest.network_sizes)
    if source is None and Path(location).is_file():
        raise InputError(
            f"--init-from {location} is a file; name its source with --init-source, or give a generator's folder"
        )
    try:
        if source is None:
            folder = fetch_generator(location, None)
            network = load_network(folder)
            require_same_architecture(network, expected)
            _require_same_normalization(folder, job.data)
            prediction = json.loads((folder / "model_index.json").read_text()).get("prediction")
            if (prediction == "epsilon") != (job.config.loss.prediction == "epsilon"):
                raise ValueError(
                    f"its network predicts {prediction}, but this training's {job.config.loss.prediction}; start diffusion "
                    f"from diffusion, and all other objectives from each other"
                )
            is_flow_matching = prediction == "velocity"
            if is_flow_matching and isinstance(network, MeanFlowDiT):
                ignore_step_size(network)
        else:
            is_flow_matching = find_source(source).is_flow_matching
            state = read_checkpoint(Path(location))
            network = convert_checkpoint(
                source,
                state,
                sample_size=manifest.latent_shape[1],
                num_heads=getattr(job.config.network, "num_heads", None),
            )
            require_same_architecture(network, expected)
    except ValueError as error:
        raise InputError(f"--init-from {location}: {error}") from error
    logger.info("initial network: %s%s", location, " (flow matching)" if is_flow_matching else "")
    return InitialNetwork(network, is_flow_matching)


def _require_same_normalization(folder: Path, data: str) -> None:
    generator = LatentNormalization.from_vae_config(load_autoencoder(str(folder / "vae")).config)
    dataset = LatentNormalization.from_vae_config(open_autoencoder(data).config)
    if generator != dataset:
        raise InputError(
            f"the network was trained on latents normalized with {generator}, but --data has {dataset}; encode the images "
            f"with the generator's autoencoder"
        )


def delay_guidance(config: TrainingConfig, manifest: Manifest) -> TrainingConfig:
    """Returns the configuration with `guidance_after_steps` for a flow-matching network, unless it is already set.

    Guidance with a large kappa from the first step makes training from a flow-matching network diverge.
    """
    is_guided = isinstance(config.loss, GuidedLossConfig) and not config.loss.guidance.is_off
    if config.guidance_after_steps is not None or not is_guided:
        return config
    steps = min(UNGUIDED_EPOCHS * manifest.num_samples // config.global_batch_size, config.num_steps // 2)
    logger.info("guidance starts after %d steps, because the initial network was trained without guidance", steps)
    return replace(config, guidance_after_steps=steps)
