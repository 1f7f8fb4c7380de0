"""The autoencoder: loading, encoding images to moments, decoding latents to images; TF32 settings and weight hashes.

B batch, C latent channels, H W latent size, f pixels per latent pixel along a side (8 in Stable Diffusion's VAE).
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, ModelMixin

from meanflow_core.latents import LatentNormalization
from meanflow_core.pixels import PixelAutoencoder

PointAutoencoder: TypeAlias = AutoencoderDC | AutoencoderTiny  # without a posterior: an image has one latent
Autoencoder: TypeAlias = AutoencoderKL | PointAutoencoder | PixelAutoencoder
AUTOENCODERS: tuple[type[ModelMixin], ...] = (AutoencoderKL, AutoencoderDC, AutoencoderTiny, PixelAutoencoder)


def load_autoencoder(id_or_folder: str, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """Loads an autoencoder for inference, from a folder or by the hub id of an AutoencoderKL ("stabilityai/sd-vae-ft-mse").

    A folder may contain any of AUTOENCODERS. Raises ValueError if it cannot be loaded.
    """
    folder, model_class = Path(id_or_folder), AUTOENCODERS[0]
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ValueError(f"no config.json in {folder}; an autoencoder is a folder written by save_pretrained")
        model_class = _class_in(folder)
    return _load(model_class, id_or_folder, dtype, "an autoencoder")


def _class_in(folder: Path) -> type[ModelMixin]:
    try:
        name = json.loads((folder / "config.json").read_text()).get("_class_name", AutoencoderKL.__name__)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error}") from error
    # In a portable generator the name is [file, class].
    name = name[-1] if isinstance(name, list) else name
    for model_class in AUTOENCODERS:
        if model_class.__name__ == name:
            return model_class
    known = ", ".join(model_class.__name__ for model_class in AUTOENCODERS)
    raise ValueError(f"the autoencoder in {folder} must be one of {known}, but is {name}")


def load_preview_decoder(id_or_folder: str, dtype: torch.dtype = torch.float32) -> AutoencoderTiny:
    """Loads an AutoencoderTiny from a folder or by its hub id ("madebyollin/taesd" for Stable Diffusion's latents).

    Raises ValueError if it cannot be loaded.
    """
    return _load(AutoencoderTiny, id_or_folder, dtype, "an AutoencoderTiny")


def _load(model_class: type[ModelMixin], id_or_folder: str, dtype: torch.dtype, name: str) -> ModelMixin:
    # AutoencoderDC has no arguments for the statistics of each channel: diffusers warns of these entries, but keeps them.
    logger = logging.getLogger("diffusers.configuration_utils")
    logger.addFilter(_is_of_use)
    try:
        # low_cpu_mem_usage=True logs a warning if `accelerate` is not installed.
        model = model_class.from_pretrained(id_or_folder, dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"cannot load {name} from {id_or_folder!r}, as a folder or a hub id: {reason}") from error
    finally:
        logger.removeFilter(_is_of_use)
    return model.eval().requires_grad_(False)


def _is_of_use(record: logging.LogRecord) -> bool:
    return "latents_mean" not in record.getMessage()


def downsampling_factor(vae: Autoencoder) -> int:
    """Pixels per latent pixel along a side: 8 for Stable Diffusion's VAE."""
    # Not by isinstance: a portable generator has a PixelAutoencoder class of its own.
    if "factor" in vae.config:
        return int(vae.config.factor)
    # AutoencoderDC has no block_out_channels.
    channels = vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels
    return int(2 ** (len(channels) - 1))


def forbid_tf32() -> None:
    """Disables TF32 in matrix products and convolutions of this process; torch enables it for convolutions by default."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def allow_tf32() -> None:
    """Enables TF32 in this process: float32 products with 10-bit mantissas, several times faster on tensor cores."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def weight_hash(module: torch.nn.Module) -> str:
    """sha256 of names, dtypes, shapes and values of a module's state dict, independent of the device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def to_float_images(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]: x / 127.5 - 1."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 of shape (B, H, W, 3), but got {images.dtype} {tuple(images.shape)}")
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def to_uint8_images(images: torch.Tensor) -> torch.Tensor:
    """float (B, 3, H, W), nominally in [-1, 1] -> uint8 (B, H, W, 3): 127.5 x + 128, clamped and truncated.

    Source: DiT, SiT and the authors' MeanFlow code. Other roundings shift pixels by up to half a level.
    """
    return images.float().mul(127.5).add(128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@torch.no_grad()
def encode_moments(vae: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """Images uint8 (B, fH, fW, 3) on the VAE's device -> moments float32 (B, 2C, H, W): mean, standard deviation.

    The deviation of an autoencoder without a posterior, and of a PixelAutoencoder, is 0.
    """
    x = to_float_images(images).to(vae.dtype)
    if isinstance(vae, PointAutoencoder):
        latents = encode_points(vae, x).float()
        return torch.cat([latents, torch.zeros_like(latents)], dim=1)
    posterior = vae.encode(x).latent_dist
    return torch.cat([posterior.mean.float(), posterior.std.float()], dim=1)


def encode_points(vae: PointAutoencoder, images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, fH, fW) in [-1, 1] -> raw latents (B, C, H, W) of an autoencoder without a posterior."""
    encoded = vae.encode(images)
    return encoded.latent if isinstance(vae, AutoencoderDC) else encoded.latents


@torch.no_grad()
def decode_latents(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents (B, C, H, W) -> images uint8 (B, fH, fW, 3)."""
    raw = LatentNormalization.from_vae_config(vae.config).denormalize(latents.float())
    return to_uint8_images(vae.decode(raw.to(vae.dtype)).sample)


@torch.no_grad()
def reconstruct(vae: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """Encodes and decodes images uint8 (B, fH, fW, 3) at the posterior's mean: an upper bound on a generator's quality."""
    mean, _ = encode_moments(vae, images).chunk(2, dim=1)
    return decode_latents(vae, LatentNormalization.from_vae_config(vae.config).normalize(mean))


@torch.no_grad()
def decode_preview(tiny: AutoencoderTiny, vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents (B, C, H, W) -> images uint8 (B, fH, fW, 3), with a small, fast, approximate decoder.

    vae: the autoencoder of the latents. The small decoder expects latents with this VAE's shift_factor and
    scaling_factor applied, even if the generator normalises each channel separately.
    """
    raw = LatentNormalization.from_vae_config(vae.config).denormalize(latents.float())
    scaled = (raw - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    return to_uint8_images(tiny.decode(scaled.to(tiny.dtype)).sample)
