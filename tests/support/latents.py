"""What an encoded dataset holds, and whether two of them hold the same."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import fs

from pipelines import storage
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.encode import run as encode_run
from pipelines.encode.job import EncodeJob
from pipelines.encode.plan import Plan
from pipelines.encode.stages import EncodeShard, decode_shard, write_shard
from pipelines.latents.shards import Shard, read_shard


def encode_in_process(job: EncodeJob, plan: Plan, shards: list[int]):
    """In place of `encode._encode_shards`: the same callables, one after the other, without a cluster between them."""
    worker = EncodeShard(job.output, "cpu", precision=job.precision, mirror=job.mirror, batch_size=job.batch_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as an actor has them
    for shard in shards:
        batch = {"shard": np.array([shard]), "images": [pickle.dumps(plan.images(shard))]}
        write_shard(worker(decode_shard(batch, image_size=job.image_size)), output=job.output)
    torch.set_num_threads(threads)


def encode_here(job: EncodeJob):
    """Encodes in this process; returns the manifest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_run, "_encode_shards", encode_in_process)
        patch.setattr(encode_run, "start_ray", lambda needed_cpus: None)
        return encode_run.encode(job)


def encode_drawn(images: Path, output: Path, rows_per_shard: int) -> Path:
    """Encodes the demo's drawn images with its own autoencoder; returns the dataset's folder."""
    job = EncodeJob(
        images=str(images),
        output=str(output),
        vae=str(SHIPPED_AUTOENCODER),
        image_size=64,
        rows_per_shard=rows_per_shard,
    )
    encode_here(job)
    return output


def read_shards(output: str | Path) -> list[Shard]:
    """A dataset's shards in the order of their names, whether or not it is complete."""
    filesystem, root = storage.open_storage(str(output))
    files = filesystem.get_file_info(fs.FileSelector(f"{root}/shards"))
    return [read_shard(filesystem, path) for path in sorted(entry.path for entry in files)]


def by_stem(output: str | Path) -> dict[str, tuple[int, np.ndarray, np.ndarray | None]]:
    """{file stem: (label, moments, mirrored moments)} of a dataset; a stem stands in it once."""
    rows: dict = {}
    for shard in read_shards(output):
        for row, sample_id in enumerate(shard.sample_ids):
            stem = sample_id.rsplit("/", 1)[-1]
            assert stem not in rows, stem
            mirrored = None if shard.moments_mirrored is None else shard.moments_mirrored[row]
            rows[stem] = (int(shard.labels[row]), shard.moments[row], mirrored)
    return rows


def assert_same(found: str | Path, wanted: str | Path):
    """The same ids and labels, and moments within 2 units in the last place of float16, or 1e-4 near zero."""
    ours, theirs = by_stem(found), by_stem(wanted)
    assert ours.keys() == theirs.keys()
    for stem, (label, *moments) in theirs.items():
        assert ours[stem][0] == label, stem
        for mine, other in zip(ours[stem][1:], moments, strict=True):
            bound = np.maximum(2.0 * np.spacing(np.abs(other)).astype(np.float32), 1e-4)
            assert (np.abs(mine.astype(np.float32) - other.astype(np.float32)) <= bound).all(), stem
