import pickle
import shutil

import numpy as np
import pytest
import torch
from pyarrow import fs

from meanflow_core.autoencoder import encode_moments
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.encode import stages
from pipelines.encode.stages import EncodeShard, choose_batch_size, decode_shard, write_shard
from pipelines.images.sources import ImageSlice, find_images
from pipelines.latents.manifest import shard_name
from pipelines.latents.shards import read_shard


def decoded_shard(folder, count):
    images = ImageSlice.of(*find_images(str(folder)), np.arange(count))
    return decode_shard({"shard": np.array([0]), "images": [pickle.dumps(images)]}, image_size=64)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder with an autoencoder and nothing else."""
    root = tmp_path_factory.mktemp("dataset")
    shutil.copytree(SHIPPED_AUTOENCODER, root / "vae")
    return root


def test_unreadable_image_is_black_and_has_an_error(image_root, tmp_path):
    shutil.copytree(image_root / "val", tmp_path / "val")
    sorted((tmp_path / "val").rglob("*.JPEG"))[1].write_text("not an image")
    batch = decoded_shard(tmp_path / "val", 3)
    assert [error.split(":")[0] for error in batch["error"]] == ["", "UnidentifiedImageError", ""]
    assert [bool(pixels.any()) for pixels in batch["pixels"]] == [True, False, True]


def test_failing_storage_fails_the_task_and_rejects_no_image(image_root, monkeypatch):
    def fail(filesystem, path):
        raise OSError("connection reset")

    images = pickle.dumps(ImageSlice.of(*find_images(str(image_root / "val")), np.arange(3)))
    monkeypatch.setattr("pipelines.storage.read_bytes", fail)
    with pytest.raises(OSError, match="connection reset"):
        decode_shard({"shard": np.array([0]), "images": [images]}, image_size=64)


def test_bfloat16_is_close_to_float32(image_root, dataset):
    batch = decoded_shard(image_root / "val", 8)
    exact, rough = (
        EncodeShard(str(dataset), "cpu", precision=precision)(batch)["moments"].astype(np.float64)
        for precision in ("float32", "bfloat16")
    )
    assert 1e-4 < np.linalg.norm(rough - exact) / np.linalg.norm(exact) < 2e-2


def test_batch_size_is_halved_when_the_device_is_out_of_memory(image_root, dataset, monkeypatch):
    sizes = []

    def encode_at_most_4(vae, images):
        sizes.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError("too large")
        return encode_moments(vae, images)

    monkeypatch.setattr(stages, "encode_moments", encode_at_most_4)
    batch = EncodeShard(str(dataset), "cpu", mirror=False, batch_size=16)(decoded_shard(image_root / "val", 18))
    assert batch["moments"].shape == (18, 8, 8, 8)
    assert sizes == [16, 8, 4, 4, 4, 4, 2]


def test_batch_size_on_a_cpu_shrinks_with_the_image_size(vae):
    sizes = {side: choose_batch_size(vae, torch.zeros(1, side, side, 3)) for side in (64, 256, 512, 1024)}
    assert sizes == {64: 64, 256: 8, 512: 2, 1024: 1}


def encoded_shard(moments, moments_mirrored):
    count = len(moments)
    return {
        "shard": np.zeros(count, int), "label": np.arange(count), "sample_id": np.array(list("abc")[:count], object),
        "error": np.array([""] * count, object), "moments": moments, "moments_mirrored": moments_mirrored,
    }  # fmt: skip


def test_image_whose_moments_overflow_float16_is_rejected(tmp_path):
    moments = np.ones((3, 8, 2, 2), np.float16)
    mirrored = moments.copy()
    mirrored[1, 0, 0, 0] = np.inf
    counts = write_shard(encoded_shard(moments, mirrored), output=str(tmp_path))
    assert (counts["images"][0], counts["rejected"][0]) == (2, 1)
    shard = read_shard(fs.LocalFileSystem(), str(tmp_path / shard_name(0)))
    assert shard.sample_ids == ["a", "c"]
    assert shard.summary.rejected[0]["sample_id"] == "b"


def test_existing_shard_is_not_overwritten(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / shard_name(0)).write_bytes(b"complete")
    moments = np.ones((1, 8, 2, 2), np.float16)
    write_shard(encoded_shard(moments, moments), output=str(tmp_path))
    assert (tmp_path / shard_name(0)).read_bytes() == b"complete"


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU requires a C++ compiler (g++)")
def test_compiled_autoencoder_gives_the_same_moments(image_root, dataset):
    batch = decoded_shard(image_root / "val", 40)
    eager, compiled = (
        EncodeShard(str(dataset), "cpu", compiled=is_compiled, batch_size=16)(batch) for is_compiled in (False, True)
    )
    for name in ("moments", "moments_mirrored"):
        np.testing.assert_allclose(compiled[name], eager[name], rtol=4e-3, atol=1e-3)
