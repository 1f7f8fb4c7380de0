"""Runs an encoding job: plan it, encode the missing shards on the cluster, complete the dataset."""

import collections
import io
import logging
import math
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pyarrow import fs

from meanflow_core.pixels import PixelAutoencoder
from pipelines import storage
from pipelines.cluster import choose_gpus, map_on_cluster, num_gpus, start_ray
from pipelines.encode.job import EncodeJob
from pipelines.encode.pixels import build_pixel_autoencoder, normalize_by_images
from pipelines.encode.plan import Plan, has_same_recipe, make_recipe, read_index, write_plan
from pipelines.encode.stages import EncodeShard, decode_shard, write_shard
from pipelines.errors import InputError
from pipelines.images.index import ImageIndex, Listing
from pipelines.images.sampling import sample_images
from pipelines.images.sources import index_images, list_images
from pipelines.latents.autoencoder import absolute_autoencoder, load_named_autoencoder
from pipelines.latents.manifest import (
    REJECTED,
    Manifest,
    is_complete,
    read_manifest,
    shard_name,
    write_manifest,
)
from pipelines.latents.pixels import PIXELS
from pipelines.latents.shards import ShardSummary, read_summary
from pipelines.private_interfaces import quiet_ray_data
from pipelines.progress import Progress, format_seconds

logger = logging.getLogger(__name__)

NUM_SUMMARY_THREADS = 16  # object stores have high latency and serve many requests at once
MAX_LOGGED_REJECTIONS = 20
MIN_REJECTED = 2  # so many may be rejected from a set of any size


def encode(job: EncodeJob) -> Manifest:
    """Encodes the missing shards of a job and returns the manifest. Raises InputError for invalid input."""
    vae_location = PIXELS if job.vae == PIXELS else absolute_autoencoder(job.vae)
    output = storage.output_location(job.output, "--output")
    job = replace(job, images=storage.absolute(job.images), output=output, vae=vae_location)
    filesystem, listing = list_images(job.images, job.format)
    vae = build_pixel_autoencoder(job, listing) if job.vae == PIXELS else load_named_autoencoder(job.vae)
    recipe = make_recipe(job, listing, vae)
    is_started = has_same_recipe(job.output, recipe)
    if is_started and is_complete(job.output):
        manifest = read_manifest(job.output)
        logger.info("%s is complete: %d samples", job.output, manifest.num_samples)
        return manifest
    stored = read_index(job.output, listing) if is_started else None
    plan = Plan(filesystem, listing, stored or _choose_images(job, filesystem, listing), recipe)
    if stored is None:
        if job.vae == PIXELS:
            normalize_by_images(vae, plan, map_on_cluster if ray.is_initialized() else map)
        write_plan(job.output, plan, vae)
    missing = plan.missing_shards(job.output)
    logger.info(
        "%d images of %d classes (%s), %d of %d shards to encode",
        plan.num_images, len(plan.index.class_names), listing.format, len(missing), plan.num_shards,
    )  # fmt: skip
    start_seconds = time.monotonic()
    if missing:
        _start_ray(job)
        _encode_shards(job, plan, missing, grey=isinstance(vae, PixelAutoencoder) and vae.is_grey)
    manifest = _complete(job, plan)
    num_encoded = sum(len(plan.rows(shard)) for shard in missing)
    _log_summary(manifest, num_encoded, time.monotonic() - start_seconds)
    return manifest


def _choose_images(job: EncodeJob, filesystem: fs.FileSystem, listing: Listing) -> ImageIndex:
    """Indexes the images, and chooses those to encode."""
    if listing.format == "folders":  # their index needs the paths only
        index = index_images(filesystem, listing)
    else:
        _start_ray(job)
        index = index_images(filesystem, listing, map_on_cluster)
    return sample_images(index, job.limit)


def _start_ray(job: EncodeJob) -> None:
    start_ray(needed_cpus=(job.num_workers or os.cpu_count() or 1) + 1)  # one CPU per encoder, one to decode and write


def _warn_if_busy(kind: Literal["CPU", "GPU"], needed: int) -> None:
    free = ray.available_resources().get(kind, 0.0)
    if free < needed:
        logger.warning("encoding needs %d %ss, but only %g are free now; it waits for the others", needed, kind, free)


