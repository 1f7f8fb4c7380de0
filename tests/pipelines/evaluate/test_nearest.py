"""Probe accuracy and nearest training images in feature space, through whole evaluations without a cluster."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from meanflow_core.metrics import FeatureStatistics
from pipelines.demo import images
from pipelines.errors import InputError
from pipelines.evaluate import run
from pipelines.evaluate.chunks import Kept, image_file_chunks
from pipelines.evaluate.feature_distances import NUM_QUERIES, FeatureDistances, nearest_indices
from pipelines.evaluate.inputs import open_inputs
from pipelines.evaluate.job import EvaluateJob, MeasuringOptions
from pipelines.evaluate.make_reference import reference_bytes
from pipelines.evaluate.measuring import Measurer, WorkerConfig
from pipelines.evaluate.nearest import NearestRow, nearest_training_images, plot_nearest
from pipelines.evaluate.plan import GRID, TRAINING_IMAGES, plan_chunks
from pipelines.evaluate.real_images import read_evenly
from pipelines.evaluate.sums import SetSums
from pipelines.evaluate.table import report_table
from pipelines.extractors.reference import read_reference
from pipelines.images.sources import find_images


class Corners(torch.nn.Module):
    """Features (B, 12): the mean colours of four quarters."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


def measure_here(chunks, config, workers=None, on_chunk=lambda sums: None):
    """Replaces measure_sets, without a cluster."""
    worker, sets = Measurer(config, "cpu"), {}
    for chunk in chunks:
        sums = worker.measure(chunk)
        on_chunk(sums)
        sets.setdefault(chunk.set_name, SetSums(chunk.set_name)).add(sums)
    return sets


@pytest.fixture
def job(pipeline, tmp_path, image_root, monkeypatch):
    monkeypatch.setattr(run, "measure_sets", measure_here)
    monkeypatch.setattr(run, "start_cluster", lambda job: SimpleNamespace(num_workers=1, use_gpu=False))
    monkeypatch.setattr(run, "map_on_cluster", map)
    pipeline.save_pretrained(tmp_path / "generator")
    torch.jit.script(Corners()).save(str(tmp_path / "corners.ts"))
    return EvaluateJob(
        model=str(tmp_path / "generator"),
        train_images=str(image_root / "train"),
        held_out_images=str(image_root / "val"),
        extractor=str(tmp_path / "corners.ts"),
        output=tmp_path / "report",
        steps=(1,),
        num_samples=20,
    )


def test_copies_are_nearer_to_the_training_images_than_held_out_images_are():
    generator = torch.Generator().manual_seed(0)
    train, held_out = (torch.randn(200, 8, generator=generator) for _ in range(2))
    distances = FeatureDistances(train, held_out)
    assert distances.measure(held_out) == {"nearest_train_feature_ratio": pytest.approx(1.0)}
    assert distances.measure(train + 1e-3)["nearest_train_feature_ratio"] < 0.01
    assert distances.measure(held_out + 10)["nearest_train_feature_ratio"] > 2
    assert FeatureDistances(train, train[:50]).measure(held_out) == {}
    many = torch.cat([train[:1].expand(3 * NUM_QUERIES, -1), 5 + held_out[:1].expand(4 * NUM_QUERIES, -1)])
    assert distances.measure(many)["nearest_train_feature_ratio"] > 1  # both ends of the set are searched
    assert torch.equal(nearest_indices(train[[7, 3, 7]], train), torch.tensor([7, 3, 7]))


def test_kept_features_come_with_the_labels_and_rows_of_readable_images(image_root, tmp_path):
    folder = tmp_path / "val"
    for number, path in enumerate(sorted((image_root / "val").rglob("*.JPEG"))):
        target = folder / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"no image" if number % 7 == 0 else path.read_bytes())
    torch.jit.script(Corners()).save(str(tmp_path / "corners.ts"))
    config = WorkerConfig(options=MeasuringOptions(extractor=str(tmp_path / "corners.ts"), batch_size=3))
    source = find_images(str(folder))
    labels = source[2].entries["label"].to_numpy()
    for shuffle in (False, True):
        sums = measure_here(image_file_chunks("x", source, 64, Kept(features=40), shuffle=shuffle), config)["x"]
        rows = torch.cat(sums.feature_rows)
        assert sorted(rows.tolist()) == [row for row in range(40) if row % 7]
        assert (rows.tolist() == sorted(rows.tolist())) is not shuffle
        assert torch.cat(sums.feature_labels).tolist() == labels[rows].tolist()
        pixels, _ = read_evenly(source, 64, 40)
        expected = Corners()(pixels.permute(0, 3, 1, 2))
        positions = {row: number for number, row in enumerate(sorted(rows.tolist()))}
        torch.testing.assert_close(torch.cat(sums.features), expected[[positions[row] for row in rows.tolist()]])


