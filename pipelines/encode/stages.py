"""The steps of encoding a shard: decode, encode, write."""

import logging
import pickle

import numpy as np
import torch
from diffusers import AutoencoderKL
from pyarrow import fs

from meanflow_core.autoencoder import allow_tf32, encode_moments
from pipelines import storage
from pipelines.encode.job import DTYPES
from pipelines.images.decoding import decode_images
from pipelines.images.sources import ImageSlice
from pipelines.latents.manifest import open_autoencoder, shard_name
from pipelines.latents.shards import shard_bytes

logger = logging.getLogger(__name__)


def decode_shard(batch: dict[str, np.ndarray], *, image_size: int) -> dict[str, np.ndarray]:
    """Reads and decodes the images of one shard; an unreadable one becomes a black image with its reason in `error`.

    batch: {"shard": [number], "images": [pickled ImageSlice]}. Raises what storage raises where it fails.
    """
    images: ImageSlice = pickle.loads(batch["images"][0])  # our own, from this job's driver
    count = len(images.entries)
    pixels = np.zeros((count, image_size, image_size, 3), dtype=np.uint8)
    errors = [""] * count
    for row, image in enumerate(decode_images(images, image_size)):
        if isinstance(image, Exception):
            errors[row] = f"{type(image).__name__}: {image}"
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
    """Encodes decoded shards on one device. A plain callable: it needs no cluster."""

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
        """A shard of pixels, as `decode_shard` gives it -> the same with moments float16 (N, 2C, H, W) for pixels."""
        pixels = batch["pixels"]
        if self._batch_size is None:
            self._batch_size = choose_batch_size(self._vae, self._on_device(pixels[:1]))
        while True:
            try:
                moments = self._encode(pixels)
                break
            except torch.OutOfMemoryError:
                if self._batch_size == 1:
                    raise
                self._batch_size = max(1, self._batch_size // 2)
                logger.warning("out of memory; going on with %d images at a time", self._batch_size)
        names = ("moments", "moments_mirrored")[: 1 + self._mirror]
        rest = {name: batch[name] for name in ("shard", "label", "sample_id", "error")}
        return {**rest, **dict(zip(names, moments, strict=True))}

    def _on_device(self, pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(pixels.copy()).to(self._device, non_blocking=True)  # Ray's own cannot be written to

    def _encode(self, pixels: np.ndarray) -> list[np.ndarray]:
        found: list[list[torch.Tensor]] = [[] for _ in range(1 + self._mirror)]
        assert self._batch_size is not None
        # One wait for the device at the end: until then it has always something to do.
        for start in range(0, len(pixels), self._batch_size):
            images = self._on_device(pixels[start : start + self._batch_size])
            for is_mirrored, of_kind in enumerate(found):
                of_kind.append(encode_moments(self._vae, images.flip(2) if is_mirrored else images).half())
        return [torch.cat(of_kind).cpu().numpy() for of_kind in found]


def choose_batch_size(vae: AutoencoderKL, image: torch.Tensor) -> int:
    """Images per call, for the device of `image`, uint8 (1, H, W, 3).

    On a GPU as many as half of its free memory holds, by the memory that one image takes; at most 128, where even the
    largest is busy. On a CPU the pixels of eight 256x256 images: more gains nothing and costs memory.
    """
    if image.device.type != "cuda":
        return max(1, min(64, 8 * 256**2 // (image.shape[1] * image.shape[2])))
    torch.cuda.reset_peak_memory_stats(image.device)
    before = torch.cuda.memory_allocated(image.device)
    encode_moments(vae, image)
    of_one = torch.cuda.max_memory_allocated(image.device) - before
    free, _ = torch.cuda.mem_get_info(image.device)
    return max(1, min(128, 1 << max(0, int(free / 2 / max(of_one, 1)).bit_length() - 1)))


def write_shard(batch: dict[str, np.ndarray], *, output: str) -> dict[str, np.ndarray]:
    """Writes the shard that `EncodeShard` gave; returns {"images": [number], "rejected": [number]}.

    An image whose moments float16 cannot hold is rejected too. A shard that is there already stays as it is.
    """
    shard = int(batch["shard"][0])
    assert (batch["shard"] == shard).all(), "a block must hold one shard"
    errors = batch["error"].astype(object)
    tensors = [batch[name] for name in ("moments", "moments_mirrored") if name in batch]
    finite = np.all([np.isfinite(array).all(axis=(1, 2, 3)) for array in tensors], axis=0)
    errors[~finite & (errors == "")] = "the autoencoder gave values that float16 cannot hold"
    good = errors == ""
    rejected = [
        {"sample_id": str(sample_id), "reason": str(error)}
        for sample_id, error in zip(batch["sample_id"][~good], errors[~good], strict=True)
    ]
    moments, mirrored = [*(array[good] for array in tensors), None][:2]
    filesystem, root = storage.open_storage(output)
    path = f"{root}/{shard_name(shard)}"
    # A task of a driver that was killed may still be at work on a shard that another has finished since.
    if filesystem.get_file_info(path).type == fs.FileType.NotFound:
        content = shard_bytes(moments, mirrored, batch["label"][good], list(batch["sample_id"][good]), rejected)
        storage.write_bytes(filesystem, path, content)
    return {"images": np.array([int(good.sum())]), "rejected": np.array([len(rejected)])}