def _encode_shards(job: EncodeJob, plan: Plan, shards: list[int], *, grey: bool) -> None:
    num_cpus = int(ray.cluster_resources().get("CPU", 1))
    num_encoders = job.num_workers
    if num_encoders is None and job.device != "cpu" and num_gpus() > 0:
        num_encoders = num_gpus() * job.encoders_per_gpu
    elif num_encoders is None:
        # One single-threaded encoder per CPU: the threads of one process would wait for each other at every layer.
        num_encoders = max(1, num_cpus - 1)
    num_gpus_needed = -(-num_encoders // job.encoders_per_gpu)
    use_gpu = choose_gpus(job.device, num_gpus_needed)
    if not use_gpu and num_encoders >= num_cpus:
        logger.warning(
            "%d encoders and the decoding tasks need %d CPUs, but the cluster has %d; the job waits until the cluster "
            "grows: add nodes, or restart the job with a smaller --num-workers",
            num_encoders, num_encoders + 1, num_cpus,
        )  # fmt: skip
    elif use_gpu:
        _warn_if_busy("GPU", num_gpus_needed)
    else:
        _warn_if_busy("CPU", num_encoders + 1)
    results = _encoding_dataset(job, plan, shards, num_encoders, use_gpu=use_gpu, grey=grey)
    done = plan.num_images - sum(len(plan.rows(shard)) for shard in shards)
    progress = Progress(logger, "encoded", "images", plan.num_images, start=done)
    num_rejected = 0
    for counts in results.iter_rows():
        done += int(counts["images"] + counts["rejected"])
        num_rejected += int(counts["rejected"])
        progress.update(done, f"{num_rejected} rejected" if num_rejected else "")


def _encoding_dataset(
    job: EncodeJob, plan: Plan, shards: list[int], num_encoders: int, *, use_gpu: bool, grey: bool
) -> ray.data.Dataset:
    """The lazy Ray dataset that encodes shards; one block per shard, one row of counts per written shard."""
    context = ray.data.DataContext.get_current()
    quiet_ray_data()
    context.enable_progress_bars = False
    context.target_max_block_size = None  # never split a block
    # Annotated, because the type hints of map_batches reject functions with keyword-only arguments.
    decode: Callable[..., dict[str, np.ndarray]] = decode_shard
    write: Callable[..., dict[str, np.ndarray]] = write_shard
    items = [{"shard": shard, "images": pickle.dumps(plan.images(shard))} for shard in shards]
    return (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(
            decode,
            batch_size=1,
            # Half a CPU, since decoding waits for storage half of the time. If it equalled the encoder's num_cpus, Ray Data
            # would fuse decoding into the encoding actors, where it cannot scale independently.
            num_cpus=0.5,
            fn_kwargs={"image_size": job.crop_size, "grey": grey},
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


def _complete(job: EncodeJob, plan: Plan) -> Manifest:
    """Checks the shards, then writes the list of rejected images and the manifest.

    Raises InputError for an invalid shard and for too many rejected images.
    """
    filesystem, root = storage.open_storage(job.output)
    shards = _read_summaries(job.output, plan)
    rejected = [image for shard in shards for image in shard.rejected]
    for image in rejected[:MAX_LOGGED_REJECTIONS]:
        logger.warning("rejected %s: %s", image["sample_id"], image["reason"])
    if len(rejected) == plan.num_images:
        filesystem.delete_dir(f"{root}/shards")  # so that repeating the command reads the images again
        raise InputError(f"none of the {len(rejected)} images in {job.images} can be used: {rejected[0]['reason']}")
    _write_rejected(job.output, rejected)
    fraction = len(rejected) / plan.num_images
    if len(rejected) > MIN_REJECTED and fraction > job.max_rejected_fraction:
        reasons = collections.Counter(image["reason"].split(":")[0] for image in rejected).most_common(3)
        enough = math.ceil(1e4 * fraction) / 1e4
        raise InputError(
            f"{len(rejected)} of {plan.num_images} images ({fraction:.2%}) cannot be used, more than "
            f"--max-rejected-fraction {job.max_rejected_fraction:g} "
            f"({', '.join(f'{count} {reason}' for reason, count in reasons)}); see {job.output}/{REJECTED}. All shards are "
            f"written: repair the images, or complete the dataset without them by --max-rejected-fraction {enough:g}"
        )
    manifest = Manifest(
        recipe=plan.recipe,
        num_samples=sum(shard.num_samples for shard in shards),
        num_rejected=len(rejected),
        shard_num_samples=[shard.num_samples for shard in shards],
        shard_sha256=[shard.sha256 for shard in shards],
        class_names=plan.index.class_names,
        wnids=plan.index.wnids,
        source=job.images,
    )
    write_manifest(job.output, manifest)
    storage.delete_partial(filesystem, f"{root}/shards")
    return manifest


def _read_summaries(output: str, plan: Plan) -> list[ShardSummary]:
    """The metadata of all shards. Raises InputError for a shard that is missing, damaged or of the wrong size."""
    missing = plan.missing_shards(output)
    if missing:
        raise InputError(
            f"{len(missing)} shards were written, but are not in {output}; on several nodes, --output must be shared storage"
        )
    filesystem, root = storage.open_storage(output)
    paths = [f"{root}/{shard_name(shard)}" for shard in range(plan.num_shards)]
    try:
        with ThreadPoolExecutor(NUM_SUMMARY_THREADS) as threads:
            shards = list(threads.map(lambda path: read_summary(filesystem, path), paths))
    except InputError as error:
        raise InputError(f"{error}; delete it and run again") from error
    for number, shard in enumerate(shards):
        count, expected = shard.num_samples + len(shard.rejected), len(plan.rows(number))
        if count != expected:
            raise InputError(f"{paths[number]} has {count} images instead of {expected}; delete it and run again")
    return shards


def _write_rejected(output: str, rejected: list[dict[str, str]]) -> None:
    filesystem, root = storage.open_storage(output)
    schema = pa.schema([("sample_id", pa.string()), ("reason", pa.string())])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rejected, schema=schema), buffer)
    storage.write_bytes(filesystem, f"{root}/{REJECTED}", buffer.getvalue())


def _log_summary(manifest: Manifest, num_encoded: int, seconds: float) -> None:
    recipe = manifest.recipe
    logger.info(
        "%d samples of %d classes, %d rejected; moments %s float16%s, %.2f GB in %d shards; %d images in %s, %.1f images/s",
        manifest.num_samples, len(manifest.class_names), manifest.num_rejected,
        "x".join(map(str, recipe.moments_shape)), " with mirror images" if recipe.mirrored else "",
        manifest.num_bytes(mirrored=recipe.mirrored) / 1e9, manifest.num_shards,
        num_encoded, format_seconds(seconds), num_encoded / max(seconds, 1e-9),
    )  # fmt: skip
