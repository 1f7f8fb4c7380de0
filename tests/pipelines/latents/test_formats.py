"""What earlier releases wrote is read; what later ones write is refused. tests/data/formats was written by those releases."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from pipelines.check import CheckJob, check
from pipelines.errors import InputError
from pipelines.latents.cache import open_latents
from pipelines.latents.manifest import Manifest
from pipelines.latents.shards import map_shard, read_shard, shard_summary

FORMATS = Path(__file__).parents[2] / "data" / "formats"
LATENTS_1 = FORMATS / "latents-1"


def test_a_latent_dataset_of_the_version_before_is_what_it_was(tmp_path):
    assert json.loads((LATENTS_1 / "manifest.json").read_text())["schema_version"] == 1
    dataset = open_latents(str(LATENTS_1), str(tmp_path))
    manifest = dataset.manifest
    assert (len(dataset), manifest.class_names) == (10, ["n00000000", "n00000001"])
    assert (manifest.recipe.mirrored, manifest.recipe.precision) == (True, "float32")
    # The hashes are those that the earlier release wrote, of every value and id; the copy is of this version.
    copies = sorted(tmp_path.glob("*/shards/*.arrow"))
    assert [map_shard(path).content_sha256() for path in copies] == manifest.shard_sha256
    for path in copies:
        assert shard_summary(fs.LocalFileSystem(), str(path)).sha256 in manifest.shard_sha256
    rows, mirrored = np.array([9, 0, 4]), np.array([False, True, False])
    moments, labels = dataset.rows(rows, mirrored)
    assert labels.tolist() == [1, 0, 0]
    last = read_shard(fs.LocalFileSystem(), str(LATENTS_1 / "shards/shard-00002.parquet"))
    np.testing.assert_array_equal(moments[0], last.moments[1])
    assert not np.array_equal(moments[1], dataset.rows(rows, ~mirrored)[0][1])


def test_a_copy_of_the_version_before_may_leave_out_the_mirror_images(tmp_path):
    dataset = open_latents(str(LATENTS_1), str(tmp_path), mirrored=False)
    assert dataset.moments_mirrored is None
    copies = list(tmp_path.glob("*-unmirrored/shards/*.arrow"))
    assert len(copies) == 3
    assert all(map_shard(path).moments_mirrored is None for path in copies)
    assert len(dataset) == 10


def test_a_dataset_of_the_version_before_passes_the_check():
    report = check(CheckJob(data=str(LATENTS_1)))
    assert report.problems == []
    assert report.num_samples == 10


def test_a_dataset_of_the_version_before_cannot_be_mapped_where_it_lies():
    with pytest.raises(
        InputError, match="schema version 1, which cannot be mapped; name a folder on each node's own disk"
    ):
        open_latents(str(LATENTS_1), "none")


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-100], lambda content: content[:4] + b"\0" * 8 + content[12:]]
)
def test_a_damaged_shard_of_the_version_before_is_told_and_never_to_be_made_anew_there(tmp_path, damage):
    shutil.copytree(LATENTS_1, tmp_path / "latents")
    path = tmp_path / "latents/shards/shard-00001.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        InputError, match=r"shard-00001\.parquet is damaged or cannot be read .* encode again into another folder$"
    ):
        open_latents(str(tmp_path / "latents"), str(tmp_path / "cache"))


def test_the_first_form_of_the_version_before_is_told_as_such(tmp_path):
    content = json.loads((LATENTS_1 / "manifest.json").read_text())
    del content["shard_sha256"]
    with pytest.raises(InputError, match="early form of schema version 1, without hashes"):
        Manifest.from_json(json.dumps(content), "here")
