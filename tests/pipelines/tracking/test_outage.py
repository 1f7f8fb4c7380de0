"""Tests `Run` with a real MLflow server behind a proxy that can simulate outages."""

import contextlib
import json
import logging
import socket
import threading
import time

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from pipelines.errors import InputError
from pipelines.tracking import outbox
from pipelines.tracking.outbox import Outbox
from pipelines.tracking.registry import fetch_generator, register_generator
from pipelines.tracking.run import Run
from tests.support.mlflow_server import Server
from tests.support.waiting import wait_until

pytestmark = pytest.mark.soak  # the server alone takes half a minute to start


class Proxy:
    """A local TCP proxy. `cut` closes and refuses connections until `restore`.

    Drops the replies to requests that contain a word in `drop_replies_to`.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self.drop_replies_to: tuple[bytes, ...] = ()
        self.dropped: set[bytes] = set()
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        with contextlib.suppress(OSError):  # already cut
            self._listener.shutdown(socket.SHUT_RDWR)  # makes accept in the other thread return
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):  # close alone does not end a recv in another thread
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._open.clear()

    def restore(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._open += [client, server]
            drops_reply = threading.Event()
            threading.Thread(target=self._forward, args=[client, server, drops_reply, False], daemon=True).start()
            threading.Thread(target=self._forward, args=[server, client, drops_reply, True], daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, drops: threading.Event, is_reply: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                words = [] if is_reply else [word for word in self.drop_replies_to if word in data]
                self.dropped.update(words)
                if words:
                    drops.set()
                if is_reply and drops.is_set():
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def server_port(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server.port
    finally:
        server.stop()


@pytest.fixture
def proxy(server_port, monkeypatch):
    """A proxy of the server, with short pauses between retries."""
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setattr(Outbox, "first_pause_seconds", 0.05)
    monkeypatch.setattr(Outbox, "longest_pause_seconds", 0.2)
    proxy = Proxy(server_port)
    yield proxy
    proxy.cut()


@pytest.fixture
def run(proxy):
    return Run.begin(proxy.uri, "experiment", "name", {"depth": 2}, {"git_commit": "0a1b"})


def steps_of(run, key="loss"):
    return [metric.step for metric in run.client.get_metric_history(run.run_id, key)]


def image(value=0):
    return np.full((8, 8, 3), value, np.uint8)


def images_of(run):
    paths = [file.path for file in run.client.list_artifacts(run.run_id, "images")]
    return sorted(path.split("+timestamp")[0] for path in paths if path.endswith(".png"))


def test_outage_loses_nothing_and_does_not_block_callers(proxy, run, caplog, monkeypatch):
    monkeypatch.setattr(outbox, "METRICS_PER_REQUEST", 5)
    caplog.set_level(logging.INFO, "pipelines")
    run.log_metrics({"loss": 1.0, "validation/fid": 9.0}, 1)
    assert run.flush()
    proxy.cut()
    began = time.monotonic()
    for step in range(2, 21):
        run.log_metrics({"loss": 1 / step}, step)
        if step % 6 == 0:
            time.sleep(0.1)
    run.log_image(image(), "samples/one_step", 20)
    run.log_dict({"depth": 2}, "config.json")
    assert time.monotonic() - began < 2, "the caller waited"
    assert not run.flush(0.1)
    assert len(run.pending()) == 19
    proxy.restore()
    assert run.flush(20)
    assert steps_of(run) == list(range(1, 21))
    assert images_of(run) == ["images/samples~one_step+step+20"]
    path = mlflow.artifacts.download_artifacts(run_id=run.run_id, artifact_path="config.json", tracking_uri=proxy.uri)
    with open(path) as file:
        assert json.load(file) == {"depth": 2}
    retrying, missing, caught_up = [record.getMessage() for record in caplog.records if record.name == outbox.__name__]
    assert retrying.startswith(f"cannot write to MLflow run {run.run_id}, retrying (MlflowException: API request to")
    assert "(Caused by" in retrying
    assert "21 entries are not written after 0.1 s, the first: metrics loss of step 2" in missing
    assert caught_up.endswith("has caught up")


def test_run_is_ended_later_if_the_server_is_unreachable(proxy, run, caplog):
    proxy.cut()
    run.log_metrics({"loss": 1.0}, 1)
    run.end("FINISHED", patience_seconds=0.1)
    assert "2 entries are not written" in caplog.text
    proxy.restore()
    wait_until(lambda: run.client.get_run(run.run_id).info.status == "FINISHED")
    assert steps_of(run) == [1]


def test_lost_reply_does_not_cause_duplicates(proxy, run):
    run.log_metrics({"loss": 0.1, "nan": float("nan")}, 1)
    run.log_image(image(), "samples", 1)
    assert run.flush()
    proxy.drop_replies_to = (b"log-batch", b"set-tag")  # the last request that metrics send, and the last of an image
    run.log_metrics({"loss": 0.2, "nan": float("nan")}, 2)
    run.log_image(image(), "samples", 2)
    wait_until(lambda: b"log-batch" in proxy.dropped)
    assert not run.flush(0.1)
    proxy.drop_replies_to = (b"set-tag",)
    wait_until(lambda: b"set-tag" in proxy.dropped)
    proxy.drop_replies_to = ()
    run.log_metrics({"loss": 0.3}, 3)
    assert run.flush()
    assert steps_of(run) == [1, 2, 3]
    assert steps_of(run, "nan") == [1, 2]
    assert images_of(run) == ["images/samples+step+1", "images/samples+step+2"]


def test_resuming_during_an_outage_sets_the_status_later(proxy, run, caplog):
    run.end("KILLED")
    assert run.client.get_run(run.run_id).info.status == "KILLED"
    proxy.cut()
    again = Run(proxy.uri, run.run_id)
    again.resume()
    assert "continuing without MLflow" in caplog.text
    proxy.restore()
    assert again.flush()
    assert run.client.get_run(run.run_id).info.status == "RUNNING"


def test_unwritten_metrics_are_restored_from_a_checkpoint(proxy, run):
    run.log_metrics({"loss": 1.0}, 1)
    assert run.flush()
    assert run.pending() == []
    proxy.cut()
    for step in (2, 3):
        run.log_metrics({"loss": float("inf")}, step)
    carried = json.loads(json.dumps(run.pending()))
    assert [row["step"] for row in carried] == [2, 3]

    again = Run(proxy.uri, run.run_id)
    again.adopt([{"step": 1, "timestamp_ms": 1, "metrics": {"loss": 5.0}}, *carried])
    again.log_metrics({"loss": 4.0}, 4)
    assert [row["step"] for row in again.pending()] == [1, 2, 3, 4]
    proxy.restore()
    assert again.flush()
    assert run.flush()  # the first process may still be alive and write the same rows again
    history = run.client.get_metric_history(run.run_id, "loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4]
    assert [metric.timestamp for metric in history[1:3]] == [row["timestamp_ms"] for row in carried]


def test_registration_waits_for_the_server_and_does_not_change_a_finished_run(
    proxy, run, pipeline, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for step in (0, 1):
        run.log_metrics({"loss": 1.0}, step)
    run.end("FINISHED")
    before = run.client.get_run(run.run_id).info
    pipeline.save_pretrained(tmp_path / "generator")
    proxy.cut()
    threading.Timer(0.5, proxy.restore).start()
    assert register_generator(run, tmp_path / "generator", "small") == "models:/small@candidate"
    assert register_generator(run, tmp_path / "generator", "small") == "models:/small@candidate"
    after = run.client.get_run(run.run_id).info
    assert (after.status, after.end_time) == ("FINISHED", before.end_time)
    assert steps_of(run) == [0, 1]
    version = run.client.get_model_version_by_alias("small", "candidate")
    assert (version.version, version.run_id, version.status) == ("2", run.run_id, "READY")
    assert (fetch_generator(f"runs:/{run.run_id}/small", proxy.uri) / "model_index.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generator"]


def test_new_run_requires_a_reachable_server(proxy):
    proxy.cut()
    began = time.monotonic()
    with pytest.raises(InputError, match=r"cannot reach MLflow at http://127.*start it, or set MLFLOW_TRACKING_URI"):
        Run.begin(proxy.uri, "experiment", "name", {})
    assert time.monotonic() - began < 5
    proxy.restore()
    with pytest.raises(InputError, match="refuses the run name"):
        Run.begin(proxy.uri, "refusals", "name", {"what?!": 1})
    client = MlflowClient(proxy.uri)
    (failed,) = client.search_runs([client.get_experiment_by_name("refusals").experiment_id])
    assert failed.info.status == "FAILED"


def test_system_metrics_continue_after_an_outage_and_after_a_restart(proxy, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1")
    key = "system/node-1/cpu_utilization_percentage"
    with run.system_metrics("node-1"):
        time.sleep(0.3)
        proxy.cut()
        time.sleep(0.5)
        assert run._outbox.rows()
        assert run.pending() == []  # excluded from checkpoints
        proxy.restore()
    assert "SystemMetricsMonitor" not in [thread.name for thread in threading.enumerate()]
    assert run.flush()
    first = steps_of(run, key)
    assert len(first) >= 6
    again = Run(proxy.uri, run.run_id)
    with again.system_metrics("node-1"):
        time.sleep(0.3)
    assert again.flush()
    steps = steps_of(run, key)
    assert len(steps) > len(first)
    assert steps == list(range(len(steps)))
    assert not list(tmp_path.iterdir())
