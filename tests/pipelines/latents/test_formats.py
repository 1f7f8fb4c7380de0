"""What earlier releases wrote is read; what later ones write is refused. tests/data/formats was written by those releases."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import fs

from meanflow_core.autoencoder import weight_hash
from meanflow_core.checkpoint import load_average, load_train_state, read_state_file, save_train_state
from meanflow_core.config import NetworkConfig
from meanflow_core.generator import find_generator, load_pipeline, save_generator
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.presets import debug
from meanflow_core.training import build_train_state
from pipelines.check import CheckJob, check
from pipelines.errors import InputError
from pipelines.latents.cache import open_latents
from pipelines.latents.manifest import Manifest
from pipelines.latents.shards import map_shard, read_shard, shard_summary
from pipelines.tracking.registry import fetch_generator
from pipelines.train import checkpoints

FORMATS = Path(__file__).parents[2] / "data" / "formats"
LATENTS_1 = FORMATS / "latents-1"
CHECKPOINT_0 = FORMATS / "checkpoint-0"
GENERATOR_0 = FORMATS / "generator-0"
EXPECTED = json.loads((FORMATS / "expected.json").read_text())
CONFIG = replace(debug(), network=NetworkConfig(patch_size=4, hidden_size=16, depth=1, num_heads=2), num_steps=10)


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


def new_state():
    return build_train_state(CONFIG, sample_size=8, in_channels=4, num_classes=2, device=torch.device("cpu"))


def with_version(source, target, file, version):
    shutil.copytree(source, target)
    content = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**content, "format_version": version}))
    return target


def test_a_checkpoint_of_the_version_before_is_what_it_was(tmp_path):
    assert "format_version" not in json.loads((CHECKPOINT_0 / "state.json").read_text())
    state = new_state()
    assert load_train_state(state, CHECKPOINT_0) == {"validated": True}
    assert state.step == 3
    assert weight_hash(state.network) == EXPECTED["network_sha256"]
    assert weight_hash(state.ema_network) == EXPECTED["average_sha256"]
    moments = [values[key] for values in state.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert sum(float(moment.double().sum()) for moment in moments) == pytest.approx(
        EXPECTED["sum_of_moments"], rel=1e-6
    )
    load_average(state.network, 0.9, CHECKPOINT_0)
    assert weight_hash(state.network) == EXPECTED["average_sha256"]
    save_train_state(state, CONFIG, tmp_path)
    assert read_state_file(tmp_path)["format_version"] == 1


def test_a_checkpoint_of_a_later_release_is_refused_and_never_taken_for_a_torn_one(tmp_path):
    name = "checkpoint_2026-11-25_20-00-00.123456"
    later = with_version(CHECKPOINT_0, tmp_path / name, "state.json", 2)
    with pytest.raises(ValueError, match="format version 2, but this release reads versions up to 1; install"):
        load_train_state(new_state(), later)
    content = json.loads((later / "state.json").read_text())
    (later / "state.json").write_text(json.dumps({"format_version": 2, "pieces": content["files"]}))
    record = {"checkpoint_results": [{"checkpoint_dir_name": name, "metrics": {}}], "checkpoint_report_indices": [0]}
    (tmp_path / checkpoints.RECORD).write_text(json.dumps(record))
    with pytest.raises(InputError, match="format version 2"):
        checkpoints.mend_record(fs.LocalFileSystem(), str(tmp_path))
    assert json.loads((tmp_path / checkpoints.RECORD).read_text()) == record
    (tmp_path / checkpoints.RECORD).unlink()
    with pytest.raises(InputError, match="format version 2"):
        checkpoints.delete_orphans(fs.LocalFileSystem(), str(tmp_path))
    assert later.is_dir()
    (later / "state.json").write_text("null")
    with pytest.raises(ValueError, match="is no checkpoint"):
        read_state_file(later)
    assert checkpoints.delete_orphans(fs.LocalFileSystem(), str(tmp_path)) == [name]


@pytest.mark.parametrize("open_folder", [load_pipeline, MeanFlowPipeline.from_pretrained])
def test_a_generator_of_the_version_before_makes_the_image_that_it_made(open_folder, tmp_path):
    assert "format_version" not in json.loads((GENERATOR_0 / "model_index.json").read_text())
    pipeline = open_folder(GENERATOR_0)
    image = pipeline.images_from_seeds(pipeline.get_label_ids("honey bee"), [7], 1)[0]
    wanted = np.array(EXPECTED["image_of_class_1_and_seed_7"]).reshape(16, 16, 3)
    assert np.abs(image.numpy().astype(int) - wanted).max() <= 1
    assert pipeline.config.wnids == {"0": "n00000000", "1": "n00000001"}
    save_generator(pipeline, tmp_path / "again")
    assert json.loads((tmp_path / "again/model_index.json").read_text())["format_version"] == 1


@pytest.mark.parametrize("open_folder", [load_pipeline, find_generator, MeanFlowPipeline.from_pretrained])
def test_a_generator_of_a_later_release_is_refused(open_folder, tmp_path):
    later = with_version(GENERATOR_0, tmp_path / "generator", "model_index.json", 2)
    with pytest.raises(ValueError, match="format version 2, but this release reads versions up to 1; install"):
        open_folder(later)


def test_stages_refuse_a_generator_of_a_later_release_as_bad_input(tmp_path):
    later = with_version(GENERATOR_0, tmp_path / "generator", "model_index.json", 2)
    with pytest.raises(InputError, match=r"the generator in .*generator has format version 2"):
        fetch_generator(str(later), None)
    (later / "model_index.json").write_text("{")
    with pytest.raises(InputError, match=r"model_index\.json in .* is damaged"):
        fetch_generator(str(later), None)
