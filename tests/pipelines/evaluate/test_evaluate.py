import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from meanflow_core.generator import build_pipeline
from meanflow_core.metrics import FeatureStatistics, frechet_distance
from pipelines.demo import images
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.errors import InputError
from pipelines.evaluate import measuring
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.judge import load_judge
from pipelines.evaluate.measuring import Measured
from pipelines.evaluate.pixel_distances import PixelDistances, shrunk
from pipelines.evaluate.reference import Reference, image_chunks
from pipelines.evaluate.report import slug, table
from pipelines.evaluate.run import (
    ImageKeeper,
    _grid_indices,
    evaluate,
    figures,
    find_real_images,
    flags,
    manifold_of,
    read_evenly,
)
from pipelines.evaluate.sample_files import open_sample_file
from pipelines.images.sources import find_images

JUDGE = {"name": "judge", "weights_sha256": "abc"}


def drawn(split, count):
    return tuple(torch.from_numpy(array) for array in images.draw_many(split, 0, count))


@pytest.fixture(scope="module")
def judge():
    return load_judge(SHIPPED_JUDGE)


@pytest.fixture(scope="module")
def held_out():
    return drawn("val", 1000)


def test_judge_knows_held_out_images(judge, held_out):
    pixels, labels = held_out
    assert (judge.look_at(pixels).predictions == labels).double().mean() >= 0.97


def test_distance_rises_from_held_out_to_half_the_classes_to_one(judge, held_out):
    reference = FeatureStatistics.of(judge.look_at(drawn("train", 2000)[0]).features)
    pixels, labels = held_out

    def distance(chosen):
        return frechet_distance(FeatureStatistics.of(judge.look_at(pixels[chosen]).features), reference)

    ladder = [distance(labels >= 0), distance(labels < 5), distance(labels == 3)]
    print("held-out, half the classes, one class:", [round(value, 3) for value in ladder])
    assert ladder[0] < ladder[1] / 5 < ladder[2] / 10


def test_distance_sees_a_class_shrink_to_one_image(judge, held_out):
    # A judge of classes alone does not: its features of a class lie close together.
    reference = FeatureStatistics.of(judge.look_at(drawn("train", 2000)[0]).features)
    pixels, _ = held_out
    floor = frechet_distance(FeatureStatistics.of(judge.look_at(pixels).features), reference)
    repeated = FeatureStatistics.of(judge.look_at(pixels[:10]).features.repeat(100, 1))
    assert frechet_distance(repeated, reference) > 20 * floor


def test_copies_and_repeats_are_caught(held_out):
    train, _ = drawn("train", 600)
    pixels, labels = (tensor[:300] for tensor in held_out)
    distances = PixelDistances(train, pixels, labels)
    own = distances.measure(pixels, labels)
    assert own == {"diversity": pytest.approx(1.0), "nearest_train_ratio": pytest.approx(1.0)}
    assert distances.measure(train[:300], labels)["nearest_train_ratio"] < 0.01
    assert distances.measure(pixels[:10].repeat(30, 1, 1, 1), labels)["diversity"] < 0.05


def test_figures_that_pixels_cannot_tell_are_left_out(held_out):
    pixels, labels = (tensor[:100] for tensor in held_out)
    train, _ = drawn("train", 100)
    assert set(PixelDistances(train, pixels, labels).measure(pixels[:3], torch.arange(3))) == {"nearest_train_ratio"}
    assert set(PixelDistances(pixels, pixels, labels).measure(train, labels)) == {"diversity"}


def test_saved_samples_leave_the_images_that_come_back_without_a_file(job, tmp_path):
    job = replace(job, steps=(1, 2), num_samples=2000, save_samples=tmp_path / "saved")
    keeper = ImageKeeper(job, 1)
    for number in range(2):
        kept = []
        for chunk in measuring.cut(f"samples {number}", measuring.spans(2000), range, num_images=1000):
            rows = torch.tensor(chunk.source)
            images = (rows % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 1, 3)
            measured = Measured(chunk.set_name, images=[images], labels=[rows], num_rows=len(rows))
            keeper(measured)
            assert torch.cat(measured.labels).tolist() == list(chunk.source[: chunk.num_images])
            kept += measured.images
        assert len(torch.cat(kept)) == 1000
    keeper.close()
    for path in keeper.paths:
        assert open_sample_file(path)[:, 0, 0, 0].tolist() == [index % 256 for index in range(2000)]


@pytest.mark.parametrize("num_classes", [3, 10, 1000])
def test_grid_has_rows_of_one_length_whatever_classes_random_labels_drew(num_classes):
    job = EvaluateJob(model="m", train_images="t", output="o", labels="random", num_samples=1000)
    indices = _grid_indices(job, num_classes)
    labels = job.rule.labels_of(indices, num_classes)
    _, counts = np.unique(labels, return_counts=True)
    assert len(counts) == min(num_classes, 10)
    assert len(set(counts)) == 1
    assert (np.diff(labels) >= 0).all()


