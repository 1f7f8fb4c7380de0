"""Stage 1: images -> VAE latents, on every device of the cluster, with Ray Data.

    python -m pipelines.encode --images ILSVRC/train --output latents --vae stabilityai/sd-vae-ft-mse --image-size 256

The sorted list of images is cut into shards once and for all: shard k is a pure function of the list. CPU tasks read
and decode a shard's files; an actor per accelerator encodes them and writes the shard under its own name, whole or not
at all. So a job that was interrupted goes on where it stopped, a task that ran twice wrote the same file, and the
manifest, written last, makes it a dataset.
"""

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from diffusers import AutoencoderKL
from pyarrow import fs

from meanflow_core.autoencoder import encode_moments, load_autoencoder, weight_hash
from pipelines import latent_store, storage
from pipelines.command import InputError, choose_gpus, num_gpus, parse_command_line, run_command, start_ray
from pipelines.image_reading import ImageFolder, decode_image, find_images
from pipelines.latent_store import EncodingRecipe, Manifest
from pipelines.progress import Progress

logger = logging.getLogger(__name__)

CROP = "adm_center_crop"


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """Encode a folder of class folders of images into a latent dataset."""

    images: str
    """Folder of class folders, as ImageNet's train/: a path or URI."""
    output: str
    """Folder of the latent dataset: a path or URI."""
    vae: str
    """Autoencoder: a hub id such as stabilityai/sd-vae-ft-mse, or a folder."""
    image_size: int = 256
    """Side of the square that images are cropped to, in pixels."""
    batch_size: int = 64
    """Images per call of the autoencoder."""
    num_encoders: int | None = None
    """Actors that encode; one per GPU, or one on a machine without."""
    use_gpu: bool | None = None
    """Encode on GPUs; where the cluster has some, unless said."""
    rows_per_shard: int = 512
    """Images per shard; fewer where the images are large."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "rows_per_shard", "num_encoders"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}")


def decode_shard(
    batch: dict[str, np.ndarray], *, filesystem: fs.FileSystem, root: str, image_size: int
) -> dict[str, np.ndarray]:
    """Reads and decodes the images of one shard; an unreadable one becomes a black image with its reason in `error`."""
    paths = [str(path) for path in batch["paths"][0]]
    pixels = np.zeros((len(paths), image_size, image_size, 3), dtype=np.uint8)
    errors = [""] * len(paths)
    for row, path in enumerate(paths):
        try:
            content = storage.read_bytes(filesystem, f"{root}/{path}")
        except (FileNotFoundError, PermissionError) as error:
            errors[row] = f"{type(error).__name__}: {error}"
            continue  # any other failure of storage fails the task: it must not reject an image that is fine
        try:
            pixels[row] = decode_image(content, image_size)
        except Exception as error:  # Pillow raises many kinds; whatever it is, it belongs to this one image
            errors[row] = f"{type(error).__name__}: {error}"
    return {
        "shard": np.full(len(paths), batch["shard"][0]),
        "pixels": pixels,
        "label": np.asarray(batch["labels"][0], dtype=np.int32),
        "sample_id": np.array([path.rsplit(".", 1)[0] for path in paths], dtype=object),
        "error": np.array(errors, dtype=object),
    }


class EncodeShard:
    """Encodes decoded shards on one device and writes them. A plain callable: it needs no cluster."""

    def __init__(
        self,
        vae_config: dict[str, Any],
        vae_state: dict[str, torch.Tensor],
        moments_shape: tuple[int, int, int],
        output: str,
        batch_size: int,
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vae = AutoencoderKL.from_config(vae_config)
        vae.load_state_dict(vae_state)
        self._vae = vae.eval().requires_grad_(False).to(self._device, memory_format=torch.channels_last)
        self._filesystem, self._root = storage.open_storage(output)
        self._moments_shape = moments_shape
        self._batch_size = batch_size

    def _moments(self, pixels: np.ndarray) -> np.ndarray:
        if len(pixels) == 0:
            return np.zeros((0, *self._moments_shape), dtype=np.float16)
        batches = torch.from_numpy(np.ascontiguousarray(pixels)).split(self._batch_size)
        moments = [encode_moments(self._vae, batch.to(self._device)).half().cpu() for batch in batches]
        return torch.cat(moments).numpy()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Writes the shard that `decode_shard` gave, and returns {"images": [number]}."""
        shard = int(batch["shard"][0])
        assert (batch["shard"] == shard).all(), "a block must hold one shard"
        good = batch["error"] == ""
        rejected = [
            {"sample_id": str(sample_id), "reason": str(error)}
            for sample_id, error in zip(batch["sample_id"][~good], batch["error"][~good], strict=True)
        ]
        pixels = batch["pixels"][good]
        moments, mirrored = self._moments(pixels), self._moments(pixels[:, :, ::-1])
        if not np.isfinite(moments).all() or not np.isfinite(mirrored).all():
            raise ValueError(f"the autoencoder gave values that float16 cannot hold in shard {shard}")
        content = latent_store.shard_bytes(
            moments, mirrored, batch["label"][good], list(batch["sample_id"][good]), rejected
        )
        storage.write_bytes(self._filesystem, f"{self._root}/{latent_store.shard_name(shard)}", content)
        return {"images": np.array([len(good)])}


