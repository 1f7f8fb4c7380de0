"""A public checkpoint -> a generator, as training leaves one, for sampling, measuring and serving.

    python -m pipelines.convert --source sit --checkpoint SiT-XL-2-256.pt --output build/sit --vae stabilityai/sd-vae-ft-mse

Sources: official-meanflow and official-imf (the authors' Flax parameters, as .npz or msgpack), imf-torch, sit, repa and
zhuyu-cs. The network's size is read from the file; a file that does not fit is refused with all its differences, and
none is opened in a way that could run code in it.
"""

import logging
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL

from meanflow_core.autoencoder import load_autoencoder
from meanflow_core.config import SamplingConfig
from meanflow_core.generator import build_pipeline, save_generator
from meanflow_core.interop import convert_checkpoint, find_source, published_training, read_checkpoint
from meanflow_core.latents import SD_SCALING_FACTOR, SD_VAE_FT_MSE_MEAN, SD_VAE_FT_MSE_STD, LatentNormalization
from meanflow_core.networks import AnyNetwork
from meanflow_core.pipeline import MeanFlowPipeline
from pipelines import storage
from pipelines.command_line import parse_command_line, run_command
from pipelines.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConvertJob:
    """One conversion."""

    source: str
    """Where the checkpoint comes from: official-meanflow, official-imf, imf-torch, sit, repa or zhuyu-cs."""
    checkpoint: Path
    """The file: .npz, .safetensors, .pt, .pth, .ckpt or .bin; with any other ending, Flax's msgpack."""
    output: str
    """Folder for the generator; must not exist."""
    vae: str
    """Autoencoder whose latents the network knows: a hub id or folder."""
    class_names: Path | None = None
    """File of class names, a line each, in the order of the ids; each may begin with its WordNet id, as in ImageNet's
    LOC_synset_mapping.txt. "class 0" and so on unless given."""
    use_ema: bool = True
    """Of a whole training state, take the moving average; else the parameters that the optimiser had."""
    sample_size: int | None = None
    """Side of the latents, where the file does not tell; 32 unless given."""
    num_heads: int | None = None
    """Attention heads, which no file tells; those of the published size unless given."""
    portable: bool = False
    """Write the generator with its code, to open with diffusers alone (trust_remote_code=True)."""


def read_class_names(path: Path | None, num_classes: int) -> tuple[list[str], list[str]]:
    """One name a class, and one WordNet id where every line begins with one.

    Raises InputError where the file cannot be read, or has another number of names.
    """
    if path is None:
        return [f"class {label}" for label in range(num_classes)], []
    try:
        names = [line.strip() for line in path.expanduser().read_text().rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read class names from {path}: {error}") from error
    if len(names) != num_classes or not all(names):
        raise InputError(
            f"{path} must have one name a line for each of the network's {num_classes} classes, "
            f"but has {len(names)} lines, {names.count('')} of them empty"
        )
    with_wnid = [re.fullmatch(r"(n\d{8})\s+(.*)", name) for name in names]
    found = [match for match in with_wnid if match]
    if len(found) < len(names):
        return names, []
    return [match[2] for match in found], [match[1] for match in found]


def published_sampling(network: AnyNetwork, architecture: str) -> SamplingConfig:
    """How the authors sample a network of this size; without guidance where it is none of theirs."""
    published = published_training(architecture, network.config.hidden_size, network.config.depth)
    return SamplingConfig() if published is None else published.sampling


def set_normalization(vae: AutoencoderKL, architecture: str) -> LatentNormalization:
    """The normalisation of latents that the generator's VAE will state.

    Improved MeanFlow's networks want the VAE of Stable Diffusion normalised per channel; it states one scale for all.
    Raises InputError where the VAE states none.
    """
    config = vae.config
    is_stable_diffusion = config.latent_channels == 4 and config.scaling_factor == SD_SCALING_FACTOR
    states_channels = config.latents_mean is not None or config.latents_std is not None
    if architecture == "imf_dit" and not states_channels:
        if is_stable_diffusion:
            vae.register_to_config(latents_mean=list(SD_VAE_FT_MSE_MEAN), latents_std=list(SD_VAE_FT_MSE_STD))
            logger.info("set the VAE's normalisation per channel, which improved MeanFlow's networks learnt with")
        else:
            logger.warning(
                "improved MeanFlow's networks learnt with latents normalised per channel, and this VAE has one scale"
            )
    try:
        return LatentNormalization.from_vae_config(vae.config)
    except ValueError as error:
        raise InputError(str(error)) from error


def write_generator(pipeline: MeanFlowPipeline, output: Path, *, portable: bool) -> None:
    """Writes a generator's folder beside its place, and moves it there whole. Raises InputError where it cannot."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
            folder = Path(scratch) / "generator"
            save_generator(pipeline, folder, portable=portable)
            os.rename(folder, output)
    except OSError as error:
        raise InputError(f"cannot write the generator to {output}: {error}") from error


def _check_output(location: str) -> Path:
    if not storage.is_local(location):
        raise InputError(f"--output must be a folder on a local disk, but got {location}")
    output = Path(storage.output_location(location, "--output"))
    if output.exists():
        raise InputError(f"--output {output} exists already; choose another, or remove it")
    return output


def convert(job: ConvertJob) -> int:
    """Writes the generator and returns its network's number of parameters. Raises InputError for input that cannot be."""
    output = _check_output(job.output)
    checkpoint = job.checkpoint.expanduser()
    vae_location = storage.absolute(job.vae) if Path(job.vae).expanduser().exists() else job.vae
    try:
        source = find_source(job.source)
        vae = load_autoencoder(vae_location)
        state = read_checkpoint(checkpoint, use_ema=job.use_ema)
    except ValueError as error:
        raise InputError(str(error)) from error
    logger.info("read %d tensors from %s", len(state), checkpoint)
    try:
        network = convert_checkpoint(job.source, state, sample_size=job.sample_size, num_heads=job.num_heads)
    except ValueError as error:
        raise InputError(f"cannot convert {checkpoint}: {error}") from error
    size = network.config
    logger.info(
        "width %d, depth %d, %d heads, patches of %d, latents %dx%dx%d, %d classes",
        size.hidden_size, size.depth, size.num_heads, size.patch_size, size.in_channels, size.sample_size,
        size.sample_size, size.num_classes,
    )  # fmt: skip
    if vae.config.latent_channels != size.in_channels:
        raise InputError(
            f"the network is for latents of {size.in_channels} channels, but those of {job.vae} have "
            f"{vae.config.latent_channels}"
        )
    names, wnids = read_class_names(job.class_names, size.num_classes)
    normalization = set_normalization(vae, source.architecture)
    logger.info("latents are normalised by mean %s and deviation %s", normalization.mean, normalization.std)
    pipeline = build_pipeline(
        network.eval(),
        vae,
        names,
        wnids=wnids,
        is_flow_matching=source.is_flow_matching,
        sampling=published_sampling(network, source.architecture),
    )
    write_generator(pipeline, output, portable=job.portable)
    return network.num_parameters()


def main() -> None:
    """The command."""
    job = parse_command_line(ConvertJob, __doc__)
    num_parameters = convert(job)
    print(f"generator: {storage.absolute(job.output)} ({num_parameters:,} parameters)")


if __name__ == "__main__":
    run_command(main)
