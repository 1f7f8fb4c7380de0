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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from diffusers import AutoencoderKL
from pyarrow import fs

from meanflow_core.autoencoder import load_autoencoder
from pipelines import storage
from pipelines.cluster import choose_gpus, num_gpus, start_ray
from pipelines.command_line import parse_command_line
from pipelines.encode.job import EncodeJob
from pipelines.encode.plan import Plan, _recipe
from pipelines.encode.stages import EncodeShard, decode_shard, write_shard
from pipelines.errors import InputError
from pipelines.images.sources import ImageIndex, index_images, list_images
from pipelines.latents.manifest import (
    INDEX,
    MANIFEST,
    RECIPE,
    REJECTED,
    EncodingRecipe,
    Manifest,
    is_complete,
    read_manifest,
    shard_name,
)
from pipelines.latents.shards import rejected_bytes, shard_summary
from pipelines.progress import Progress, format_seconds

logger = logging.getLogger(__name__)

FOOTER_READERS = 16  # threads: an object store answers slowly, and many at once


def _refuse_other_recipe(output: str, recipe: EncodingRecipe) -> bool:
    """Whether the output was begun; raises InputError where that was with another recipe."""
    filesystem, root = storage.open_storage(output)
    path = f"{root}/{RECIPE}"
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
    storage.write_bytes(filesystem, f"{root}/{INDEX}", index)
    recipe = json.dumps(asdict(plan.recipe), indent=2) + "\n"
    storage.write_bytes(filesystem, f"{root}/{RECIPE}", recipe.encode())


def _stored_index(output: str, source_sha256: str) -> ImageIndex | None:
    filesystem, root = storage.open_storage(output)
    with contextlib.suppress(FileNotFoundError):
        return ImageIndex.from_bytes(storage.read_bytes(filesystem, f"{root}/{INDEX}"), source_sha256)
    return None


def _start_ray(job: EncodeJob) -> None:
    # An encoder per CPU, and logical ones beside for decoding and writing.
    start_ray(needed_cpus=(job.num_workers or os.cpu_count() or 1) + 1)


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
    return [shard for shard in range(num_shards) if shard_name(shard) not in present]


def _default_encoders(job: EncodeJob) -> int:
    """As many as the GPUs in use hold; else one per CPU, which Ray gives one thread each.

    Threads of one process wait for each other at every layer: while decoding takes turns on their cores, two of them
    are slower than one.
    """
    if job.device != "cpu" and num_gpus() > 0:
        return num_gpus() * job.encoders_per_gpu
    return max(1, _num_cpus() - 1)


def _num_cpus() -> int:
    """Logical CPUs of the cluster in use; one of them is for decoding and writing."""
    return int(ray.cluster_resources().get("CPU", 1))


def _encode_shards(job: EncodeJob, plan: Plan, shards: list[int]) -> None:
    num_encoders = job.num_workers or _default_encoders(job)
    use_gpu = choose_gpus(job.device, -(-num_encoders // job.encoders_per_gpu))
    if not use_gpu and num_encoders >= _num_cpus():
        logger.warning(
            "%d encoders want a CPU each, and decoding one more, but the cluster has %d: nothing happens until it grows; "
            "if it does not, name a smaller --num-workers",
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
    paths = [f"{root}/{shard_name(shard)}" for shard in range(plan.num_shards)]
    try:
        with ThreadPoolExecutor(FOOTER_READERS) as readers:
            shards = list(readers.map(lambda path: shard_summary(filesystem, path), paths))
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
    storage.write_bytes(filesystem, f"{root}/{REJECTED}", rejected_bytes(rejected))
    share = len(rejected) / plan.num_images
    if share > job.max_rejected_fraction:
        kinds = collections.Counter(row["reason"].split(":")[0] for row in rejected).most_common(3)
        raise InputError(
            f"{len(rejected)} of {plan.num_images} images ({share:.2%}) cannot be read, more than --max-rejected-fraction "
            f"{job.max_rejected_fraction:g} allows ({', '.join(f'{count} {kind}' for kind, count in kinds)}); they are "
            f"listed in {job.output}/{REJECTED}. All else is encoded: with a larger fraction the same "
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
    storage.write_bytes(filesystem, f"{root}/{MANIFEST}", manifest.to_json().encode())
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
    if is_begun and is_complete(job.output):
        manifest = read_manifest(job.output)
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