def _recipe(job: EncodeJob, folder: ImageFolder, vae: AutoencoderKL) -> EncodingRecipe:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
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
        source_sha256=folder.sha256,
        rows_per_shard=min(job.rows_per_shard, rows_that_fit),
    )


def _refuse_other_recipe(output: str, recipe: EncodingRecipe) -> Manifest | None:
    """The manifest where the output is complete; raises InputError where it was begun with another recipe."""
    filesystem, root = storage.open_storage(output)
    path = f"{root}/recipe.json"
    if filesystem.get_file_info(path).type == fs.FileType.NotFound:
        return None
    begun = json.loads(storage.read_bytes(filesystem, path))
    wanted = json.loads(json.dumps(asdict(recipe)))
    different = [name for name in wanted if name != "vae_id" and begun.get(name) != wanted[name]]
    if different:
        changes = "; ".join(f"{name} {begun.get(name)} there, {wanted[name]} now" for name in different)
        raise InputError(f"{output} was begun in another way ({changes}); name another --output, or delete it")
    try:
        return latent_store.read_manifest(output)
    except InputError:
        return None


def _begin(output: str, recipe: EncodingRecipe, vae: AutoencoderKL) -> None:
    filesystem, root = storage.open_storage(output)
    with tempfile.TemporaryDirectory() as folder:
        vae.save_pretrained(folder)
        for path in Path(folder).iterdir():
            storage.write_bytes(filesystem, f"{root}/vae/{path.name}", path.read_bytes())
    storage.write_bytes(filesystem, f"{root}/recipe.json", (json.dumps(asdict(recipe), indent=2) + "\n").encode())


def _missing_shards(output: str, num_shards: int) -> list[int]:
    filesystem, root = storage.open_storage(output)
    selector = fs.FileSelector(f"{root}/shards", allow_not_found=True)
    present = {entry.path[len(root) + 1 :] for entry in filesystem.get_file_info(selector)}
    return [shard for shard in range(num_shards) if latent_store.shard_name(shard) not in present]


def _encode_shards(
    job: EncodeJob, recipe: EncodingRecipe, folder: ImageFolder, vae: AutoencoderKL, shards: list[int]
) -> None:
    rows = recipe.rows_per_shard
    source, root = storage.open_storage(job.images)
    num_encoders = job.num_encoders or max(1, num_gpus())
    use_gpu = choose_gpus(job.use_gpu, num_encoders)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = None  # one shard, one block
    chunks = [
        {
            "shard": shard,
            "paths": folder.paths[shard * rows : (shard + 1) * rows],
            "labels": folder.labels[shard * rows : (shard + 1) * rows],
        }
        for shard in shards
    ]
    vae_state = {name: tensor.cpu() for name, tensor in vae.state_dict().items()}
    decode: Callable[..., dict[str, np.ndarray]] = decode_shard
    written = (
        ray.data.from_items(chunks, override_num_blocks=len(chunks))
        .map_batches(
            decode,
            batch_size=1,
            # Half a CPU, as much of it is waiting for storage; and unlike the encoder's share, or Ray Data would fuse
            # both into the encoder's actors, where decoding could not scale alone.
            num_cpus=0.5,
            fn_kwargs={"filesystem": source, "root": root, "image_size": job.image_size},
        )
        .map_batches(
            EncodeShard,
            batch_size=None,
            fn_constructor_kwargs={
                "vae_config": dict(vae.config),
                "vae_state": vae_state,
                "moments_shape": recipe.moments_shape,
                "output": job.output,
                "batch_size": job.batch_size,
            },
            compute=ray.data.ActorPoolStrategy(size=num_encoders),
            num_gpus=1 if use_gpu else 0,
            num_cpus=0 if use_gpu else 1,
        )
    )
    total = len(folder.paths)
    done = total - sum(len(folder.paths[shard * rows : (shard + 1) * rows]) for shard in shards)
    progress = Progress(logger, "encoded", "images", total, start=done)
    for row in written.iter_rows():
        done += int(row["images"])
        progress.update(done)


