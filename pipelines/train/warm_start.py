"""What a training begins with instead of random parameters: a generator's network, or a public checkpoint's."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from meanflow_core.autoencoder import load_autoencoder
from meanflow_core.config import NetworkConfig, TrainingConfig
from meanflow_core.generator import load_network
from meanflow_core.interop.names import convert_checkpoint, find_source, silence_step_size
from meanflow_core.interop.readers import read_checkpoint
from meanflow_core.latents import LatentNormalization
from meanflow_core.networks import AnyNetwork, build_network, require_same_kind
from meanflow_core.transformer import MeanFlowDiT
from pipelines.errors import InputError
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.manifest import Manifest
from pipelines.tracking.registry import fetch_generator

logger = logging.getLogger(__name__)

# What fine-tuning of a public flow-matching network took before its guidance set in (zhuyu-cs/MeanFlow, "SiT").
STAGE_EPOCHS = 20


@dataclass(frozen=True)
class Initial:
    """A network to begin with."""

    network: AnyNetwork
    """Of the configured kind and size, in float32."""
    is_flow_matching: bool
    """It learnt velocities alone."""


def initial_network(location: str, source: str | None, config: NetworkConfig, data: str, manifest: Manifest) -> Initial:
    """The network of --init-from and --init-source, for training on the latents `data`.

    One that learnt flow matching has never seen t - r above 0: it is changed so that it says at every t - r what it
    says at 0, its velocity, and can learn to say more. Raises InputError where there is none, or it is not of the
    configured kind and size, or knows latents of another normalisation.
    """
    with torch.device("meta"):
        wanted = build_network(config, **manifest.network_sizes)
    if source is None and Path(location).is_file():
        raise InputError(
            f"--init-from {location} is a file; say with --init-source where the checkpoint comes from, or name a "
            f"generator's folder"
        )
    try:
        if source is None:
            folder = fetch_generator(location, None)
            network = load_network(folder / "transformer")
            require_same_kind(network, wanted)
            _require_same_normalization(folder, data)
            is_flow_matching = json.loads((folder / "model_index.json").read_text()).get("prediction") == "velocity"
            if is_flow_matching and isinstance(network, MeanFlowDiT):
                silence_step_size(network)
        else:
            is_flow_matching = find_source(source).is_flow_matching
            state = read_checkpoint(Path(location))
            network = convert_checkpoint(
                source, state, sample_size=manifest.latent_shape[1], num_heads=config.num_heads
            )
            require_same_kind(network, wanted)
    except ValueError as error:
        raise InputError(f"--init-from {location}: {error}") from error
    logger.info("begins with %s%s", location, ", which learnt flow matching" if is_flow_matching else "")
    return Initial(network, is_flow_matching)


def _require_same_normalization(folder: Path, data: str) -> None:
    theirs = LatentNormalization.from_vae_config(load_autoencoder(str(folder / "vae")).config)
    ours = LatentNormalization.from_vae_config(open_autoencoder(data).config)
    if theirs != ours:
        raise InputError(
            f"it knows latents normalised by {theirs}, but the data's are by {ours}; encode with its autoencoder"
        )


def staged(config: TrainingConfig, manifest: Manifest, *, is_flow_matching: bool) -> TrainingConfig:
    """The configuration with the step decided at which guidance sets in, where it was left open.

    Guidance with a large kappa from the first step on makes a network that learnt flow matching diverge.
    """
    guided = config.loss.objective == "meanflow" and not config.loss.guidance.is_off
    if config.guidance_after_steps is not None or not is_flow_matching or not guided:
        return config
    steps = min(STAGE_EPOCHS * manifest.num_samples // config.global_batch_size, config.num_steps // 2)
    logger.info("guidance sets in after %d steps: the network to begin with learnt without", steps)
    return replace(config, guidance_after_steps=steps)