def test_a_report_has_probe_accuracy_and_distances_in_features_and_shows_the_nearest_images(job, tmp_path):
    report = run.evaluate(job)
    (entry,) = report["samples"]
    for metrics in (entry, report["held_out"], report["reconstruction"]):
        assert 0.0 <= metrics["probe_accuracy"] <= 1.0
        assert metrics["nearest_train_feature_ratio"] > 0
    assert report["held_out"]["nearest_train_feature_ratio"] == pytest.approx(1.0)
    table = report_table(report)
    assert "| probe accuracy |" in table
    assert "| nearest-train ratio in features |" in table
    assert "logistic regression" in report["protocol"]["linear_probe"]
    assert Image.open(job.output / "nearest.png").size[1] > 500
    reference = read_reference(str(job.output / "reference.npz"))
    assert reference.feature_labels.bincount().tolist() == [6] * 10
    assert reference.class_names == images.CLASS_NAMES

    again = replace(job, reference=str(job.output / "reference.npz"), output=tmp_path / "again")
    (same,) = run.evaluate(again)["samples"]
    for key in ("frechet", "probe_accuracy", "nearest_train_feature_ratio"):
        assert same[key] == pytest.approx(entry[key], rel=1e-5), key
    none = run.evaluate(replace(again, num_precision_recall=0, output=tmp_path / "none"))
    assert not {"probe_accuracy", "nearest_train_feature_ratio", "precision"} & set(none["samples"][0])
    assert not (tmp_path / "none/nearest.png").exists()


def test_the_nearest_image_of_a_training_image_is_itself(job, image_root):
    inputs = open_inputs(job)
    sets = measure_here(plan_chunks(job, inputs), WorkerConfig(options=job, model=job.model))
    pixels, labels = read_evenly(inputs.train, 64, 60)
    chosen = torch.tensor([3, 50, 3, 12])
    features = Corners()(pixels[chosen].permute(0, 3, 1, 2))
    sets[GRID] = SetSums(GRID, features=[features], images=[pixels[chosen]], labels=[labels[chosen]])
    rows = nearest_training_images(job, inputs, sets)
    assert [row.class_name for row in rows] == [images.CLASS_NAMES[label] for label in (0, 8, 2)]
    for row in rows:
        np.testing.assert_array_equal(row.nearest, row.samples)
    assert len(rows[0].samples) == 2

    # With a reference of its own, a training source that is larger than the number of features is measured in part.
    some = replace(job, reference="r.npz", num_precision_recall=20)
    chunks = plan_chunks(some, replace(inputs, reference=SimpleNamespace(has_images=False)))
    assert sum(chunk.num_images for chunk in chunks if chunk.set_name == TRAINING_IMAGES) == 20


def test_references_of_other_classes_or_without_labels_give_a_warning_in_place_of_a_probe(job, tmp_path):
    run.evaluate(job)
    with np.load(job.output / "reference.npz") as file:
        arrays = dict(file)
    for name, changed in (
        ("other", {"class_names": arrays["class_names"][::-1]}),
        ("unlabelled", {"feature_labels": None, "class_names": None}),
    ):
        kept = {key: value for key, value in {**arrays, **changed}.items() if value is not None}
        np.savez(tmp_path / f"{name}.npz", allow_pickle=False, **kept)
    reports = {
        name: run.evaluate(replace(job, reference=str(tmp_path / f"{name}.npz"), output=tmp_path / name))
        for name in ("other", "unlabelled")
    }
    for report in reports.values():
        assert "probe_accuracy" not in report["samples"][0]
    assert any("other classes than the generator" in warning for warning in reports["other"]["warnings"])
    assert any("has no labels; make it again" in warning for warning in reports["unlabelled"]["warnings"])
    json.dumps(reports)
    np.savez(tmp_path / "short.npz", allow_pickle=False, **{**arrays, "feature_labels": np.arange(3)})
    with pytest.raises(
        InputError, match=r"feature_labels must be int64 \(60,\), one per feature, but are int64 \(3,\)"
    ):
        read_reference(str(tmp_path / "short.npz"))


def test_sums_without_labels_make_a_reference_without_labels(tmp_path):
    features = torch.randn(20, 3)
    sums = SetSums("x", {0: FeatureStatistics.of(features)}, features=[features])
    (tmp_path / "r.npz").write_bytes(reference_bytes(sums, {}))
    reference = read_reference(str(tmp_path / "r.npz"))
    assert (reference.feature_labels, reference.class_names) == (None, None)


def test_rows_of_different_lengths_are_plotted(tmp_path):
    row = np.zeros((3, 8, 8, 3), np.uint8)
    plot_nearest([NearestRow("a", row, row), NearestRow("b", row[:1], row[:1])], "1 step", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size[0] > 300