def _commit(job: EncodeJob, recipe: EncodingRecipe, folder: ImageFolder, num_shards: int) -> Manifest:
    filesystem, root = storage.open_storage(job.output)
    missing = _missing_shards(job.output, num_shards)
    if missing:
        raise InputError(
            f"{len(missing)} shards were written, but are not in {job.output}; with several nodes, --output must be "
            f"storage that all of them share"
        )
    shards = [
        latent_store.shard_summary(filesystem, f"{root}/{latent_store.shard_name(shard)}")
        for shard in range(num_shards)
    ]
    rejected = [row for shard in shards for row in shard.rejected]
    for row in rejected[:20]:
        logger.warning("rejected %s: %s", row["sample_id"], row["reason"])
    if len(rejected) == len(folder.paths):
        filesystem.delete_dir(f"{root}/shards")  # so that the same command tries again
        raise InputError(f"none of the {len(folder.paths)} images in {job.images} can be read: {rejected[0]['reason']}")
    storage.write_bytes(filesystem, f"{root}/{latent_store.REJECTED}", latent_store.rejected_bytes(rejected))
    manifest = Manifest(
        recipe=recipe,
        num_samples=sum(shard.num_rows for shard in shards),
        num_rejected=len(rejected),
        shard_rows=[shard.num_rows for shard in shards],
        shard_sha256=[shard.sha256 for shard in shards],
        class_names=folder.class_names,
        wnids=folder.wnids,
        source=job.images,
    )
    storage.write_bytes(filesystem, f"{root}/{latent_store.MANIFEST}", manifest.to_json().encode())
    return manifest


def encode(job: EncodeJob) -> Manifest:
    """Runs the job, or the rest of it, and returns the manifest. Raises InputError for input that cannot be."""
    vae_location = storage.absolute(job.vae) if Path(job.vae).expanduser().exists() else job.vae
    output = storage.output_location(job.output, "--output")
    job = replace(job, images=storage.absolute(job.images), output=output, vae=vae_location)
    _, folder = find_images(job.images)
    try:
        vae = load_autoencoder(job.vae)
    except ValueError as error:
        raise InputError(str(error)) from error
    recipe = _recipe(job, folder, vae)
    complete = _refuse_other_recipe(job.output, recipe)
    if complete is not None:
        logger.info("%s is complete: %d samples", job.output, complete.num_samples)
        return complete
    num_shards = -(-len(folder.paths) // recipe.rows_per_shard)
    _begin(job.output, recipe, vae)
    missing = _missing_shards(job.output, num_shards)
    logger.info(
        "%d images of %d classes, %d of %d shards to do", len(folder.paths), len(folder.wnids), len(missing), num_shards
    )
    if missing:
        start_ray(needed_cpus=(job.num_encoders or 1) + 1)
        _encode_shards(job, recipe, folder, vae, missing)
    return _commit(job, recipe, folder, num_shards)


def main() -> None:
    """The command."""
    job = parse_command_line(EncodeJob, __doc__)
    manifest = encode(job)
    logger.info(
        "wrote %d samples (%d rejected), moments %s, into %s",
        manifest.num_samples, manifest.num_rejected, manifest.recipe.moments_shape, job.output,
    )  # fmt: skip
    print(f"latent dataset: {job.output}")


if __name__ == "__main__":
    run_command(main)
