"""A run against a real MLflow server, over a line that can be cut."""

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
from pipelines.tracking.registry import fetch_generator
from pipelines.tracking.run import Run
from tests.support.mlflow_server import Server

pytestmark = pytest.mark.soak  # the server alone takes half a minute to start


class Line:
    """A port of 127.0.0.1 that leads to another one; cut, it refuses connections.

    It may lose the replies to requests that contain one of some words.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self.loses_replies_to: tuple[bytes, ...] = ()
        self.lost: set[bytes] = set()
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        with contextlib.suppress(OSError):  # cut already
            self._listener.shutdown(socket.SHUT_RDWR)  # accept in the other thread returns
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):  # closing alone does not end a recv in another thread
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._open.clear()

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._open += [near, far]
            doomed = threading.Event()
            threading.Thread(target=self._carry, args=[near, far, doomed, False], daemon=True).start()
            threading.Thread(target=self._carry, args=[far, near, doomed, True], daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, doomed: threading.Event, is_reply: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                words = [] if is_reply else [word for word in self.loses_replies_to if word in data]
                self.lost.update(words)
                if words:
                    doomed.set()
                if is_reply and doomed.is_set():
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
def line(server_port, monkeypatch):
    """A line to the server; pauses between attempts are short."""
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setattr(Outbox, "first_pause_seconds", 0.05)
    monkeypatch.setattr(Outbox, "longest_pause_seconds", 0.2)
    line = Line(server_port)
    yield line
    line.cut()


@pytest.fixture
def run(line):
    return Run.begin(line.uri, "experiment", "name", {"depth": 2}, {"git_commit": "0a1b"})


def steps_of(run, key="loss"):
    return [metric.step for metric in MlflowClient(run.tracking_uri).get_metric_history(run.run_id, key)]


def picture(value=0):
    return np.full((8, 8, 3), value, np.uint8)


def pictures_of(run):
    paths = [file.path for file in MlflowClient(run.tracking_uri).list_artifacts(run.run_id, "images")]
    return sorted(path.split("+timestamp")[0] for path in paths if path.endswith(".png"))


def test_what_is_logged_while_the_server_is_away_arrives_in_order_and_once(line, run, caplog, monkeypatch):
    monkeypatch.setattr(outbox, "METRICS_PER_REQUEST", 5)
    caplog.set_level(logging.INFO, "pipelines")
    run.log_metrics({"loss": 1.0, "validation/fid": 9.0}, 1)
    assert run.flush()
    line.cut()
    began = time.monotonic()
    for step in range(2, 21):
        run.log_metrics({"loss": 1 / step}, step)
        if step % 6 == 0:
            time.sleep(0.1)
    run.log_image(picture(), "samples/one_step", 20)
    run.log_dict({"depth": 2}, "config.json")
    assert time.monotonic() - began < 2, "the caller waited"
    assert not run.flush(0.1)
    assert len(run.pending()) == 19
    line.mend()
    assert run.flush(20)
    assert steps_of(run) == list(range(1, 21))
    assert pictures_of(run) == ["images/samples~one_step+step+20"]
    path = mlflow.artifacts.download_artifacts(run_id=run.run_id, artifact_path="config.json", tracking_uri=line.uri)
    with open(path) as file:
        assert json.load(file) == {"depth": 2}
    began, ended = [record.getMessage() for record in caplog.records if record.name == "pipelines.tracking.outbox"]
    assert began.startswith(f"cannot write to MLflow run {run.run_id} (MlflowException: API request to {line.uri}")
    assert "(Caused by" in began
    assert ended.endswith("caught up: 21 entries")


def test_giving_up_says_what_was_not_logged(line, run, caplog):
    line.cut()
    for step in (3, 4, 5):
        run.log_metrics({"loss": 1.0, "rate": 2.0}, step)
    run.log_image(picture(), "samples/one_step", 4)
    run.log_image(picture(), "samples/one_step", 5)
    run.log_dict({}, "config.json")
    began = time.monotonic()
    assert not run.flush(0.3)
    assert time.monotonic() - began < 1
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "pipelines.tracking"]
    assert warning.endswith(
        "after 0.3 s: 3 metric rows (steps 3 to 5); pictures samples/one_step (steps 4, 5); file config.json"
    )


def test_a_server_that_is_away_at_the_end_is_a_warning_and_is_told_when_it_is_back(line, run, caplog):
    line.cut()
    run.log_metrics({"loss": 1.0}, 1)
    run.end("FINISHED", patience_seconds=0.1)
    assert "1 metric rows (steps 1 to 1); status FINISHED" in caplog.text
    line.mend()
    client = MlflowClient(line.uri)
    wait_until(lambda: client.get_run(run.run_id).info.status == "FINISHED")
    assert steps_of(run) == [1]


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_reply_that_was_lost_does_not_log_twice(line, run):
    run.log_metrics({"loss": 0.1, "nan": float("nan")}, 1)
    run.log_image(picture(), "samples", 1)
    assert run.flush()
    line.loses_replies_to = (b"log-batch", b"set-tag")  # what a row of metrics and what a picture ends with
    run.log_metrics({"loss": 0.2, "nan": float("nan")}, 2)
    run.log_image(picture(), "samples", 2)
    wait_until(lambda: line.lost == {b"log-batch", b"set-tag"})
    assert not run.flush(0.1)
    line.loses_replies_to = ()
    run.log_metrics({"loss": 0.3}, 3)
    assert run.flush()
    assert steps_of(run) == [1, 2, 3]
    assert steps_of(run, "nan") == [1, 2]
    assert pictures_of(run) == ["images/samples+step+1", "images/samples+step+2"]


def test_metrics_do_not_wait_for_an_artifact_store_that_fails_alone(line, run, caplog):
    line.loses_replies_to = (b"mlflow-artifacts",)
    run.log_image(picture(), "samples", 1)
    for step in (1, 2):
        run.log_metrics({"loss": 1.0}, step)
    wait_until(lambda: run.pending() == [])
    assert steps_of(run) == [1, 2]
    assert not run.flush(0.1)
    assert caplog.messages[-1].endswith("after 0.1 s: pictures samples (steps 1)")
    line.loses_replies_to = ()
    assert run.flush()


def test_a_restarted_run_logs_its_last_steps_again_and_they_stand_there_once(line, run):
    for step in range(1, 11):
        run.log_metrics({"loss": 1.0, "rate": 2.0}, step)
    run.log_metrics({"validation/fid": 3.0}, 4)
    run.log_image(picture(), "samples", 10)
    assert run.flush()

    again = Run(line.uri, run.run_id)
    again.resume()
    for step in range(1, 21):
        again.log_metrics({"loss": 1.5, "rate": 2.0}, step)
    again.log_metrics({"validation/fid": 3.5, "validation/new": 1.0}, 4)
    again.log_metrics({"validation/fid": 2.0}, 8)
    for step in (10, 20):
        again.log_image(picture(), "samples", step)
    assert again.flush()
    assert steps_of(run) == steps_of(run, "rate") == list(range(1, 21))
    assert steps_of(run, "validation/fid") == [4, 8]
    assert steps_of(run, "validation/new") == [4]
    assert pictures_of(run) == ["images/samples+step+10", "images/samples+step+20"]


def test_a_refused_value_is_named_and_the_others_are_logged(line, run, caplog):
    line.cut()  # so that all of them go in one request
    for step, key in ((1, "loss"), (2, "what: this?!\n"), (3, "loss")):
        run.log_metrics({key: 1.0}, step)
    line.mend()
    assert run.flush()
    assert steps_of(run) == [1, 3]
    assert "goes without metrics what: this?!\n of step 2: RestException: INVALID_PARAMETER_VALUE" in caplog.text


def test_a_restart_without_a_server_goes_on_and_marks_the_run_later(line, run, caplog):
    client = MlflowClient(line.uri)
    run.end("KILLED")
    assert client.get_run(run.run_id).info.status == "KILLED"
    line.cut()
    again = Run(line.uri, run.run_id)
    again.resume()
    assert "going on without MLflow" in caplog.text
    line.mend()
    assert again.flush()
    assert client.get_run(run.run_id).info.status == "RUNNING"


def test_a_checkpoint_carries_what_was_not_written(line, run):
    run.log_metrics({"loss": 1.0}, 1)
    assert run.flush()
    assert run.pending() == []
    line.cut()
    for step in (2, 3):
        run.log_metrics({"loss": float("inf")}, step)
    carried = json.loads(json.dumps(run.pending()))
    assert [row["step"] for row in carried] == [2, 3]

    again = Run(line.uri, run.run_id)
    again.adopt([{"step": 1, "timestamp_ms": 1, "metrics": {"loss": 5.0}}, *carried])
    again.log_metrics({"loss": 4.0}, 4)
    assert [row["step"] for row in again.pending()] == [1, 2, 3, 4]
    line.mend()
    assert again.flush()
    assert run.flush()  # the one that was thought dead writes the same rows again
    history = MlflowClient(line.uri).get_metric_history(run.run_id, "loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4]
    assert [metric.timestamp for metric in history[1:3]] == [row["timestamp_ms"] for row in carried]


def test_the_registry_waits_for_the_server_and_a_finished_run_stays_so(line, run, pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (0, 1):
        run.log_metrics({"loss": 1.0}, step)
    run.end("FINISHED")
    client = MlflowClient(line.uri)
    before = client.get_run(run.run_id).info
    pipeline.save_pretrained(tmp_path / "generator")
    line.cut()
    threading.Timer(0.5, line.mend).start()
    assert run.register_generator(tmp_path / "generator", "small") == "models:/small@champion"
    assert run.register_generator(tmp_path / "generator", "small") == "models:/small@champion"
    after = client.get_run(run.run_id).info
    assert (after.status, after.end_time) == ("FINISHED", before.end_time)
    assert steps_of(run) == [0, 1]
    version = client.get_model_version_by_alias("small", "champion")
    assert (version.version, version.run_id, version.status) == ("2", run.run_id, "READY")
    assert (fetch_generator(f"runs:/{run.run_id}/small", line.uri) / "model_index.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generator"]


def test_a_begun_run_needs_a_server_and_says_how(line):
    line.cut()
    began = time.monotonic()
    with pytest.raises(InputError, match=r"cannot reach MLflow at http://127.*start it, or set MLFLOW_TRACKING_URI"):
        Run.begin(line.uri, "experiment", "name", {})
    assert time.monotonic() - began < 5
    line.mend()
    with pytest.raises(InputError, match="refuses the run name"):
        Run.begin(line.uri, "refusals", "name", {"what?!": 1})
    client = MlflowClient(line.uri)
    (left,) = client.search_runs([client.get_experiment_by_name("refusals").experiment_id])
    assert left.info.status == "FAILED"


def test_system_metrics_go_on_after_an_outage_and_after_a_restart(line, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    key = "system/node-1/cpu_utilization_percentage"
    with run.system_metrics("node-1"):
        time.sleep(0.3)
        line.cut()
        time.sleep(0.5)
        assert run._outbox.rows()
        assert run.pending() == []  # they number themselves, and have no place in a checkpoint
        line.mend()
        wait_until(lambda: not run._outbox._failing())
    assert "SystemMetricsMonitor" not in [thread.name for thread in threading.enumerate()]
    assert run.flush()
    first = steps_of(run, key)
    assert len(first) >= 6
    with Run(line.uri, run.run_id).system_metrics("node-1") as monitor:
        time.sleep(0.3)
    monitor._outbox.flush(10)
    steps = steps_of(run, key)
    assert len(steps) > len(first)
    assert steps == list(range(len(steps)))
    assert not list(tmp_path.iterdir())
