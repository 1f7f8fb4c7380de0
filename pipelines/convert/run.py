"""Runs a conversion: read and convert the checkpoint, set the normalization and sampling defaults, write the generator."""

import logging
import os
import re
import tempfile
from pathlib import Path

from meanflow_core.autoencoder import Autoencoder
from meanflow_core.config import SamplingConfig
from meanflow_core.generator import build_pipeline, save_generator
from meanflow_core.interop.conversion import convert_checkpoint, find_source, published_training
from meanflow_core.interop.readers import read_checkpoint
from meanflow_core.latents import SD_SCALING_FACTOR, SD_VAE_FT_MSE_MEAN, SD_VAE_FT_MSE_STD, LatentNormalization
from meanflow_core.networks.interface import NetworkModel
from meanflow_core.pipeline import MeanFlowPipeline
from pipelines import storage
from pipelines.convert.job import ConvertJob
from pipelines.errors import InputError
from pipelines.latents.autoencoder import absolute_autoencoder, load_named_autoencoder

logger = logging.getLogger(__name__)


def convert(job: ConvertJob) -> tuple[Path, int]:
    """Writes the generator. Returns its folder and its network's number of parameters.

    Raises InputError for invalid input, in which case nothing is written.
    """
    output = _new_folder(job.output)
    checkpoint = job.checkpoint.expanduser()
    try:
        source = find_source(job.source)
        vae = load_named_autoencoder(absolute_autoencoder(job.vae))
        state = read_checkpoint(checkpoint, use_ema=job.use_ema)
    except ValueError as error:
        raise InputError(str(error)) from error
    logger.info("read %d tensors from %s", len(state), checkpoint)
    try:
        network = convert_checkpoint(job.source, state, sample_size=job.sample_size, num_heads=job.num_heads)
    except ValueError as error:
        raise InputError(f"cannot convert {checkpoint}: {error}") from error
    config = network.config
    logger.info(
        "width %d, depth %d, %d heads, patch size %d, latents %dx%dx%d, %d classes",
        config.hidden_size, config.depth, config.num_heads, config.patch_size, config.in_channels, config.sample_size,
        config.sample_size, config.num_classes,
    )  # fmt: skip
    if vae.config.latent_channels != config.in_channels:
        raise InputError(
            f"the network expects latents with {config.in_channels} channels, but those of {job.vae} have "
            f"{vae.config.latent_channels}; give the --vae that the network was trained with"
        )
    names, wnids = read_class_names(job.class_names, config.num_classes)
    normalization = set_normalization(vae, is_improved=source.is_improved)
    logger.info("latents are normalized with mean %s and standard deviation %s", normalization.mean, normalization.std)
    pipeline = build_pipeline(
        network.eval(),
        vae,
        names,
        wnids=wnids,
        prediction="velocity" if source.is_flow_matching else "average_velocity",
        sampling=published_sampling(network, is_improved=source.is_improved),
    )
    _write(pipeline, output, portable=job.portable)
    return output, network.num_parameters()


def read_class_names(path: Path | None, num_classes: int) -> tuple[list[str], list[str]]:
    """One name per class, and one WordNet id per class if every line begins with one (otherwise no ids).

    Raises InputError if the file cannot be read or does not have one name per class.
    """
    if path is None:
        return [f"class {label}" for label in range(num_classes)], []
    try:
        names = [line.strip() for line in path.expanduser().read_text().rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read class names from {path}: {error}") from error
    if len(names) != num_classes or not all(names):
        raise InputError(
            f"{path} must have one name per line for each of the network's {num_classes} classes, "
            f"but has {len(names)} lines, {names.count('')} of them empty"
        )
    matches = [match for name in names if (match := re.fullmatch(r"(n\d{8})\s+(.*)", name))]
    if len(matches) < len(names):
        return names, []
    return [match[2] for match in matches], [match[1] for match in matches]


def published_sampling(network: NetworkModel, *, is_improved: bool) -> SamplingConfig:
    """The authors' sampling settings for a network of this size; no guidance for an unpublished size."""
    published = published_training(network.config.hidden_size, network.config.depth, is_improved=is_improved)
    return SamplingConfig() if published is None else published.sampling


def set_normalization(vae: Autoencoder, *, is_improved: bool) -> LatentNormalization:
    """Sets and returns the latent normalization in the VAE's config.

    Improved MeanFlow normalizes Stable Diffusion's latents per channel, but that VAE's config has a single scale.
    Raises InputError if the config has no normalization.
    """
    config = vae.config
    is_stable_diffusion = config.latent_channels == 4 and config.get("scaling_factor") == SD_SCALING_FACTOR
    is_per_channel = config.get("latents_mean") is not None or config.get("latents_std") is not None
    if is_improved and not is_per_channel:
        if is_stable_diffusion:
            vae.register_to_config(latents_mean=list(SD_VAE_FT_MSE_MEAN), latents_std=list(SD_VAE_FT_MSE_STD))
            logger.info("set the per-channel latent normalization of improved MeanFlow in the VAE's config")
        else:
            logger.warning(
                "improved MeanFlow was trained on latents normalized per channel, but this VAE has a single scale"
            )
    try:
        return LatentNormalization.from_vae_config(vae.config)
    except ValueError as error:
        raise InputError(str(error)) from error


def _new_folder(location: str) -> Path:
    """The output folder. Raises InputError if it exists or is not on a local disk."""
    if not storage.is_local(location):
        raise InputError(f"--output must be a folder on a local disk, but got {location}")
    output = Path(storage.output_location(location, "--output"))
    if output.exists():
        raise InputError(f"--output {output} exists already; choose another, or remove it")
    return output


def _write(pipeline: MeanFlowPipeline, output: Path, *, portable: bool) -> None:
    """Writes the generator to a temporary folder and renames it, so that a failure leaves no partial generator."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
            folder = Path(scratch) / "generator"
            save_generator(pipeline, folder, portable=portable)
            os.rename(folder, output)
    except OSError as error:
        raise InputError(f"cannot write the generator to {output}: {error}") from error
