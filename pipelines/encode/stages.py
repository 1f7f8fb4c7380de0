"""The stages of encoding a shard: decode, encode, write. Each is a callable that also runs without a cluster."""

import logging
import pickle

import numpy as np
import torch
from pyarrow import fs

from meanflow_core.autoencoder import Autoencoder, allow_tf32, encode_moments
from pipelines import storage
from pipelines.images.decoding import decode_images
from pipelines.images.sources import ImageSlice
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.manifest import shard_name
from pipelines.latents.shards import shard_bytes

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def decode_shard(batch: dict[str, np.ndarray], *, image_size: int, grey: bool = False) -> dict[str, np.ndarray]:
    """Reads and decodes the images of one shard. An unreadable image becomes black, with the reason in `error`.

    grey: also reject images with colours.

    batch: {"shard": [number], "images": [pickled ImageSlice]}. Storage errors are raised.
    """
    images: ImageSlice = pickle.loads(batch["images"][0])  # trusted: pickled by this job's driver
    count = len(images.entries)
    pixels = np.zeros((count, image_size, image_size, 3), dtype=np.uint8)
    errors = [""] * count
    for row, image in enumerate(decode_images(images, image_size)):
        if isinstance(image, Exception):
            errors[row] = f"{type(image).__name__}: {image}"
        elif grey and (image != image[..., :1]).any():
            errors[row] = "the image has colours, but the dataset is grey; encode without --grey"
        else:
            pixels[row] = image
    return {
        "shard": np.full(count, batch["shard"][0]),
        "pixels": pixels,
        "label": images.entries["label"].to_numpy(),
        "sample_id": np.array(images.entries["sample_id"].to_pylist(), dtype=object),
        "error": np.array(errors, dtype=object),
    }


class EncodeShard:
    """Encodes decoded shards on one device with the dataset's autoencoder."""

    def __init__(
        self,
        dataset: str,
        device: str,
        *,
        precision: str = "float32",
        compiled: bool = False,
        mirror: bool = True,
        batch_size: int | None = None,
    ) -> None:
        self._device = torch.device(device)
        if precision == "tf32":
            allow_tf32()
        vae = open_autoencoder(dataset, DTYPES[precision])
        self._vae = vae.to(self._device, memory_format=torch.channels_last)
        if compiled:
            self._vae.encoder.compile(dynamic=False)
        self._mirror = mirror
        self._batch_size = batch_size

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Replaces the pixels of a decoded shard with moments, float16 (N, 2C, H, W). Halves the batch if out of memory."""
        pixels = batch["pixels"]
        if self._batch_size is None:
            self._batch_size = choose_batch_size(self._vae, self._to_device(pixels[:1]))
        while True:
            try:
                moments = self._encode(pixels, self._batch_size)
                break
            except torch.OutOfMemoryError:
                if self._batch_size == 1:
                    raise
                self._batch_size //= 2
                logger.warning("out of memory; continuing with %d images per batch", self._batch_size)
        names = ("moments", "moments_mirrored")[: len(moments)]
        unchanged = {name: batch[name] for name in ("shard", "label", "sample_id", "error")}
        return {**unchanged, **dict(zip(names, moments, strict=True))}

    def _to_device(self, pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(pixels.copy()).to(self._device, non_blocking=True)  # copied: Ray's arrays are read-only

    def _encode(self, pixels: np.ndarray, batch_size: int) -> list[np.ndarray]:
        """Returns the moments of the images and, if mirroring, those of the mirror images."""
        moments: list[list[torch.Tensor]] = [[] for _ in range(1 + self._mirror)]
        # Results stay on the device until the end, so that copies to the host do not interrupt encoding.
        for start in range(0, len(pixels), batch_size):
            images = self._to_device(pixels[start : start + batch_size])
            for is_mirrored, parts in enumerate(moments):
                parts.append(encode_moments(self._vae, images.flip(2) if is_mirrored else images).half())
        return [torch.cat(parts).cpu().numpy() for parts in moments]


def choose_batch_size(vae: Autoencoder, image: torch.Tensor) -> int:
    """Chooses the number of images per forward on the device of `image`, uint8 (1, H, W, 3).

    On a GPU: the largest power of two whose images fit into half of the free memory, judged by the measured memory of one
    image. At most 128, which keeps the largest GPUs busy. On a CPU: as many pixels as eight 256x256 images have, because
    larger batches need more memory and are not faster.
    """
    if image.device.type != "cuda":
        return max(1, min(64, 8 * 256**2 // (image.shape[1] * image.shape[2])))
    torch.cuda.reset_peak_memory_stats(image.device)
    before = torch.cuda.memory_allocated(image.device)
    encode_moments(vae, image)
    image_bytes = max(torch.cuda.max_memory_allocated(image.device) - before, 1)
    free_bytes, _ = torch.cuda.mem_get_info(image.device)
    return min(128, 1 << max(0, int(free_bytes / 2 / image_bytes).bit_length() - 1))


def write_shard(batch: dict[str, np.ndarray], *, output: str) -> dict[str, np.ndarray]:
    """Writes an encoded shard unless it exists. Returns {"images": [count], "rejected": [count]}.

    Unreadable images, and images whose moments overflow float16, go into the shard's list of rejected images.
    """
    shard = int(batch["shard"][0])
    assert (batch["shard"] == shard).all(), "a block must hold one shard"
    errors = batch["error"].astype(object)
    tensors = [batch[name] for name in ("moments", "moments_mirrored") if name in batch]
    is_finite = np.all([np.isfinite(array).all(axis=(1, 2, 3)) for array in tensors], axis=0)
    errors[~is_finite & (errors == "")] = "the autoencoder's output overflows float16"
    is_valid = errors == ""
    rejected = [
        {"sample_id": str(sample_id), "reason": str(error)}
        for sample_id, error in zip(batch["sample_id"][~is_valid], errors[~is_valid], strict=True)
    ]
    mirrored = batch["moments_mirrored"][is_valid] if "moments_mirrored" in batch else None
    filesystem, root = storage.open_storage(output)
    path = f"{root}/{shard_name(shard)}"
    # A task of a killed driver may still be running and get here after a later driver's task wrote the shard.
    if filesystem.get_file_info(path).type == fs.FileType.NotFound:
        moments, ids = batch["moments"][is_valid], list(batch["sample_id"][is_valid])
        storage.write_bytes(filesystem, path, shard_bytes(moments, mirrored, batch["label"][is_valid], ids, rejected))
    return {"images": np.array([int(is_valid.sum())]), "rejected": np.array([len(rejected)])}
