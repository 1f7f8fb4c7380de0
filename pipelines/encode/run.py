"""Stage 1: images -> VAE latents, on every device of the cluster, with Ray Data.

    python -m pipelines.encode --images ILSVRC/train --output latents --vae stabilityai/sd-vae-ft-mse --image-size 256

The index of images is cut into shards once and for all: shard k is a pure function of the source's files. CPU tasks
read and decode a shard's images, an actor per accelerator encodes them, and CPU tasks write the shard under its own
name, whole or not at all: each of the three scales alone, and an accelerator waits for no storage. So a job that was
killed goes on where it stopped, a task that ran twice wrote the same file, and the manifest, written last, makes it a
dataset.
"""

import collections
import contextlib
import json
import logging
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
from diffusers import AutoencoderKL
from pyarrow import fs

from meanflow_core.autoencoder import allow_tf32, downsampling_factor, encode_moments, load_autoencoder, weight_hash
from pipelines import latent_store, storage
from pipelines.command import InputError, choose_gpus, num_gpus, parse_command_line, run_command, start_ray
from pipelines.image_reading import CROP, decode_images
from pipelines.image_sources import Format, ImageIndex, ImageSlice, Listing, index_images, list_images
from pipelines.latent_store import EncodingRecipe, Manifest
from pipelines.progress import Progress, format_seconds

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FOOTER_READERS = 16  # threads: an object store answers slowly, and many at once


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """Encode images into a latent dataset. The same command again finishes what is missing."""

    images: str
    """Class folders such as ImageNet's train/, Parquet or WebDataset files: a folder, or a pattern such as
    "data/train-*.parquet"; a path or URI."""
    output: str
    """Folder of the latent dataset: a path or URI."""
    vae: str
    """Autoencoder: a hub id such as stabilityai/sd-vae-ft-mse, or a folder."""
    format: Format | None = None
    """Of the images; told by looking unless named."""
    image_size: int = 256
    """Side of the square that images are cropped to, in pixels."""
    mirror: bool = True
    """Encode the mirror images too: a latent cannot be mirrored."""
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "tf32"
    """In which the autoencoder runs; tf32 is float32 where there are no tensor cores."""
    compile: bool = False
    """Compile the autoencoder (torch.compile)."""
    batch_size: int | None = None
    """Images per call of the autoencoder; chosen for the device unless given."""
    num_encoders: int | None = None
    """Actors that encode; one per GPU, or one per CPU of machines without."""
    encoders_per_gpu: int = 1
    """Actors that share a GPU."""
    use_gpu: bool | None = None
    """Encode on GPUs; where the cluster has some, unless said."""
    rows_per_shard: int = 512
    """Images per shard; fewer where the images are large."""
    max_rejected_fraction: float = 0.001
    """Share of unreadable images above which there is no dataset in the end, though all work is kept."""
    limit: int | None = None
    """Encode so many images, spread evenly over the source, for a trial."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "rows_per_shard", "num_encoders", "encoders_per_gpu", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}")
        if not 0.0 <= self.max_rejected_fraction <= 1.0:
            raise ValueError(f"max_rejected_fraction must lie in [0, 1], but got {self.max_rejected_fraction}")


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
        vae = latent_store.open_autoencoder(dataset, DTYPES[precision])
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
    path = f"{root}/{latent_store.shard_name(shard)}"
    # A task of a driver that was killed may still be at work on a shard that another has finished since.
    if filesystem.get_file_info(path).type == fs.FileType.NotFound:
        content = latent_store.shard_bytes(
            moments, mirrored, batch["label"][good], list(batch["sample_id"][good]), rejected
        )
        storage.write_bytes(filesystem, path, content)
    return {"images": np.array([int(good.sum())]), "rejected": np.array([len(rejected)])}


def _recipe(job: EncodeJob, listing: Listing, vae: AutoencoderKL) -> EncodingRecipe:
    factor = downsampling_factor(vae)
    if job.image_size % factor:
        raise InputError(f"--image-size must be a multiple of {factor} for this autoencoder, but got {job.image_size}")
    side = job.image_size // factor
    # A shard of pixels should stay below Ray Data's block size of 128 MiB.
    rows_that_fit = max(1, 96 * 2**20 // (3 * job.image_size**2))
    return EncodingRecipe(
        vae_id=job.vae,
        vae_sha256=weight_hash(vae),
        moments_shape=(2 * vae.config.latent_channels, side, side),
        image_size=job.image_size,
        crop=CROP,
        source_sha256=listing.sha256,
        rows_per_shard=min(job.rows_per_shard, rows_that_fit),
        mirrored=job.mirror,
        precision=job.precision,
        limit=job.limit,
    )


@dataclass(frozen=True)
class Plan:
    """What is to be encoded, cut into shards."""

    filesystem: fs.FileSystem
    """Where the images lie."""
    listing: Listing
    """In which files."""
    index: ImageIndex
    """Where in those."""
    recipe: EncodingRecipe
    """How they are encoded."""

    @property
    def num_images(self) -> int:
        """Images of the index that are to be encoded."""
        return min(self.recipe.limit or len(self.index), len(self.index))

    @property
    def num_shards(self) -> int:
        """Files that they make."""
        return -(-self.num_images // self.recipe.rows_per_shard)

    def rows(self, shard: int) -> np.ndarray:
        """Rows of the index that shard number `shard` holds, int64."""
        first = shard * self.recipe.rows_per_shard
        wanted = np.arange(first, min(first + self.recipe.rows_per_shard, self.num_images))
        return wanted * len(self.index) // self.num_images

    def images(self, shard: int) -> ImageSlice:
        """Its images."""
        return ImageSlice.of(self.filesystem, self.listing, self.index, self.rows(shard))


def _refuse_other_recipe(output: str, recipe: EncodingRecipe) -> bool:
    """Whether the output was begun; raises InputError where that was with another recipe."""
    filesystem, root = storage.open_storage(output)
    path = f"{root}/{latent_store.RECIPE}"
    if filesystem.get_file_info(path).type == fs.FileType.NotFound:
        return False
    begun = json.loads(storage.read_bytes(filesystem, path))
    wanted = json.loads(json.dumps(asdict(recipe)))
    different = [name for name in wanted if name != "vae_id" and begun.get(name) != wanted[name]]
    if different:
        changes = "; ".join(f"{name} {begun.get(name)} there, {wanted[name]} now" for name in different)
        raise InputError(f"{output} was begun in another way ({changes}); name another --output, or delete it")
    return True


def _begin(output: str, plan: Plan, vae: AutoencoderKL) -> None:
    """Writes what every worker needs, and last the recipe, which says that it is all there."""
    filesystem, root = storage.open_storage(output)
    with tempfile.TemporaryDirectory() as folder:
        vae.save_pretrained(folder)
        for path in Path(folder).iterdir():
            storage.write_bytes(filesystem, f"{root}/vae/{path.name}", path.read_bytes())
    index = plan.index.to_bytes(plan.recipe.source_sha256)
    storage.write_bytes(filesystem, f"{root}/{latent_store.INDEX}", index)
    recipe = json.dumps(asdict(plan.recipe), indent=2) + "\n"
    storage.write_bytes(filesystem, f"{root}/{latent_store.RECIPE}", recipe.encode())


def _stored_index(output: str, source_sha256: str) -> ImageIndex | None:
    filesystem, root = storage.open_storage(output)
    with contextlib.suppress(FileNotFoundError):
        return ImageIndex.from_bytes(storage.read_bytes(filesystem, f"{root}/{latent_store.INDEX}"), source_sha256)
    return None


def _start_ray(job: EncodeJob) -> None:
    # An encoder per CPU, and logical ones beside for decoding and writing.
    start_ray(needed_cpus=(job.num_encoders or os.cpu_count() or 1) + 1)


def _map_on_cluster(function: Callable[[Any], Any], items: list) -> Iterable:
    """`map` of tasks on the cluster, with progress."""
    task = ray.remote(num_cpus=0.5)(lambda item: function(item))
    progress = Progress(logger, "indexed", "files", len(items))
    for done, reference in enumerate([task.remote(item) for item in items], start=1):
        try:
            yield ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        progress.update(done)


def _missing_shards(output: str, num_shards: int) -> list[int]:
    filesystem, root = storage.open_storage(output)
    selector = fs.FileSelector(f"{root}/shards", allow_not_found=True)
    present = {entry.path[len(root) + 1 :] for entry in filesystem.get_file_info(selector)}
    return [shard for shard in range(num_shards) if latent_store.shard_name(shard) not in present]


def _default_encoders(job: EncodeJob) -> int:
    """As many as the GPUs in use hold; else one per CPU, which Ray gives one thread each.

    Threads of one process wait for each other at every layer: while decoding takes turns on their cores, two of them
    are slower than one.
    """
    if job.use_gpu is not False and num_gpus() > 0:
        return num_gpus() * job.encoders_per_gpu
    return max(1, _num_cpus() - 1)


def _num_cpus() -> int:
    """Logical CPUs of the cluster in use; one of them is for decoding and writing."""
    return int(ray.cluster_resources().get("CPU", 1))


def _encode_shards(job: EncodeJob, plan: Plan, shards: list[int]) -> None:
    num_encoders = job.num_encoders or _default_encoders(job)
    use_gpu = choose_gpus(job.use_gpu, -(-num_encoders // job.encoders_per_gpu))
    if not use_gpu and num_encoders >= _num_cpus():
        logger.warning(
            "%d encoders want a CPU each, and decoding one more, but the cluster has %d: nothing happens until it grows; "
            "if it does not, name a smaller --num-encoders",
            num_encoders, _num_cpus(),
        )  # fmt: skip
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = None  # one shard, one block
    chunks = [{"shard": shard, "images": pickle.dumps(plan.images(shard))} for shard in shards]
    decode: Callable[..., dict[str, np.ndarray]] = decode_shard
    write: Callable[..., dict[str, np.ndarray]] = write_shard
    written = (
        ray.data.from_items(chunks, override_num_blocks=len(chunks))
        .map_batches(
            decode,
            batch_size=1,
            # Half a CPU, as much of it is waiting for storage; and unlike the encoder's share, or Ray Data would fuse
            # both into the encoder's actors, where decoding could not scale alone.
            num_cpus=0.5,
            fn_kwargs={"image_size": job.image_size},
        )
        .map_batches(
            EncodeShard,
            batch_size=None,
            fn_constructor_args=(job.output, "cuda" if use_gpu else "cpu"),
            fn_constructor_kwargs={
                "precision": job.precision,
                "compiled": job.compile,
                "mirror": job.mirror,
                "batch_size": job.batch_size,
            },
            compute=ray.data.ActorPoolStrategy(size=num_encoders),
            num_gpus=1 / job.encoders_per_gpu if use_gpu else 0,
            num_cpus=0 if use_gpu else 1,
        )
        .map_batches(write, batch_size=None, num_cpus=0.25, fn_kwargs={"output": job.output})
    )
    done = plan.num_images - sum(len(plan.rows(shard)) for shard in shards)
    progress = Progress(logger, "encoded", "images", plan.num_images, start=done)
    rejected = 0
    for row in written.iter_rows():
        done += int(row["images"] + row["rejected"])
        rejected += int(row["rejected"])
        progress.update(done, f"{rejected} rejected" if rejected else "")


def _commit(job: EncodeJob, plan: Plan) -> Manifest:
    """Writes the list of rejected images, and the manifest if these are few enough."""
    filesystem, root = storage.open_storage(job.output)
    missing = _missing_shards(job.output, plan.num_shards)
    if missing:
        raise InputError(
            f"{len(missing)} shards were written, but are not in {job.output}; with several nodes, --output must be "
            f"storage that all of them share"
        )
    paths = [f"{root}/{latent_store.shard_name(shard)}" for shard in range(plan.num_shards)]
    try:
        with ThreadPoolExecutor(FOOTER_READERS) as readers:
            shards = list(readers.map(lambda path: latent_store.shard_summary(filesystem, path), paths))
    except InputError as error:
        raise InputError(f"{error}; delete it and run again") from error
    for number, shard in enumerate(shards):
        found, wanted = shard.num_rows + len(shard.rejected), len(plan.rows(number))
        if found != wanted:
            raise InputError(
                f"{paths[number]} is of {found} images, but of {wanted} in the plan; delete it and run again"
            )
    rejected = [row for shard in shards for row in shard.rejected]
    for row in rejected[:20]:
        logger.warning("rejected %s: %s", row["sample_id"], row["reason"])
    if len(rejected) == plan.num_images:
        filesystem.delete_dir(f"{root}/shards")  # so that the same command tries again
        raise InputError(f"none of the {len(rejected)} images in {job.images} can be read: {rejected[0]['reason']}")
    storage.write_bytes(filesystem, f"{root}/{latent_store.REJECTED}", latent_store.rejected_bytes(rejected))
    share = len(rejected) / plan.num_images
    if share > job.max_rejected_fraction:
        kinds = collections.Counter(row["reason"].split(":")[0] for row in rejected).most_common(3)
        raise InputError(
            f"{len(rejected)} of {plan.num_images} images ({share:.2%}) cannot be read, more than --max-rejected-fraction "
            f"{job.max_rejected_fraction:g} allows ({', '.join(f'{count} {kind}' for kind, count in kinds)}); they are "
            f"listed in {job.output}/{latent_store.REJECTED}. All else is encoded: with a larger fraction the same "
            f"command only finishes"
        )
    manifest = Manifest(
        recipe=plan.recipe,
        num_samples=sum(shard.num_rows for shard in shards),
        num_rejected=len(rejected),
        shard_rows=[shard.num_rows for shard in shards],
        shard_sha256=[shard.sha256 for shard in shards],
        class_names=plan.index.class_names,
        wnids=plan.index.wnids,
        source=job.images,
    )
    storage.write_bytes(filesystem, f"{root}/{latent_store.MANIFEST}", manifest.to_json().encode())
    storage.delete_partial(filesystem, f"{root}/shards")
    return manifest


def encode(job: EncodeJob) -> Manifest:
    """Runs the job, or the rest of it, and returns the manifest. Raises InputError for input that cannot be."""
    vae_location = storage.absolute(job.vae) if Path(job.vae).expanduser().exists() else job.vae
    output = storage.output_location(job.output, "--output")
    job = replace(job, images=storage.absolute(job.images), output=output, vae=vae_location)
    filesystem, listing = list_images(job.images, job.format)
    try:
        vae = load_autoencoder(job.vae)
    except ValueError as error:
        raise InputError(str(error)) from error
    recipe = _recipe(job, listing, vae)
    is_begun = _refuse_other_recipe(job.output, recipe)
    if is_begun and latent_store.is_complete(job.output):
        manifest = latent_store.read_manifest(job.output)
        logger.info("%s is complete: %d samples", job.output, manifest.num_samples)
        return manifest
    index = _stored_index(job.output, listing.sha256)
    if index is None and listing.format != "folders":
        _start_ray(job)
        index = index_images(filesystem, listing, _map_on_cluster)
    elif index is None:
        index = index_images(filesystem, listing)
    plan = Plan(filesystem, listing, index, recipe)
    if not is_begun:
        _begin(job.output, plan, vae)
    missing = _missing_shards(job.output, plan.num_shards)
    logger.info(
        "%d images of %d classes (%s), %d of %d shards to do",
        plan.num_images, len(index.class_names), listing.format, len(missing), plan.num_shards,
    )  # fmt: skip
    began = time.monotonic()
    if missing:
        _start_ray(job)
        _encode_shards(job, plan, missing)
    manifest = _commit(job, plan)
    _summarize(job, plan, manifest, sum(len(plan.rows(shard)) for shard in missing), time.monotonic() - began)
    return manifest


def _summarize(job: EncodeJob, plan: Plan, manifest: Manifest, num_encoded: int, seconds: float) -> None:
    recipe = manifest.recipe
    size = manifest.num_samples * (1 + recipe.mirrored) * int(np.prod(recipe.moments_shape)) * 2
    logger.info(
        "%d samples of %d classes, %d rejected; moments %s float16%s, %.2f GB in %d shards; %d images in %s, %.1f images/s",
        manifest.num_samples, len(manifest.class_names), manifest.num_rejected,
        "x".join(map(str, recipe.moments_shape)), " and their mirror images'" if recipe.mirrored else "",
        size / 1e9, plan.num_shards, num_encoded, format_seconds(seconds), num_encoded / max(seconds, 1e-9),
    )  # fmt: skip


def main() -> None:
    """The command."""
    job = parse_command_line(EncodeJob, __doc__)
    encode(job)
    print(f"latent dataset: {job.output}; look at it with: python -m pipelines.check --data {job.output}")


if __name__ == "__main__":
    run_command(main)