def test_precision_and_recall_see_all_of_a_reference_that_stands_class_by_class():
    near, far = torch.randn(200, 4), torch.randn(200, 4) + 100.0
    near_and_far = as_reference(torch.cat([near, far]))
    seen = figures(as_measured(far.double()), near_and_far, manifold_of(near_and_far, 200))
    assert seen["precision"] > 0.9
    assert seen["recall"] == pytest.approx(0.5, abs=0.05)


def test_large_images_are_averaged_down_for_pixel_distances():
    small = torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(shrunk(small), small)
    assert torch.equal(shrunk(small.repeat_interleave(4, 1).repeat_interleave(4, 2)), small)


def test_groups_of_real_images_are_alike(image_root):
    found = find_images(str(image_root / "val"))
    rows = [chunk.source.images.entries["label"].to_pylist() for chunk in image_chunks("x", found, 64, mixed=True)]
    assert sorted(label for labels in rows for label in labels) == sorted(found[2].entries["label"].to_pylist())
    assert sum(len(set(labels)) > 1 for labels in rows) > len(rows) / 2  # and not of a class each
    ordered = image_chunks("x", found, 64)
    assert ordered[0].source.images.entries["label"].to_pylist() == [0, 0]


def as_measured(features):
    groups = {group: FeatureStatistics.of(rows) for group, rows in enumerate(features.tensor_split(20))}
    return Measured("x", groups=groups, features=[features.float()], num_rows=len(features))


def as_reference(features, protocol=None):
    return Reference(
        moments=FeatureStatistics.of(features), spatial=None, features=features.float(), protocol=protocol,
        where="somewhere.npz", sha256="",
    )  # fmt: skip


def test_figures_are_those_that_extractor_and_reference_allow():
    features = torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference = as_reference(features)
    manifold = manifold_of(reference, 400)
    same = figures(as_measured(features), reference, manifold)
    assert set(same) == {"frechet", "frechet_standard_error", "precision", "recall"}
    assert same["frechet"] == pytest.approx(0.0, abs=1e-9)
    assert (same["precision"], same["recall"]) == (1.0, 1.0)
    moved = figures(as_measured(features + 50.0), reference, manifold)
    assert moved["frechet"] == pytest.approx(6 * 50.0**2)
    assert (moved["precision"], moved["recall"]) == (0.0, 0.0)
    assert "precision" not in figures(
        as_measured(features), reference, manifold_of(replace(reference, features=None), 400)
    )


