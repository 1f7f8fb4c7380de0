import logging

import numpy as np
import pytest
from PIL import Image

from meanflow_core.generator import build_pipeline
from meanflow_core.networks.dit import MeanFlowDiT
from pipelines.tracking.run import MlflowClient, Run
from pipelines.training import reporting
from pipelines.training.reporting import Reporter, sample_grid

METRICS = {"loss": 1.0, "images_per_second": 5.0, "squared_error_r_equals_t": 2.0, "squared_error_r_below_t": 3.0}


@pytest.fixture
def _two_seeds(monkeypatch):
    """Limits sample grids to two columns to save decoding time."""
    monkeypatch.setattr(reporting, "GRID_SEEDS", 2)


@pytest.fixture
def unreachable():
    """A run whose MLflow server does not answer."""
    return Run("http://127.0.0.1:9", "1a2b")


@pytest.mark.usefixtures("_two_seeds")
def test_sample_grid_has_a_row_per_class_and_a_column_per_seed(pipeline):
    grid = sample_grid(pipeline)
    assert grid.dtype == np.uint8
    assert grid.shape == (10 * 66 - 2, 2 * 66 - 2, 3)
    [expected] = pipeline.images_from_seeds([3], [1], 1)
    found = grid[66 * 3 :, 66:][:64, :64]
    assert np.abs(found.astype(int) - expected.numpy().astype(int)).max() <= 1


def test_sample_grid_of_two_classes_has_two_rows(vae):
    network = MeanFlowDiT(sample_size=8, in_channels=4, num_classes=2, hidden_size=48, depth=1, num_heads=3)
    assert sample_grid(build_pipeline(network.eval(), vae, ["a", "b"])).shape == (2 * 66 - 2, 8 * 66 - 2, 3)


@pytest.mark.usefixtures("_two_seeds")
def test_only_the_reporter_with_a_run_logs(pipeline, tmp_path, tracking_uri, caplog):
    run = Run.begin(tracking_uri, "reporting", "name", {})
    with caplog.at_level(logging.INFO):
        for reporter in (Reporter(None, pipeline, 10, 0), Reporter(run, pipeline, 10, 0)):
            reporter.log_metrics(METRICS, 10)
            reporter.log_samples(10)
    run.flush()
    assert reporter.pending_rows() == []
    assert len([record for record in caplog.records if "trained 10 of 10 steps" in record.message]) == 1
    client = MlflowClient(tracking_uri)
    assert [metric.step for metric in client.get_metric_history(run.run_id, "loss")] == [10]
    names = [file.path for file in client.list_artifacts(run.run_id, "images") if file.path.endswith(".png")]
    assert sorted(name.split("~")[1].split("+")[0].split("%")[0] for name in names) == ["one_step", "two_steps"]
    images = [client.download_artifacts(run.run_id, name, str(tmp_path)) for name in sorted(names)]
    for path, num_steps in zip(images, (1, 2), strict=True):
        assert "step%10%" in path or "step+10+" in path
        assert np.array_equal(np.asarray(Image.open(path)), sample_grid(pipeline, num_steps))


def test_checkpoint_carries_metrics_that_mlflow_has_not_stored(pipeline, unreachable):
    reporter = Reporter(unreachable, pipeline, 10, 0)
    reporter.log_metrics(METRICS, 5)
    rows = reporter.pending_rows()
    assert len(rows) == 1
    resumed = Run("http://127.0.0.1:9", "1a2b")
    resumed.adopt(rows)
    assert resumed.pending() == rows


def test_logged_rate_counts_steps_since_the_resume(pipeline, unreachable, monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: now[0])
    reporter = Reporter(unreachable, pipeline, 10, 6)
    now[0] += 2.0
    with caplog.at_level(logging.INFO):
        reporter.log_metrics(METRICS, 10)
    assert "trained 10 of 10 steps, 2.0 steps/s" in caplog.text
