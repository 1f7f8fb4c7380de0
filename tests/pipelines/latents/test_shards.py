import re

import numpy as np
import psutil
import pyarrow as pa
import pytest
from pyarrow import fs

from pipelines.errors import InputError
from pipelines.latents.shards import invalid_values, read_shard, read_shard_bytes, read_summary, shard_bytes


def test_plain_pyarrow_maps_a_shard_with_shape_and_dtype(tmp_path):
    moments = np.random.default_rng(0).normal(size=(5, 8, 4, 4)).astype(np.float16)
    path = tmp_path / "shard"
    path.write_bytes(shard_bytes(moments, moments * 2, np.arange(5), list("abcde"), []))
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    assert table.column_names == ["moments", "moments_mirrored", "label", "sample_id"]
    mirrored = table["moments_mirrored"].chunk(0).to_numpy_ndarray()
    assert mirrored.dtype == np.float16
    assert any(line.path == str(path) for line in psutil.Process().memory_maps())  # mapped, not copied
    np.testing.assert_array_equal(mirrored, moments * 2)
    assert str(table.schema.field("label").type) == "int32"
    assert str(table.schema.field("sample_id").type) == "string"


def test_empty_shard_keeps_its_rejected_images(tmp_path):
    rejected = [{"sample_id": "a", "reason": "truncated"}]
    empty = np.zeros((0, 8, 2, 2), np.float16)
    path = tmp_path / "shard"
    path.write_bytes(shard_bytes(empty, empty, np.zeros(0), [], rejected))
    summary = read_summary(fs.LocalFileSystem(), str(path))
    assert (summary.num_samples, summary.rejected) == (0, rejected)
    shard = read_shard(fs.LocalFileSystem(), str(path))
    assert shard.content_sha256() == summary.sha256
    assert shard.moments.shape == (0, 8, 2, 2)


def test_truncated_shard_is_refused(tmp_path):
    moments = np.ones((2, 8, 2, 2), np.float16)
    path = tmp_path / "shard"
    path.write_bytes(shard_bytes(moments, None, np.zeros(2), ["a", "b"], [])[:-40])
    for read in (read_shard, read_summary):
        with pytest.raises(InputError, match="shard is damaged [(]Not an Arrow file[)]"):
            read(fs.LocalFileSystem(), str(path))


@pytest.mark.parametrize(
    ("array", "position", "value", "message"),
    [
        ("labels", 1, 2, r"label of id4 must be in \[0, 1\], but is 2"),
        ("labels", 1, -1, r"label of id4 must be in \[0, 1\], but is -1"),
        ("moments", (2, 0, 0, 0), np.nan, "moments of id5 are not finite"),
        ("moments_mirrored", (0, 0, 0, 0), np.inf, "moments_mirrored of id3 are not finite"),
    ],
)
def test_invalid_values_are_reported_with_their_sample(array, position, value, message):
    moments = np.ones((3, 8, 2, 2), np.float16)
    arrays = {"moments": moments, "moments_mirrored": moments.copy(), "labels": np.array([0, 1, 0])}
    arrays[array][position] = value
    content = shard_bytes(**arrays, sample_ids=["id3", "id4", "id5"], rejected=[])
    [problem] = invalid_values(read_shard_bytes(content, "here"), num_classes=2)
    assert re.search(message, problem)
