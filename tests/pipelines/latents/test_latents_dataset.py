import json
import re
from dataclasses import replace

import numpy as np
import psutil
import pyarrow as pa
import pytest
from pyarrow import fs

from pipelines.errors import InputError
from pipelines.latents.manifest import Manifest, read_manifest, shard_name
from pipelines.latents.sample_order import rows_of_step
from pipelines.latents.shards import read_shard, read_shard_bytes, shard_bytes, shard_problems, shard_summary
from tests.support.manifests import make_manifest


def manifest(shard_rows):
    return make_manifest(shard_rows, moments_shape=(8, 2, 2), image_size=16)


@pytest.fixture
def dataset(tmp_path):
    """Seven rows in three shards: row i holds i in its moments and -i in its mirrored ones."""
    root = tmp_path / "latents"
    (root / "shards").mkdir(parents=True)
    for shard, (start, stop) in enumerate(((0, 3), (3, 6), (6, 7))):
        values = np.arange(start, stop, dtype=np.float16)[:, None, None, None] + np.zeros((8, 2, 2), np.float16)
        content = shard_bytes(
            values, -values, np.arange(start, stop) % 2, [f"id{row}" for row in range(start, stop)], []
        )
        (root / shard_name(shard)).write_bytes(content)
    (root / "manifest.json").write_text(manifest([3, 3, 1]).to_json())
    return root


def test_plain_pyarrow_and_numpy_map_shape_and_dtype(tmp_path):
    moments = np.random.default_rng(0).normal(size=(5, 8, 4, 4)).astype(np.float16)
    rejected = [{"sample_id": "x", "reason": "torn"}]
    content = shard_bytes(moments, moments * 2, np.arange(5), list("abcde"), rejected)
    (tmp_path / "shard").write_bytes(content)
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "shard"))).read_all()
    assert table.column_names == ["moments", "moments_mirrored", "label", "sample_id"]
    read = table["moments_mirrored"].chunk(0).to_numpy_ndarray()
    assert read.dtype == np.float16
    assert any(line.path == str(tmp_path / "shard") for line in psutil.Process().memory_maps())  # and not copied
    np.testing.assert_array_equal(read, moments * 2)
    assert str(table.schema.field("label").type) == "int32"
    assert str(table.schema.field("sample_id").type) == "string"


def test_dataset_without_a_manifest_is_refused(dataset):
    (dataset / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no manifest\.json in .*; run pipelines\.encode"):
        read_manifest(str(dataset))


def test_newer_schema_is_refused_and_a_damaged_one_too(dataset):
    path = dataset / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema_version": 3}))
    with pytest.raises(InputError, match="schema version 3, but this release reads versions 1 and 2; install"):
        read_manifest(str(dataset))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match="damaged .*; delete it and run pipelines.encode again"):
        read_manifest(str(dataset))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arrays: arrays["labels"].__setitem__(1, 2), r"label of id4 must lie in \[0, 1\], but is 2"),
        (lambda arrays: arrays["labels"].__setitem__(1, -1), r"label of id4 must lie in \[0, 1\], but is -1"),
        (lambda arrays: arrays["moments"].__setitem__((2, 0, 0, 0), np.nan), "moments of id5 are not finite"),
        (
            lambda arrays: arrays["moments_mirrored"].__setitem__((0, 0, 0, 0), np.inf),
            "moments_mirrored of id3 are not finite",
        ),
    ],
)
def test_values_that_cannot_be_are_named_with_their_sample(change, words):
    moments = np.ones((3, 8, 2, 2), np.float16)
    arrays = {"moments": moments, "moments_mirrored": moments.copy(), "labels": np.array([0, 1, 0])}
    change(arrays)
    content = shard_bytes(**arrays, sample_ids=["id3", "id4", "id5"], rejected=[])
    [problem] = shard_problems(read_shard_bytes(content, "here"), num_classes=2)
    assert re.search(words, problem)


def test_manifest_survives_its_json():
    original = manifest([3, 3, 1])
    assert Manifest.from_json(original.to_json(), "here") == original
    assert original.latent_shape == (4, 2, 2)
    assert replace(original, source="there") != original


def test_every_epoch_holds_every_row_once():
    epochs = np.concatenate([rows_of_step(7, step, 4, 10) for step in range(5)]).reshape(2, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_rows_of_a_step_are_a_function_of_seed_and_step():
    np.testing.assert_array_equal(rows_of_step(1, 9, 16, 100), rows_of_step(1, 9, 16, 100))
    assert rows_of_step(1, 9, 16, 100).tolist() != rows_of_step(2, 9, 16, 100).tolist()
    assert len(rows_of_step(0, 0, 25, 10)) == 25  # a batch larger than the data reaches over several epochs


def test_shard_says_what_it_is_without_its_rows_being_read(tmp_path):
    rejected = [{"sample_id": "a", "reason": "torn"}]
    empty = np.zeros((0, 8, 2, 2), np.float16)
    (tmp_path / "s").write_bytes(shard_bytes(empty, empty, np.zeros(0), [], rejected))
    summary = shard_summary(fs.LocalFileSystem(), str(tmp_path / "s"))
    assert (summary.num_rows, summary.rejected) == (0, rejected)
    shard = read_shard(fs.LocalFileSystem(), str(tmp_path / "s"))
    assert shard.content_sha256() == summary.sha256
    assert shard.moments.shape == (0, 8, 2, 2)
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:-40])
    with pytest.raises(InputError, match="s is damaged [(]Not an Arrow file[)]"):
        read_shard(fs.LocalFileSystem(), str(tmp_path / "s"))
