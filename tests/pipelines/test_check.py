import json
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from pyarrow import fs

from meanflow_core.latents import LatentNormalization
from pipelines import check
from pipelines.check import ChannelStatistics, CheckJob
from pipelines.command_line import run_command
from pipelines.encode import run as encode_run
from pipelines.errors import InputError
from pipelines.latents.manifest import open_autoencoder, shard_name
from pipelines.latents.shards import read_shard, shard_bytes
from tests.pipelines.encode.test_encode import job, without_ray  # noqa: F401  # a fixture


@pytest.fixture
def dataset(image_root, tmp_path, without_ray):  # noqa: F811
    """Sixty images in three shards."""
    encode_run.encode(job(image_root / "train", tmp_path / "latents", rows_per_shard=25))
    return tmp_path / "latents"


def run(dataset, **options):
    return check.check(CheckJob(data=str(dataset), picture=dataset.parent / "check.png", **options))


def rewrite(dataset, number, **changes):
    """Writes a shard again with some of its arrays changed."""
    path = dataset / shard_name(number)
    shard = read_shard(fs.LocalFileSystem(), str(path))
    arrays = {
        "moments": shard.moments.copy(), "moments_mirrored": shard.moments_mirrored.copy(),
        "labels": shard.labels.copy(), "sample_ids": list(shard.sample_ids),
    }  # fmt: skip
    for name, change in changes.items():
        change(arrays[name])
    path.write_bytes(shard_bytes(**arrays, rejected=[]))


def test_whole_dataset_has_no_problems_and_a_picture_of_decoded_latents(dataset):
    report = run(dataset, num_pictures=4)
    assert (report.problems, report.notes, report.num_samples) == ([], [], 60)
    assert report.classes.tolist() == [6] * 10
    assert report.psnr > 30
    vae = open_autoencoder(str(dataset))
    mean, std = report.statistics.normalized(LatentNormalization.from_vae_config(vae.config))
    assert np.abs(mean).max() < 0.4
    assert np.abs(std - 1).max() < 0.4
    width, height = Image.open(dataset.parent / "check.png").size
    assert width > height > 600  # three rows of four


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moments": lambda a: a.__setitem__((3, 0, 0, 0), 7)}, "shard-00001.arrow is another than when the manifest"),
        ({"moments": lambda a: a.__setitem__((3, 0, 0, 0), np.nan)}, "moments of .* are not finite"),
        ({"moments_mirrored": lambda a: a.__setitem__((3, 0, 0, 0), np.inf)}, "moments_mirrored of .* are not finite"),
        ({"labels": lambda a: a.__setitem__(4, 10)}, r"label of .* must lie in \[0, 9\], but is 10"),
        ({"sample_ids": lambda a: a.__setitem__(0, "d0000000/d0000000_0")}, "holds 1 samples of earlier shards"),
    ],
)  # fmt: skip
def test_changes_after_the_manifest_are_found(dataset, changes, words):
    rewrite(dataset, 1, **changes)
    report = run(dataset)
    assert any(re.search(words, problem) for problem in report.problems), report.problems
    assert report.psnr is None


@pytest.mark.parametrize("place", [0.3, 0.6], ids=["moments", "mirrored"])
def test_bytes_that_rotted_on_the_disk_are_found(dataset, place):
    path = dataset / shard_name(2)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 16
    path.write_bytes(content)
    assert "was damaged after it was written" in run(dataset).problems[0]


def test_shards_that_are_gone_or_torn_are_found(dataset):
    (dataset / shard_name(0)).unlink()
    torn = dataset / shard_name(2)
    torn.write_bytes(torn.read_bytes()[:-500])
    problems = run(dataset).problems
    assert len(problems) == 2
    assert "shard-00000.arrow cannot be read" in problems[0]
    assert "shard-00002.arrow cannot be read" in problems[1]


def test_images_elsewhere_are_named_and_others_are_refused(dataset, image_root, tmp_path):
    shutil.move(image_root / "train", tmp_path / "moved")
    try:
        report = run(dataset)
        assert report.psnr is None
        assert "say where they are with --images" in report.notes[0]
        assert run(dataset, images=str(tmp_path / "moved")).psnr > 30
        assert "other images than those that were encoded" in run(dataset, images=str(image_root / "val")).notes[0]
    finally:
        shutil.move(tmp_path / "moved", image_root / "train")


def test_normalisation_that_does_not_fit_the_latents_is_noted(dataset):
    path = dataset / "vae/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "latents_std": [50.0] * 4}))
    notes = run(dataset).notes
    assert len(notes) == 4
    assert "channel 0 of the normalised latents has mean" in notes[0]


def test_statistics_are_those_of_draws_from_the_moments():
    generator = np.random.default_rng(0)
    moments = np.concatenate([generator.normal(3.0, 2.0, (50, 2, 4, 4)), np.full((50, 2, 4, 4), 1.5)], axis=1)
    statistics = ChannelStatistics(2)
    statistics.add(moments[:20])
    statistics.add(moments[20:])
    draws = moments[:, :2] + 1.5 * generator.normal(size=(4000, 50, 2, 4, 4))
    mean, std = statistics.raw()
    np.testing.assert_allclose(mean, draws.mean(axis=(0, 1, 3, 4)), atol=0.02)
    np.testing.assert_allclose(std, draws.std(axis=(0, 1, 3, 4)), atol=0.02)


def test_command_says_what_it_found_and_ends_with_1_where_something_is_wrong(dataset, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check", "--data", str(dataset), "--picture", str(dataset.parent / "p.png")])
    with pytest.raises(SystemExit) as stop:
        run_command(check.main)
    assert stop.value.code == 0
    assert "problems: none" in capsys.readouterr().out
    (dataset / shard_name(0)).unlink()
    with pytest.raises(SystemExit) as stop:
        run_command(check.main)
    assert stop.value.code == 1
    assert "PROBLEM: shards/shard-00000.arrow cannot be read" in capsys.readouterr().out


def test_dataset_that_is_not_complete_is_an_input_error(dataset):
    (dataset / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no manifest\.json"):
        run(dataset)
