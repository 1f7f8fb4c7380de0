"""Encodes latent datasets without a cluster, and compares them."""

import pickle
from collections.abc import Callable
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
from pipelines.latents.manifest import Manifest
from pipelines.latents.shards import Shard, read_shard


def encode_job(images: str | Path, output: str | Path, **options) -> EncodeJob:
    """A job that encodes 64x64 images with the demo's autoencoder."""
    settings = {"vae": str(SHIPPED_AUTOENCODER), "image_size": 64, **options}
    return EncodeJob(images=str(images), output=str(output), **settings)


def encode_shards_without_ray(job: EncodeJob, plan: Plan, shards: list[int], *, grey: bool):
    """Replaces `encode.run._encode_shards`: runs the same stages in sequence, without a cluster."""
    encoder = EncodeShard(job.output, "cpu", precision=job.precision, mirror=job.mirror, batch_size=job.batch_size)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in an actor
    for shard in shards:
        batch = {"shard": np.array([shard]), "images": [pickle.dumps(plan.images(shard))]}
        write_shard(encoder(decode_shard(batch, image_size=job.image_size, grey=grey)), output=job.output)
    torch.set_num_threads(num_threads)


def encode_without_ray(job: EncodeJob, encode_shards: Callable | None = encode_shards_without_ray) -> Manifest:
    """Runs a job in this process, without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_run, "_encode_shards", encode_shards)
        patch.setattr(encode_run, "map_on_cluster", map)
        patch.setattr(encode_run, "start_ray", lambda needed_cpus: None)
        return encode_run.encode(job)


def encode_demo_images(images: Path, output: Path, images_per_shard: int) -> Path:
    """Encodes the demo's images with its autoencoder. Returns the dataset's folder."""
    encode_without_ray(encode_job(images, output, images_per_shard=images_per_shard))
    return output


def read_shards(output: str | Path) -> list[Shard]:
    """The shards of a complete or incomplete dataset, in order."""
    filesystem, root = storage.open_storage(str(output))
    infos = filesystem.get_file_info(fs.FileSelector(f"{root}/shards"))
    return [read_shard(filesystem, path) for path in sorted(info.path for info in infos)]


def by_stem(output: str | Path) -> dict[str, tuple[int, np.ndarray, np.ndarray | None]]:
    """{file stem: (label, moments, mirrored moments)} of a dataset. Each stem must be unique."""
    samples: dict = {}
    for shard in read_shards(output):
        for row, sample_id in enumerate(shard.sample_ids):
            stem = sample_id.rsplit("/", 1)[-1]
            assert stem not in samples, stem
            mirrored = None if shard.moments_mirrored is None else shard.moments_mirrored[row]
            samples[stem] = (int(shard.labels[row]), shard.moments[row], mirrored)
    return samples


def assert_same(actual: str | Path, expected: str | Path):
    """Asserts equal ids and labels, and moments within 2 units in the last place of float16, or 1e-4 near zero."""
    actual_samples, expected_samples = by_stem(actual), by_stem(expected)
    assert actual_samples.keys() == expected_samples.keys()
    for stem, (label, *moments) in expected_samples.items():
        assert actual_samples[stem][0] == label, stem
        for ours, theirs in zip(actual_samples[stem][1:], moments, strict=True):
            tolerance = np.maximum(2.0 * np.spacing(np.abs(theirs)).astype(np.float32), 1e-4)
            assert (np.abs(ours.astype(np.float32) - theirs.astype(np.float32)) <= tolerance).all(), stem
