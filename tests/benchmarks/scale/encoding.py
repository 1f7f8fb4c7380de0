"""Encode: the index of N images, the plan of their shard tasks, and the whole stage through Ray Data."""

import contextlib
import functools
import io
import itertools
import math
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from diffusers import AutoencoderKL
from PIL import Image
from pyarrow import fs
from results import Experiment, Timing, fractions, timed

from pipelines.encode import run as encode_run
from pipelines.encode.job import EncodeJob
from pipelines.encode.plan import Plan
from pipelines.images.index import Listing
from pipelines.images.packed_files import FileIndex
from pipelines.images.sources import index_images
from pipelines.images.stored import INDEX, index_bytes, read_index_bytes
from pipelines.latents.manifest import EncodingRecipe

NUM_CLASSES = 1000
ROWS_PER_PARQUET = 5005  # 256 files of ImageNet
ROWS_PER_TAR = 1252  # 1,024 tars of ImageNet
OBJECT_STORE_BYTES = 1 << 30


def experiments(num_images: int) -> dict[str, Experiment]:
    """The experiments of this part."""
    sizes = fractions(num_images)
    return {
        "folders": Experiment(
            measure=measure_folders, sizes=sizes, unit="images", simulated="the listing of the files, 1,000 wnids"
        ),
        "webdataset": Experiment(
            measure=measure_webdataset, sizes=sizes, unit="images", simulated="the tars, and the workers that index them"
        ),
        "parquet": Experiment(
            measure=measure_stage, sizes=sizes, unit="images",
            simulated="images of 2x2 pixels and an autoencoder of one channel; the files and the whole stage are real",
        ),
    }  # fmt: skip


def wnid(label: int) -> str:
    """A made-up WordNet id."""
    return f"n{label:08d}"


def measure_folders(num_images: int) -> dict[str, Timing]:
    """Indexes and plans class folders."""
    files = sorted(f"{wnid(i % NUM_CLASSES)}/{wnid(i % NUM_CLASSES)}_{i}.JPEG" for i in range(num_images))
    listing = Listing("/simulated", "/simulated", "folders", files, [110_000] * num_images)
    return measure_plan(listing, map)


def measure_webdataset(num_images: int) -> dict[str, Timing]:
    """Merges the indexes of tars, which arrive pickled as from Ray's workers, and plans."""
    num_tars = math.ceil(num_images / ROWS_PER_TAR)
    pickles = []
    for first in range(0, num_images, ROWS_PER_TAR):
        rows = np.arange(first, min(first + ROWS_PER_TAR, num_images))
        columns = {
            "sample_id": pa.array([f"sample{row:08d}" for row in rows]),
            "label": pa.array(rows % NUM_CLASSES, pa.int32()),
            "position": (rows - first) * 112_000 + 512,
            "size": np.full(len(rows), 110_000),
            "row_group": pa.nulls(len(rows), pa.int32()),
        }
        pickles.append(pickle.dumps(FileIndex(pa.table(columns), [])))
    files = [f"train-{number:05d}.tar" for number in range(num_tars)]
    listing = Listing("/simulated", "/simulated", "webdataset", files, [ROWS_PER_TAR * 112_000] * num_tars)
    return measure_plan(listing, lambda function, items: map(pickle.loads, pickles))


def measure_plan(listing: Listing, map_files: Callable) -> dict[str, Timing]:
    """Indexes a source, stores the index, and makes what `_encoding_dataset` sends to each shard task."""
    filesystem, timings = fs.LocalFileSystem(), {}
    with timed(timings, "index"):
        index = index_images(filesystem, listing, map_files)
    with timed(timings, "hash the listing, write and read the index") as notes:
        sha256, content = listing.sha256, index_bytes(listing, index)
        notes.append(f"{len(content) / 1e6:.0f} MB")
        assert len(read_index_bytes(content, INDEX)[1]) == len(index)
    plan = Plan(filesystem, listing, index, recipe(sha256))
    with timed(timings, "plan and pickle the slices of all shards") as notes:
        slices = [pickle.dumps(plan.images(shard)) for shard in range(plan.num_shards)]
        notes.append(f"{plan.num_shards:,} shards of {sum(map(len, slices)) / 1e6 / len(slices):.3f} MB")
    return timings


def recipe(source_sha256: str) -> EncodingRecipe:
    """The recipe of a Stable Diffusion autoencoder at 256 pixels."""
    return EncodingRecipe(
        vae_id="simulated", vae_sha256="", moments_shape=(8, 32, 32), image_size=256, crop="", images_per_shard=512,
        source_sha256=source_sha256,
    )  # fmt: skip


def measure_stage(num_images: int) -> dict[str, Timing]:
    """Runs the whole stage, and times its steps."""
    timings: dict[str, Timing] = {}
    with tempfile.TemporaryDirectory(prefix="mfs-", dir="/tmp") as name:
        folder = Path(name)
        write_parquet(folder / "images", num_images)
        AutoencoderKL(
            block_out_channels=(1,), layers_per_block=1, latent_channels=1, norm_num_groups=1
        ).save_pretrained(folder / "vae")
        os.environ["RAY_TMPDIR"] = str(folder)
        # Read by the workers' processes that Ray starts: the interpreter's path has this folder's modules already.
        ray.init = functools.partial(ray.init, object_store_memory=OBJECT_STORE_BYTES)
        job = EncodeJob(
            images=str(folder / "images"), output=str(folder / "latents"), vae=str(folder / "vae"),
            image_size=2, mirror=False, precision="float32", num_workers=1, device="cpu",
        )  # fmt: skip
        with steps_timed(timings):
            manifest = encode_run.encode(job)
        ray.shutdown()
    assert manifest.num_samples == num_images
    return timings


STEPS = {
    "index_images": "index, a Ray task per file",
    "write_plan": "write the index",
    "_encoding_dataset": "plan, pickle, make the Ray dataset",
    "_encode_shards": "all shard tasks through Ray Data, with the above",
    "_complete": "commit: read summaries, write the manifest",
}


@contextlib.contextmanager
def steps_timed(timings: dict[str, Timing]) -> Iterator[None]:
    """Times the stage's own functions while it runs."""

    def with_timer(function: Callable, step: str) -> Callable:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with timed(timings, step):
                return function(*arguments, **options)

        return call

    originals = {name: getattr(encode_run, name) for name in STEPS}
    for name, step in STEPS.items():
        setattr(encode_run, name, with_timer(originals[name], step))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(encode_run, name, function)


def write_parquet(folder: Path, num_images: int) -> None:
    """Writes Parquet files as Hugging Face's. All rows hold the same image, which Parquet's dictionary stores once."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    folder.mkdir()
    for number, first in enumerate(range(0, num_images, ROWS_PER_PARQUET)):
        rows = range(first, min(first + ROWS_PER_PARQUET, num_images))
        images = pa.StructArray.from_arrays(
            [pa.array(itertools.repeat(buffer.getvalue(), len(rows)), pa.binary()), pa.array([f"{row}.png" for row in rows])],
            ["bytes", "path"],
        )  # fmt: skip
        table = pa.table({"image": images, "label": np.arange(first, first + len(rows)) % NUM_CLASSES})
        pq.write_table(table, folder / f"train-{number:05d}.parquet", row_group_size=1000)
