"""Runs the MLflow server of deploy/mlflow/compose.yaml with PostgreSQL and an S3 server."""

import base64
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import boto3
import mlflow
import pandas as pd
import psutil
import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import deploy.models
from pipelines import storage
from pipelines.demo import images
from pipelines.errors import InputError
from pipelines.tracking.run import Run
from pipelines.training import checkpoints
from tests.support.clusters import processes_of
from tests.support.compose import MLFLOW, compose_file, filled_in
from tests.support.latents import encode_demo_images
from tests.support.mlflow_server import Server
from tests.support.object_store import s3_bucket
from tests.support.postgres import Postgres, missing_programs
from tests.support.readme import REPOSITORY

MISSING = [*missing_programs(), *(name for name in ("psycopg2", "flask_wtf") if importlib.util.find_spec(name) is None)]
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=5"

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.soak,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} missing; make soak-deps installs them"),
]


class Deployment:
    """The services of the compose file, run as local processes instead of containers."""

    def __init__(self, postgres: Postgres, folder: Path, bucket: str) -> None:
        self.postgres = postgres
        self.passwords = {name: secrets.token_hex(24) for name in ("admin", "meanflow", "reader")}
        dotenv = {
            "POSTGRES_PASSWORD": postgres.password,
            "MLFLOW_ADMIN_PASSWORD": self.passwords["admin"],
            "MLFLOW_FLASK_SECRET_KEY": secrets.token_hex(24),
            "MLFLOW_ARTIFACTS": f"{bucket}/mlflow",
            **{name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")},
        }
        service = compose_file()["services"]["mlflow"]
        assert service["command"][:2] == ["mlflow", "server"]
        options = [word for word in service["command"][2:] if not word.startswith(("--host=", "--port="))]
        settings = folder / "basic_auth.ini"
        settings.write_text(self._with_local_database((MLFLOW / "basic_auth.ini").read_text()))
        environment = dict(zip(service["environment"], filled_in(service["environment"].values(), dotenv), strict=True))
        self.server = Server(
            folder,
            [self._with_local_database(word) for word in filled_in(options, dotenv)],
            {**environment, "MLFLOW_AUTH_CONFIG_PATH": str(settings), "HOME": str(folder)},
        )

    def _with_local_database(self, text: str) -> str:
        assert "@mlflow-postgres:5432/" in text or "@" not in text
        return text.replace("@mlflow-postgres:5432/", f"@127.0.0.1:{self.postgres.port}/")

    def environment(self, user: str | None) -> dict[str, str]:
        """The environment variables from which a stage takes the server's address and the login of `user`."""
        address = {"MLFLOW_TRACKING_URI": self.server.uri}
        if user is None:
            return address
        return {**address, "MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": self.passwords[user]}

    def request(
        self, path: str, user: str | None = None, host: str | None = None, content: object = None
    ) -> tuple[int, str]:
        """Sends a request; returns the status and text of the response."""
        request = urllib.request.Request(
            self.server.uri + path,
            data=None if content is None else json.dumps(content).encode(),
            headers={"Content-Type": "application/json"},
        )
        if user is not None:
            token = base64.b64encode(f"{user}:{self.passwords[user]}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        if host is not None:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def bucket():
    with s3_bucket() as uri:
        yield uri


@pytest.fixture(scope="module")
def deployment(bucket, tmp_path_factory):
    """A deployment with two users without admin rights, created as in docs/how-to/kubernetes.md."""
    with contextlib.ExitStack() as stack:
        postgres = Postgres()
        stack.callback(postgres.remove)
        started = Deployment(postgres, tmp_path_factory.mktemp("server"), bucket)
        stack.callback(started.server.stop)
        start = time.monotonic()
        started.server.start()
        print(f"the server was ready after {time.monotonic() - start:.0f} s")
        for user in ("meanflow", "reader"):
            user_and_password = {"username": user, "password": started.passwords[user]}
            status, text = started.request("/api/2.0/mlflow/users/create", "admin", content=user_and_password)
            assert status == 200, text
        yield started


@pytest.fixture
def as_user(deployment, monkeypatch):
    """A function that sets this process's MLflow credentials to those of a user."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def log_in(name: str) -> MlflowClient:
        for variable, value in deployment.environment(name).items():
            monkeypatch.setenv(variable, value)
        return MlflowClient(deployment.server.uri)

    return log_in


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    images.write_folder(root / "images", num_train=200, num_val=10, num_processes=1)
    return encode_demo_images(root / "images/train", root / "latents", 64)


@pytest.fixture
def start(deployment, latents, tmp_path):
    """A function that starts training in a process without the credentials of the artifact store."""
    ray_folder = tempfile.mkdtemp(prefix="mfr-", dir="/tmp")  # Unix socket paths must be short

    def start_training(name: str, environment: dict[str, str], *options: str) -> "Training":
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "MLFLOW_"))}
        return Training(
            [
                sys.executable, "-m", "pipelines.train", "debug", "--data", str(latents), "--storage",
                str(tmp_path / "runs"), "--run-name", name, "--cache-dir", str(tmp_path / "cache"), "--model-name", name,
                "--log-interval-steps", "5", "--checkpoint-interval-steps", "10", *options,
            ],
            {**inherited, **environment, "RAY_TMPDIR": ray_folder},
            tmp_path / "runs" / name,
            tmp_path / f"{name}.log",
        )  # fmt: skip

    yield start_training
    for process in processes_of(ray_folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    shutil.rmtree(ray_folder, ignore_errors=True)


class Training:
    """A training run in its own process."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
        self.folder, self._log = folder, log
        with open(log, "wb") as output:
            self._process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def finish(self, code: int = 0) -> str:
        """Waits for the process to end, checks its exit code and returns its log."""
        assert self._process.wait(timeout=500) == code, self.log()[-6000:]
        return self.log()

    def wait_until(self, condition, seconds: float = 200.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, self.log()[-6000:]
            assert time.monotonic() < deadline, self.log()[-6000:]
            time.sleep(0.3)

    def run_id(self) -> str:
        return json.loads((self.folder / "training.json").read_text())["mlflow_run_id"]

    def committed_step(self) -> int:
        latest = checkpoints.committed(*storage.open_storage(str(self.folder)))
        return 0 if latest is None else latest.step


def test_database_and_server_require_passwords(deployment):
    import psycopg2

    with pytest.raises(psycopg2.OperationalError, match="no password supplied"):
        psycopg2.connect(host="127.0.0.1", port=deployment.postgres.port, user="mlflow", dbname="mlflow")
    assert deployment.request("/health") == (200, "OK")
    assert deployment.request(SEARCH)[0] == 401
    assert deployment.request(SEARCH, "meanflow")[0] == 200
    another = {"username": "another", "password": "a" * 24}
    assert deployment.request("/api/2.0/mlflow/users/create", "meanflow", content=another)[0] == 403


def test_unknown_host_name_is_refused_with_an_error_that_names_the_remedy(deployment, as_user):
    port = deployment.server.port
    for host in (f"127.0.0.1:{port}", "mlflow:5000", "localhost:1"):
        assert deployment.request(SEARCH, "meanflow", host)[0] == 200, host
    for host in ("evil.example", "mlflow:5001", f"127.0.0.1.evil.example:{port}"):
        status, text = deployment.request(SEARCH, "meanflow", host)
        assert (status, "Invalid Host header" in text) == (403, True), host
        assert deployment.request("/health", host=host) == (200, "OK")  # health checks do not reveal the problem
    as_user("meanflow")
    with pytest.raises(InputError, match=r"refuses this host name .*--allowed-hosts.*Invalid Host header"):
        Run.begin(f"http://127.1:{port}", "experiment", "name", {})  # another name for the same address


@pytest.mark.parametrize("password", [None, "another"])
def test_training_without_the_password_fails_before_it_starts(deployment, start, as_user, password):
    environment = deployment.environment(None)
    if password is not None:
        environment |= {"MLFLOW_TRACKING_USERNAME": "meanflow", "MLFLOW_TRACKING_PASSWORD": password}
    training = start("refused", environment)
    log = training.finish(code=2)
    [error] = [line for line in log.splitlines() if line.startswith("error: ")]
    assert f"MLflow at {deployment.server.uri} requires a login; set MLFLOW_TRACKING_USERNAME" in error
    assert "Traceback" not in log
    assert not training.folder.exists()
    experiment = as_user("admin").get_experiment_by_name("meanflow-ray")
    assert experiment is None or not as_user("admin").search_runs(
        [experiment.experiment_id], "attributes.run_name = 'refused'"
    )


def test_training_logs_metrics_and_registers_a_model_that_loads_through_the_server(
    deployment, start, as_user, bucket, monkeypatch, tmp_path, caplog
):
    training = start("first", deployment.environment("meanflow"), "--num-steps", "40")
    assert "model: models:/first@candidate" in training.finish()
    client = as_user("meanflow")
    run = client.get_run(training.run_id())
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == list(range(5, 41, 5))
    assert (run.data.params["preset"], run.data.params["num_steps"]) == ("debug", "40")
    version = client.get_model_version_by_alias("first", "candidate")
    assert (version.version, version.run_id, version.status) == ("1", run.info.run_id, "READY")
    stored = boto3.client("s3").list_objects_v2(Bucket=bucket.removeprefix("s3://"), Prefix="mlflow/")["Contents"]
    assert [entry["Key"] for entry in stored if entry["Key"].endswith("model_index.json")]

    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)  # from here on, the store is accessible only through the server
    command = [sys.executable, "-m", "deploy.models", "models:/first@candidate"]
    resolved = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert resolved.stdout.strip() == "models:/first/1", resolved.stderr
    for through_server in (False, True):
        if through_server:
            monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
        caplog.clear()
        folder, source = deploy.models.fetch_generator("models:/first/1", deployment.server.uri)
        assert (folder / "model_index.json").is_file()
        assert source.run_id == run.info.run_id
        signed = [message for message in caplog.messages if "GET /bucket/" in message and "X-Amz-Signature=" in message]
        # By default, MLflow downloads from the store with URLs that the server signs.
        assert bool(signed) != through_server
    monkeypatch.chdir(tmp_path)
    rows = mlflow.pyfunc.load_model("models:/first@candidate").predict(pd.DataFrame({"class_label": [3], "seed": [7]}))
    assert rows["image_png"][0].startswith(b"\x89PNG")

    reader = as_user("reader")
    assert reader.get_run(run.info.run_id).info.status == "FINISHED"
    assert deploy.models.resolve_model("models:/first@candidate", deployment.server.uri) == "models:/first/1"
    for change in (
        lambda: reader.log_metric(run.info.run_id, "loss", 0.0, step=99),
        lambda: reader.set_registered_model_alias("first", "candidate", "1"),
        lambda: reader.log_text(run.info.run_id, "mine", "note.txt"),
    ):
        with pytest.raises((MlflowException, requests.HTTPError), match=r"(?i)permission denied|403"):
            change()
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    refused = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1
    assert "error: cannot find models:/first@candidate" in refused.stderr
    assert "401" in refused.stderr


def test_outages_of_database_and_server_lose_no_metrics(deployment, start, as_user):
    num_steps = 150
    postgres, server = deployment.postgres, deployment.server
    training = start("outages", deployment.environment("meanflow"), "--num-steps", str(num_steps))
    client = as_user("meanflow")

    def logged_step() -> int:
        data = client.get_run(training.run_id()).data.to_proto()
        return max([metric.step for metric in data.metrics if metric.key == "loss"], default=0)

    def train_20_more_steps() -> None:
        step = training.committed_step()
        training.wait_until(lambda: training.committed_step() >= step + 20)

    training.wait_until(lambda: (training.folder / "training.json").is_file() and logged_step() >= 10)
    postgres.crash()
    assert deployment.request("/health") == (200, "OK")
    assert deployment.request(SEARCH, "meanflow")[0] == 503
    train_20_more_steps()
    assert "cannot write to MLflow run" in training.log()
    postgres.start()
    start_time, step = time.monotonic(), training.committed_step()
    training.wait_until(lambda: logged_step() >= step)
    print(
        f"PostgreSQL restarted: metrics of step {step} logged after {time.monotonic() - start_time:.1f} s, "
        f"at step {logged_step()}"
    )

    server.stop()
    postgres.crash()
    train_20_more_steps()
    server.launch()  # before its database, as can happen after a power failure
    time.sleep(5)
    start_time = time.monotonic()
    postgres.start()
    server.wait()
    print(f"both restarted after {time.monotonic() - start_time:.1f} s, at step {training.committed_step()}")
    assert "caught up" in training.finish()
    run = client.get_run(training.run_id())
    assert run.info.status == "FINISHED"
    for name in ("loss", "gradient_norm"):
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
        assert steps == list(range(5, num_steps + 1, 5)), name
    assert deploy.models.resolve_model("models:/outages@candidate", server.uri) == "models:/outages/1"
    folder, _ = deploy.models.fetch_generator("models:/outages/1", server.uri)
    assert (folder / "model_index.json").is_file()
