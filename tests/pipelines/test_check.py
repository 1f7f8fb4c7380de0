import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import fs

from pipelines.check.__main__ import main
from pipelines.check.job import CheckJob
from pipelines.check.run import check, describe
from pipelines.check.statistics import ChannelStatistics
from pipelines.command_line import run_command
from pipelines.latents.manifest import MANIFEST, shard_name
from pipelines.latents.shards import read_shard, shard_bytes
from tests.support.counted_storage import count_storage
from tests.support.latents import encode_job, encode_without_ray


@pytest.fixture(scope="module")
def encoded(image_root, tmp_path_factory):
    """60 images in three shards. Tests must not change it."""
    root = tmp_path_factory.mktemp("checked")
    encode_without_ray(encode_job(image_root / "train", root / "latents", images_per_shard=25))
    return root / "latents"


@pytest.fixture
def dataset(encoded, tmp_path):
    """A copy, which tests may damage."""
    shutil.copytree(encoded, tmp_path / "latents")
    return tmp_path / "latents"


def run(dataset, **options):
    return check(
        CheckJob(**{"data": str(dataset), "figure": dataset.parent / "check.png", "num_samples": 2, **options})
    )


def rewrite(dataset, number, array, position, value):
    """Changes one value of a shard, and its hash with it."""
    path = dataset / shard_name(number)
    shard = read_shard(fs.LocalFileSystem(), str(path))
    arrays = {
        "moments": shard.moments.copy(), "moments_mirrored": shard.moments_mirrored.copy(),
        "labels": shard.labels.copy(), "sample_ids": list(shard.sample_ids),
    }  # fmt: skip
    arrays[array][position] = value
    path.write_bytes(shard_bytes(**arrays, rejected=[]))


def test_undamaged_dataset_has_no_problems_and_a_figure(encoded):
    report = run(encoded, num_samples=4)
    assert (report.problems, report.notes, report.num_samples) == ([], [], 60)
    assert report.class_counts.tolist() == [6] * 10
    assert report.psnr > 30
    assert "sd-vae-ft-mse" not in describe(report)  # another autoencoder
    mean, std = report.statistics.normalized(report.normalization)
    assert np.abs(mean).max() < 0.4
    assert np.abs(std - 1).max() < 0.4
    width, height = Image.open(encoded.parent / "check.png").size
    assert width > height > 600  # three rows of four images


@pytest.mark.parametrize(
    ("array", "position", "value", "message"),
    [
        ("moments", (3, 0, 0, 0), 7, "shard-00001.arrow: changed after the manifest was written"),
        ("moments", (3, 0, 0, 0), np.nan, "moments of .* are not finite"),
        ("labels", 4, 10, r"label of .* must be in \[0, 9\], but is 10"),
        (
            "sample_ids",
            0,
            "d0000000/d0000000_0",
            "1 sample ids also occur in earlier shards, such as d0000000/d0000000_0",
        ),
    ],
)
def test_changes_after_encoding_are_found(dataset, array, position, value, message):
    rewrite(dataset, 1, array, position, value)
    report = run(dataset)
    assert any(re.search(message, problem) for problem in report.problems), report.problems
    assert report.psnr is None


def flip_bit(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0.3, 0.6], ids=["moments", "mirrored"])
def test_flipped_bit_is_found(dataset, place):
    flip_bit(dataset / shard_name(2), place)
    assert "damaged after it was written" in run(dataset).problems[0]


def test_missing_and_truncated_shards_are_found(dataset):
    (dataset / shard_name(0)).unlink()
    truncated = dataset / shard_name(2)
    truncated.write_bytes(truncated.read_bytes()[:-500])
    problems = run(dataset).problems
    assert len(problems) == 2
    assert "shard-00000.arrow cannot be read" in problems[0]
    assert "shard-00002.arrow cannot be read" in problems[1]


def test_manifest_must_agree_with_itself(dataset):
    path = dataset / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_samples": 61}))
    assert run(dataset).problems == ["the sample counts in the manifest disagree"]


def test_moved_images_are_found_with_an_option_and_other_images_are_refused(dataset, image_root, tmp_path):
    path = dataset / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "source": str(tmp_path / "moved away")}))
    report = run(dataset)
    assert report.psnr is None
    assert "give their location with --images" in report.notes[0]
    assert run(dataset, images=str(image_root / "train")).psnr > 30
    assert "are not those that were encoded" in run(dataset, images=str(image_root / "val")).notes[0]


def test_images_are_compared_without_listing_them(encoded, image_root, tmp_path, monkeypatch):
    counted = count_storage(monkeypatch)
    for images in (None, str(image_root / "train")):
        assert run(encoded, images=images, figure=tmp_path / "check.png").psnr > 30
    assert not [folder for folder in counted.listed if folder.startswith(str(image_root))]


def test_images_that_are_gone_or_have_changed_are_noted(image_root, tmp_path):
    shutil.copytree(image_root / "val", tmp_path / "val")
    encode_without_ray(encode_job(tmp_path / "val", tmp_path / "latents"))
    path = sorted((tmp_path / "val").rglob("*.JPEG"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert re.search("are not those .* has changed since the images were listed", run(tmp_path / "latents").notes[0])
    path.unlink()
    assert re.search("are not those .* is gone since the images were listed", run(tmp_path / "latents").notes[0])


def test_normalization_that_does_not_fit_the_latents_is_noted(dataset):
    path = dataset / "vae/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "latents_std": [50.0] * 4}))
    notes = run(dataset).notes
    assert len(notes) == 4
    assert "channel 0 of the normalized latents has mean" in notes[0]


def test_statistics_are_those_of_latents_sampled_from_the_moments():
    generator = np.random.default_rng(0)
    moments = np.concatenate([generator.normal(3.0, 2.0, (50, 2, 4, 4)), np.full((50, 2, 4, 4), 1.5)], axis=1)
    statistics = ChannelStatistics(2)
    statistics.add(moments[:20])
    statistics.add(moments[20:])
    latents = moments[:, :2] + 1.5 * generator.normal(size=(4000, 50, 2, 4, 4))
    mean, std = statistics.raw()
    np.testing.assert_allclose(mean, latents.mean(axis=(0, 1, 3, 4)), atol=0.02)
    np.testing.assert_allclose(std, latents.std(axis=(0, 1, 3, 4)), atol=0.02)


def test_command_prints_the_problems_and_exits_with_1(dataset, monkeypatch, capsys):
    arguments = ["--data", str(dataset), "--figure", str(dataset.parent / "figure.png"), "--num-samples", "1"]
    monkeypatch.setattr(sys, "argv", ["check", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 0
    assert "problems: none" in capsys.readouterr().out
    (dataset / shard_name(0)).unlink()
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 1
    assert "PROBLEM: shards/shard-00000.arrow cannot be read" in capsys.readouterr().out