def test_reader_is_told_what_does_not_compare(tmp_path):
    job = EvaluateJob(model="m", train_images="t", output=tmp_path)
    silent, telling = as_reference(torch.randn(9, 6)), as_reference(torch.randn(9, 6), {"extractor": JUDGE})
    assert flags(job, telling, JUDGE, 64, 1000) == []
    assert "does not say with which extractor" in flags(job, silent, JUDGE, 64, 1000)[0]
    assert "covariance is singular" in flags(job, telling, JUDGE, 64, 64)[0]
    inception = {"name": "inception"}
    assert "the field's is of 50000" in flags(job, telling, inception, 2048, 10_000)[0]
    assert flags(job, telling, inception, 2048, 50_000) == []
    far = replace(telling, features=None, has_images=True, where="s3://bucket/adm.npz")
    assert "read from a local disk alone" in flags(job, far, JUDGE, 64, 1000)[0]
    assert flags(replace(job, num_precision_recall=0), far, JUDGE, 64, 1000) == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"steps": (1, 2, 1)}, "settings that differ, but got 1step, 2steps, 1step"),
        ({"guidance_scales": (0.5,)}, "at least 1"),
        ({"guidance_intervals": ((0.8, 0.2),)}, "0 <= start <= end <= 1"),
        ({"num_samples": 2}, "num_samples must be at least 3"),
        ({"steps": ()}, "steps must name"),
        ({"solvers": ()}, "solvers must name"),
        ({"seed": 2**31}, "seed must lie"),
    ],
)
def test_what_no_generator_can_do_is_refused(asked, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        EvaluateJob(model="m", train_images="t", output=tmp_path, **asked)


def test_real_images_of_other_or_too_few_classes_are_refused(image_root, tmp_path):
    shutil.copytree(image_root / "val", tmp_path / "val")
    names = [path.name for path in sorted((tmp_path / "val").iterdir())]
    found = find_real_images(str(tmp_path / "val"), names)
    pixels, labels = read_evenly(found, 64, 1000)
    assert pixels.shape == (40, 64, 64, 3)
    assert labels.bincount().tolist() == [4] * 10
    few, few_labels = read_evenly(found, 64, 20)
    assert torch.equal(few, pixels[::2])
    assert torch.equal(few_labels, labels[::2])
    for path in sorted((tmp_path / "val" / names[4]).iterdir())[1:]:
        path.unlink()
    with pytest.raises(InputError, match=f"1 images of class {names[4]}, but 2 are needed"):
        find_real_images(str(tmp_path / "val"), names)
    shutil.rmtree(tmp_path / "val" / names[4])
    assert len(find_real_images(str(tmp_path / "val"), None)[1].files) == 36
    with pytest.raises(InputError, match="every class needs images"):
        find_real_images(str(tmp_path / "val"), names)


@pytest.fixture
def job(pipeline, tmp_path, image_root):
    pipeline.save_pretrained(tmp_path / "generator")
    return EvaluateJob(
        model=str(tmp_path / "generator"),
        train_images=str(image_root / "train"),
        held_out_images=str(image_root / "val"),
        output=tmp_path / "report",
        steps=(1, 2),
        num_samples=40,
        num_workers=1,
    )


def test_generator_of_other_classes_is_refused(job, pipeline, tmp_path):
    pipeline.register_to_config(id2label={str(label): f"other {label}" for label in range(10)})
    pipeline.save_pretrained(tmp_path / "generator")
    with pytest.raises(InputError, match="knows the classes arrow, circle"):
        evaluate(job)
    assert not (tmp_path / "report").exists()


def test_what_a_generator_cannot_do_is_refused_before_anything_starts(job):
    with pytest.raises(InputError, match="guidance is in its weights"):
        evaluate(replace(job, guidance_scales=(2.0,)))
    with pytest.raises(InputError, match="gives average velocities"):
        evaluate(replace(job, solvers=("heun",)))
    with pytest.raises(InputError, match="at least 2 for each of 10 classes, but got 19"):
        evaluate(replace(job, num_samples=19))
    with pytest.raises(InputError, match="--output must be a folder on a mounted disk, but got s3:"):
        evaluate(replace(job, output=Path("s3://bucket/report")))
    with pytest.raises(InputError, match="no checkpoints beside"):
        evaluate(replace(job, ema_decay=0.9))
    with pytest.raises(ValueError, match="either --model or --samples"):
        replace(job, samples=job.output)
    with pytest.raises(ValueError, match="give --reference, or --train-images"):
        replace(job, train_images=None)


@pytest.mark.soak
@pytest.mark.cluster
def test_guided_samples_are_saved_reported_and_measured_again_from_their_file(job, network, vae, tmp_path):
    velocity = build_pipeline(network, vae, images.CLASS_NAMES, is_flow_matching=True)
    velocity.save_pretrained(tmp_path / "generator")
    asked = replace(
        job, steps=(2,), guidance_scales=(1.0, 3.0), guidance_intervals=((0.2, 0.9),), solvers=("euler", "heun"),
        labels="random", save_samples=tmp_path / "saved",
    )  # fmt: skip
    report = evaluate(asked)
    titles = [entry["title"] for entry in report["samples"]]
    assert titles[3] == "2 steps, omega 3, in [0.2, 0.9], Heun"
    # Euler is asked at t = 1 and 0.5, Heun at 0.5 and 0 besides; guidance has a second answer where t is in the interval.
    assert [entry["network_calls"] for entry in report["samples"]] == [2, 3, 4, 6]
    for setting in asked.settings:
        saved = open_sample_file(tmp_path / "saved" / f"samples-{slug(setting)}.npz")
        assert saved.shape == (40, 64, 64, 3)
    labels = asked.rule.labels_of(np.arange(40), 10)
    expected = velocity.images_from_seeds(
        labels.tolist(), list(range(40)), 2, guidance_scale=3.0, guidance_interval=(0.2, 0.9), solver="heun"
    )
    assert np.abs(saved.astype(int) - expected.numpy().astype(int)).max() <= 1
    for name in (
        "samples.png",
        "quality_against_steps.png",
        "quality_against_guidance.png",
        "table.md",
        "reference.npz",
    ):
        assert (job.output / name).stat().st_size > 500, name
    assert json.loads((job.output / "report.json").read_text())["protocol"]["labels"] == "random"
    assert "| samples, 2 steps, omega 3, in [0.2, 0.9], Heun | 6 |" in table(report)
    assert "is not FID" in table(report)

    file = tmp_path / "saved" / f"samples-{slug(setting)}.npz"
    own_reference = str(job.output / "reference.npz")
    again = evaluate(EvaluateJob(samples=file, reference=own_reference, output=tmp_path / "again", num_workers=1))
    ours, theirs = again["samples"][0], report["samples"][3]
    for key in ("frechet", "frechet_standard_error", "inception_score", "precision", "recall"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key  # the images' strides differ


def test_accuracy_is_a_share_and_spatial_distance_is_to_the_reference():
    features = torch.randn(400, 6, dtype=torch.float64)
    measured = replace(as_measured(features), spatial=FeatureStatistics.of(features), num_right=100)
    reference = replace(as_reference(features), spatial=FeatureStatistics.of(features + 3.0))
    found = figures(measured, reference, None)
    assert found["accuracy"] == 0.25
    assert found["spatial_frechet"] == pytest.approx(6 * 9.0)
