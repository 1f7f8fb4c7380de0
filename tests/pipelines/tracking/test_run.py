import os
import threading

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from pipelines.errors import InputError
from pipelines.tracking import outbox
from pipelines.tracking.run import Run
from pipelines.tracking.server import resolve_tracking_uri


def test_tracking_uri_is_the_configured_one_or_a_database_in_the_storage_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri("runs", num_nodes=1) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_tracking_uri(f"file://{tmp_path}/runs", num_nodes=1).endswith(f"{tmp_path}/runs/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert resolve_tracking_uri("s3://bucket/runs", num_nodes=8) == "http://mlflow:5000"


@pytest.mark.parametrize(("storage", "num_nodes"), [("s3://bucket/runs", 1), ("runs", 2)])
def test_remote_storage_and_multiple_nodes_require_a_server(storage, num_nodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="set MLFLOW_TRACKING_URI"):
        resolve_tracking_uri(storage, num_nodes)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(tracking_uri):
    return Run.begin(tracking_uri, "experiment", "name", {"network.depth": 2}, {"git_commit": "0a1b"})


def history(run, key):
    return [(metric.step, metric.value) for metric in run.client.get_metric_history(run.run_id, key)]


def test_run_can_be_resumed_by_its_id(run):
    run.log_metrics({"loss": 1.5}, step=1)
    run.end("KILLED")
    again = Run(run.tracking_uri, run.run_id)
    again.resume()
    assert run.client.get_run(run.run_id).info.status == "RUNNING"
    again.log_metrics({"loss": 0.5}, step=2)
    again.end("FINISHED")
    found = run.client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"network.depth": "2"}
    assert found.data.tags["git_commit"] == "0a1b"
    assert history(run, "loss") == [(1, 1.5), (2, 0.5)]
    with pytest.raises(InputError, match="has no MLflow run"):
        Run(run.tracking_uri, "0" * 32).resume()


def test_repeated_steps_are_skipped_per_key_except_for_evaluations(run):
    for value in (0.5, 0.6):
        again = Run(run.tracking_uri, run.run_id)
        for step in (1, 2):
            again.log_metrics({"loss": value, "evaluate/accuracy": value}, step)
        again.log_metrics({"loss": value, f"new at {value}": value}, 2)
        assert again.flush()
    assert history(run, "loss") == [(1, 0.5), (2, 0.5)]
    assert history(run, "new at 0.6") == [(2, 0.6)]
    assert sorted(history(run, "evaluate/accuracy")) == [(1, 0.5), (1, 0.6), (2, 0.5), (2, 0.6)]


def test_images_and_dicts_are_copied_when_queued(run, tmp_path):
    image, content = np.full((8, 8, 3), 7, np.uint8), {"depth": 2}
    run.log_image(image, "samples/one", 1)
    run.log_dict(content, "folder/config.json")
    image[:], content["depth"] = 0, 3
    run.log_image(image, "samples/one", 1)
    assert run.flush()
    folder = mlflow.artifacts.download_artifacts(
        run_id=run.run_id, tracking_uri=run.tracking_uri, dst_path=str(tmp_path)
    )
    (png,) = [name for name in os.listdir(f"{folder}/images") if name.endswith(".png")]
    assert (np.asarray(Image.open(f"{folder}/images/{png}")) == 7).all()
    with open(f"{folder}/folder/config.json") as file:
        assert file.read() == '{\n  "depth": 2\n}\n'


def test_refused_entries_are_dropped_with_a_warning(run, tmp_path, caplog, monkeypatch):
    start = run._outbox._start
    monkeypatch.setattr(run._outbox, "_start", lambda: None)  # so that one request contains all metrics
    for step, key in ((1, "loss"), (2, "what: this?!\n"), (3, "loss")):
        run.log_metrics({key: 1.0}, step)
    run.log_file(tmp_path / "gone.txt", "folder")
    run.log_image(np.zeros((8, 8, 3), np.uint8), "bad+key", 1)
    run.log_dict({}, "kept.json")
    start()
    assert run.flush()
    assert "refused metrics what: this?!\n of step 2: MlflowException" in caplog.text
    assert "refused file folder/gone.txt: FileNotFoundError" in caplog.text
    assert "refused image bad+key of step 1: ValueError" in caplog.text
    assert history(run, "loss") == [(1, 1.0), (3, 1.0)]
    assert "kept.json" in [file.path for file in run.client.list_artifacts(run.run_id)]


def test_full_queue_drops_new_entries_with_a_warning(run, monkeypatch, caplog):
    monkeypatch.setattr(outbox, "MAX_QUEUED_BYTES", 10 * outbox.BYTES_PER_METRIC)
    start = run._outbox._start
    monkeypatch.setattr(run._outbox, "_start", lambda: None)
    for step in range(15):
        run.log_metrics({"loss": 1.0}, step)
    run.log_image(np.zeros((8, 8, 3), np.uint8), "samples", 1)
    assert [row["step"] for row in run.pending()] == list(range(10))
    assert not run.flush(0.0)
    assert caplog.messages[-1].endswith("10 entries are not written after 0 s, the first: metrics loss of step 0")
    start()
    assert run.flush()
    assert caplog.messages[-1].endswith("lost 6 entries because the queue was full")
    assert [step for step, _ in history(run, "loss")] == list(range(10))


def test_writer_thread_ends_when_the_queue_is_empty_and_restarts_on_demand(run):
    run.log_metrics({"loss": 1.0}, 1)
    run.end("FINISHED")
    for thread in threading.enumerate():
        if thread.name == "mlflow-outbox":
            thread.join(5)
            assert not thread.is_alive()
    run.log_metrics({"loss": 1.0}, 2)  # later stages also log to a run that has ended
    assert run.flush()
    assert history(run, "loss") == [(1, 1.0), (2, 1.0)]


@pytest.mark.parametrize(("configured", "expected"), [(None, "0"), ("5", "5")])
def test_mlflow_does_not_retry_http_requests_unless_configured(run, monkeypatch, configured, expected):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    if configured:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", configured)
    run.log_metrics({"loss": 1.0}, 1)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == expected
    assert run.flush()


def test_failed_upload_is_retried_without_delaying_metrics(run, monkeypatch, caplog):
    monkeypatch.setattr(outbox.Outbox, "first_pause_seconds", 0.01)
    is_unreachable = threading.Event()
    is_unreachable.set()
    upload = MlflowClient.log_text

    def log_text(client, *arguments):
        if is_unreachable.is_set():
            raise ConnectionError("no artifact store")
        upload(client, *arguments)

    monkeypatch.setattr(MlflowClient, "log_text", log_text)
    run.log_dict({}, "config.json")
    for step in (1, 2):
        run.log_metrics({"loss": 1.0}, step)
    assert not run.flush(1.0)
    assert run.pending() == []
    assert caplog.messages[-1].endswith("1 entries are not written after 1 s, the first: file config.json")
    is_unreachable.clear()
    assert run.flush()
    assert history(run, "loss") == [(1, 1.0), (2, 1.0)]
    assert [file.path for file in run.client.list_artifacts(run.run_id)] == ["config.json"]
    assert sum("cannot write to MLflow run" in message for message in caplog.messages) == 1
