"""Metrics, warnings and MLflow names of a report."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from meanflow_core.metrics import FeatureStatistics
from pipelines.evaluate.inputs import Generator, Inputs
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.mlflow_log import metric_family
from pipelines.evaluate.report import compute_metrics, manifold_of, protocol_warnings
from pipelines.evaluate.sums import SetSums
from pipelines.evaluate.table import marked_distance
from pipelines.extractors.reference import Reference

JUDGE = {"name": "judge", "weights_sha256": "abc"}
FEATURES = torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def sums_of(features):
    groups = {group: FeatureStatistics.of(part) for group, part in enumerate(features.tensor_split(20))}
    return SetSums("x", groups=groups, features=[features.float()], num_images=len(features))


def reference_of(features, protocol=None):
    return Reference(
        moments=FeatureStatistics.of(features), spatial=None, features=features.float(), protocol=protocol,
        location="somewhere.npz", sha256="",
    )  # fmt: skip


def test_metrics_distinguish_equal_and_shifted_features():
    reference = reference_of(FEATURES)
    manifold = manifold_of(reference, 400)
    same = compute_metrics(sums_of(FEATURES), reference, manifold)
    assert set(same) == {"frechet", "frechet_standard_error", "precision", "recall"}
    assert same["frechet"] == pytest.approx(0.0, abs=1e-9)
    assert (same["precision"], same["recall"]) == (1.0, 1.0)
    shifted = compute_metrics(sums_of(FEATURES + 50.0), reference, manifold)
    assert shifted["frechet"] == pytest.approx(6 * 50.0**2)
    assert (shifted["precision"], shifted["recall"]) == (0.0, 0.0)
    without_features = replace(reference, features=None)
    assert manifold_of(without_features, 400) is None
    assert "precision" not in compute_metrics(sums_of(FEATURES), without_features, None)


def test_accuracy_and_spatial_distance_are_reported_if_available():
    sums = replace(sums_of(FEATURES), spatial=FeatureStatistics.of(FEATURES), num_correct=100)
    reference = replace(reference_of(FEATURES), spatial=FeatureStatistics.of(FEATURES + 3.0))
    metrics = compute_metrics(sums, reference, None)
    assert metrics["accuracy"] == 0.25
    assert metrics["spatial_frechet"] == pytest.approx(6 * 9.0)


def test_recall_covers_all_of_a_reference_sorted_by_class():
    near, far = torch.randn(200, 4), torch.randn(200, 4) + 100.0
    reference = reference_of(torch.cat([near, far]))
    metrics = compute_metrics(sums_of(far.double()), reference, manifold_of(reference, 200))
    assert metrics["precision"] > 0.9
    assert metrics["recall"] == pytest.approx(0.5, abs=0.05)


def test_reports_warn_about_metrics_that_are_not_comparable(tmp_path):
    job = EvaluateJob(model="m", train_images="t", output=tmp_path)
    other_tool, own = reference_of(FEATURES), reference_of(FEATURES, {"extractor": JUDGE})
    assert protocol_warnings(job, own, JUDGE, 64, 1000) == []
    assert "does not state its extractor" in protocol_warnings(job, other_tool, JUDGE, 64, 1000)[0]
    assert "covariance is singular" in protocol_warnings(job, own, JUDGE, 64, 64)[0]
    inception = {"name": "inception"}
    assert "published FIDs use 50000" in protocol_warnings(job, own, inception, 2048, 10_000)[0]
    assert protocol_warnings(job, own, inception, 2048, 50_000) == []
    remote = replace(own, features=None, has_images=True, location="s3://bucket/adm.npz")
    assert "only be read from a local disk" in protocol_warnings(job, remote, JUDGE, 64, 1000)[0]
    assert protocol_warnings(replace(job, num_precision_recall=0), remote, JUDGE, 64, 1000) == []


@pytest.mark.parametrize(("trained_on", "title"), [("abc", "distance, trained on"), ("other", "distance")])
def test_a_distance_that_the_generator_was_trained_on_is_marked(trained_on, title):
    generator = Generator(None, None, None, ({"name": "judge", "weights_sha256": trained_on},))
    inputs = Inputs(SimpleNamespace(identity=JUDGE), generator, None, None, None, None)
    assert inputs.is_trained_on == (trained_on == "abc")
    report = {"protocol": {"distance": "distance", "generator": {"is_trained_on_extractor": inputs.is_trained_on}}}
    assert marked_distance(report) == title


def test_metrics_of_other_ema_decays_have_their_own_prefix():
    assert metric_family("/runs/xl2/generator", 0.9999) == metric_family("models:/m@champion", 0.9999) == "evaluate"
    assert metric_family("/converted", None) == metric_family(None, None) == "evaluate"
    assert metric_family("/runs/xl2/generator-ema-0.9995", 0.9995) == "evaluate-ema-0.9995"
