"""The stages' job files, and the command that submits, follows and stops them, as far as that goes without a cluster."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import tomllib
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import aiohttp
import pytest
import ray
import tyro
import yaml
from ray._private.label_utils import validate_label_selector
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType
from ray.job_submission import JobStatus
from ray.runtime_env import RuntimeEnv

from deploy.jobs.__main__ import connect, follow, free_id, main, parse_arguments, run, stop
from deploy.jobs.job_file import JobError, JobFile, read_job_file
from pipelines.demo.__main__ import free_port
from pipelines.encode.job import EncodeJob
from pipelines.evaluate.job import EvaluateJob
from pipelines.train.run import parse_arguments as parse_training

REPOSITORY = Path(__file__).parents[2]
FILES = sorted((REPOSITORY / "deploy" / "jobs").glob("*.yaml"))
ENVIRONMENT = {"STORAGE": "s3://bucket/imagenet", "MLFLOW_TRACKING_URI": "http://mlflow:5000", "HOME": "/nobody"}


class Cluster:
    """In place of Ray's client: jobs whose statuses come one after the other."""

    def __init__(self, **statuses: list[JobStatus]):
        self.statuses = {name.replace("_", "-"): list(of_one) for name, of_one in statuses.items()}
        self.submitted: list[dict] = []
        self.stopped: list[str] = []
        self.error: Exception | None = None
        self.message = "why"
        self.started: dict[str, int] = {}

    def details(self, name):
        left = self.statuses[name]
        status = left.pop(0) if len(left) > 1 else left[0]
        return JobDetails(
            type=JobType.SUBMISSION, submission_id=name, status=status, entrypoint="python x", message=self.message,
            start_time=self.started.get(name, 1),
        )  # fmt: skip

    def submit_job(self, *, entrypoint, **options):
        self.submitted.append({"entrypoint": entrypoint, **options})
        self.statuses[options["submission_id"]] = [JobStatus.SUCCEEDED]
        return options["submission_id"]

    def list_jobs(self):
        return [self.details(name) for name in self.statuses]

    def get_job_info(self, name):
        if name not in self.statuses:
            raise RuntimeError(f"Request failed with status code 404: Job {name} does not exist.")
        return self.details(name)

    def stop_job(self, name):
        self.stopped.append(name)
        return True

    async def tail_job_logs(self, name):
        yield f"the log of {name}\n"
        if self.error is not None:
            raise self.error


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def ask(cluster: Cluster, *arguments: str, environment=ENVIRONMENT) -> int:
    return run(parse_arguments(arguments), lambda: cluster, environment)


def words_of(stage: str) -> list[str]:
    words = shlex.split(read_job_file(REPOSITORY / "deploy" / "jobs" / f"{stage}.yaml").entrypoint)
    assert words[:3] == ["python", "-m", f"pipelines.{stage}"]
    return words[3:]


def test_entrypoints_are_understood_by_the_stages_own_parsers():
    encode = tyro.cli(EncodeJob, args=words_of("encode"))
    preset, train = parse_training(words_of("train"))
    evaluate = tyro.cli(EvaluateJob, args=words_of("evaluate"))
    assert preset == "xl2"
    assert train.data == encode.output  # each stage takes what the one before left
    assert train.vae == encode.vae
    assert evaluate.model == f"models:/meanflow-{preset}@champion"
    # A cluster that scales from nothing has no GPUs when the driver asks, and the stages would go to CPUs.
    assert {encode.device, train.device, evaluate.device} == {"gpu"}
    assert encode.num_workers
    assert evaluate.num_workers
    # A submitted job works in a folder that goes with it.
    assert evaluate.output.is_absolute()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_job_is_what_ray_takes(path):
    job = read_job_file(path)
    RuntimeEnv(**job.runtime_env(ENVIRONMENT))
    assert validate_label_selector(job.entrypoint_label_selector) is None
    used = {word for word in job.entrypoint.replace("/", " ").split() if word.startswith("$")}
    assert {name.removeprefix("$") for name in used} <= set(job.env_from)  # nothing that the cluster does not know


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_file_suggests_is_valid_too(path):
    text = path.read_text().replace("  # - ", "  - ")
    job = JobFile.model_validate(yaml.safe_load(text))
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(job.env_from)


def test_training_is_given_time_for_a_checkpoint_when_it_is_stopped_and_for_machines_to_start():
    settings = read_job_file(REPOSITORY / "deploy" / "jobs" / "train.yaml").env_vars
    assert int(settings["RAY_JOB_STOP_WAIT_TIME_S"]) >= 300
    assert float(settings["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) >= 600
    constants = Path(ray.__file__).parent / "train/v2/_internal/constants.py"
    for name in settings:
        if name.startswith("RAY_TRAIN_"):
            assert f'"{name}"' in constants.read_text()


def test_drivers_of_encode_and_train_go_to_the_head_and_that_of_evaluate_to_a_cpu_machine():
    placements = {path.stem: read_job_file(path).placement() for path in FILES}
    assert placements["encode"] == placements["train"] == {}
    assert placements["evaluate"] == {
        "entrypoint_num_cpus": 4,
        "entrypoint_memory": 16 * 2**30,
        "entrypoint_label_selector": {"meanflow/pool": "cpu"},
    }


def test_a_job_is_submitted_as_its_file_says_with_values_of_the_listed_variables_alone():
    cluster = Cluster()
    assert ask(cluster, "submit", str(REPOSITORY / "deploy/jobs/train.yaml")) == 0
    [job] = cluster.submitted
    assert job["entrypoint"].startswith("python -m pipelines.train xl2 --data $STORAGE/latents ")
    assert "\n" not in job["entrypoint"]
    assert job["submission_id"] == "train-xl2"
    assert set(job) == {"entrypoint", "submission_id", "runtime_env"}
    variables = job["runtime_env"]["env_vars"]
    assert variables["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert variables["RAY_JOB_STOP_WAIT_TIME_S"] == "300"
    assert "HOME" not in variables


def test_a_folder_of_code_and_another_id_can_be_given(tmp_path):
    cluster = Cluster()
    file = str(REPOSITORY / "deploy/jobs/encode.yaml")
    ask(cluster, "submit", file, "--id", "mine", "--working-dir", str(tmp_path))
    assert cluster.submitted[0]["submission_id"] == "mine"
    assert cluster.submitted[0]["runtime_env"]["working_dir"] == str(tmp_path)
    with pytest.raises(JobError, match="no folder"):
        ask(cluster, "submit", file, "--working-dir", str(tmp_path / "missing"))


def test_a_job_of_a_name_that_was_used_gets_a_number_and_never_runs_twice_at_once():
    done, runs = [JobStatus.FAILED], [JobStatus.RUNNING]
    assert free_id(Cluster(), "train") == "train"
    assert free_id(Cluster(train=done), "train") == "train-2"
    assert free_id(Cluster(train=done, train_2=done), "train") == "train-3"
    with pytest.raises(JobError, match="train-2 is running already"):
        free_id(Cluster(train=done, train_2=runs), "train")
    with pytest.raises(JobError, match="train is pending already"):
        free_id(Cluster(train=[JobStatus.PENDING]), "train")


@pytest.mark.parametrize(
    ("status", "code"), [(JobStatus.SUCCEEDED, 0), (JobStatus.FAILED, 1), (JobStatus.STOPPED, 143)]
)
def test_the_exit_code_follows_the_job(status, code, capsys):
    assert follow(Cluster(train=[status]), "train") == code
    out = capsys.readouterr().out
    assert "the log of train\n" in out
    assert f"train: {status.value.lower()}" in out
    assert ("why" in out) == (status == JobStatus.FAILED)


def test_a_submission_that_is_followed_ends_with_its_job(tmp_path, capsys):
    cluster = Cluster()
    path = write(tmp_path, "{submission_id: a, entrypoint: python x}")
    assert ask(cluster, "submit", str(path), "--follow") == 0
    assert capsys.readouterr().out.splitlines() == ["a: submitted", "the log of a", "a: succeeded"]


def test_a_lost_connection_is_no_end_of_the_job():
    cluster = Cluster(train=[JobStatus.RUNNING])
    for error in (ConnectionResetError("reset"), RuntimeError("closed unexpectedly"), aiohttp.ClientError("gone")):
        cluster.error = error
        with pytest.raises(JobError, match="the job goes on: python -m deploy.jobs follow train"):
            follow(cluster, "train")
    cluster.error = None
    with pytest.raises(JobError, match="train goes on"):
        follow(cluster, "train")


@pytest.mark.parametrize("ask_for", [follow, stop])
def test_a_job_that_is_not_there_is_told_as_such(ask_for):
    with pytest.raises(JobError, match=r"no job other; python -m deploy.jobs list"):
        ask_for(Cluster(), "other")


def test_stopping_waits_for_the_jobs_end():
    statuses = [JobStatus.RUNNING, JobStatus.RUNNING, JobStatus.STOPPED]
    cluster, pauses = Cluster(train=statuses), []
    assert stop(cluster, "train", pause=pauses.append) == 0
    assert cluster.stopped == ["train"]
    assert len(pauses) == 2
    fails = [JobStatus.RUNNING, JobStatus.FAILED]
    assert stop(Cluster(train=fails), "train", pause=pauses.append) == 1


def test_a_job_that_has_ended_is_not_asked_to_stop(capsys):
    cluster = Cluster(train=[JobStatus.SUCCEEDED])
    assert stop(cluster, "train") == 0
    assert cluster.stopped == []
    assert capsys.readouterr().out == "train: succeeded\n"


def test_a_failed_jobs_log_is_not_printed_again_with_its_reason(capsys):
    cluster = Cluster(train=[JobStatus.FAILED])
    cluster.message = "command failed with exit code 3, last available logs (truncated to 20,000 chars):\nthe log\n"
    assert follow(cluster, "train") == 1
    assert capsys.readouterr().out == "the log of train\ntrain: failed: command failed with exit code 3\n"


def test_a_command_is_submitted_to_the_letter_but_for_space_around_it(tmp_path):
    cluster = Cluster()
    ask(
        cluster,
        "submit",
        str(write(tmp_path, "submission_id: a\nentrypoint: |\n  echo 'two  spaces'\n  echo second\n")),
    )
    assert cluster.submitted[0]["entrypoint"] == "echo 'two  spaces'\necho second"


def test_a_cluster_without_jobs_is_told_as_such(capsys):
    assert ask(Cluster(), "list") == 0
    assert capsys.readouterr().out == "no job was submitted yet\n"


def test_jobs_are_listed_the_last_one_first_with_when_they_began(capsys):
    cluster = Cluster(second_one=[JobStatus.RUNNING], first=[JobStatus.FAILED])
    days = {"first": 10, "second-one": 20}
    cluster.started = {name: int(datetime(2030, 1, day, 12).timestamp() * 1000) for name, day in days.items()}
    assert ask(cluster, "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["second-one", "RUNNING", "2030-01-20", "12:00"],
        ["first", "FAILED", "2030-01-10", "12:00"],
    ]


def test_follow_follows_and_stop_stops(capsys):
    cluster = Cluster(train=[JobStatus.RUNNING, JobStatus.STOPPED])
    assert ask(cluster, "stop", "train") == 0
    assert cluster.stopped == ["train"]
    assert ask(cluster, "follow", "train") == 143
    assert cluster.stopped == ["train"]
    assert "the log of train\n" in capsys.readouterr().out


def test_a_variable_that_is_not_set_is_named_before_anybody_is_asked():
    arguments = parse_arguments(["submit", str(REPOSITORY / "deploy/jobs/train.yaml")])
    with pytest.raises(JobError, match="MLFLOW_TRACKING_URI must be set.* export MLFLOW_TRACKING_URI="):
        run(arguments, lambda: pytest.fail("nobody is to be asked"), {"STORAGE": "s3://b", "MLFLOW_TRACKING_URI": ""})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{submission_id: a, entrypont: b}", "unknown key entrypont; known: submission_id, entrypoint"),
        ("{submission_id: a}", "entrypoint is missing"),
        ("{submission_id: a b, entrypoint: b}", "submission_id: .*, but got 'a b'"),
        ("{submission_id: a, entrypoint: ' '}", "entrypoint: .* at least 1 character"),
        ("{submission_id: a, entrypoint: [b, c]}", r"entrypoint: .* valid string, but got \['b', 'c'\]"),
        ("{submission_id: a, submission_id: b, entrypoint: c}", "submission_id stands there twice"),
        ("{submission_id: a, entrypoint: 'cd x; AWS_SECRET_ACCESS_KEY=abc python x'}", "secret .AWS_SECRET_ACCESS_KEY"),
        ("{submission_id: a, entrypoint: 'x --uri http://me:abc@mlflow'}", "secret .a password in an address"),
        ("{submission_id: a, entrypoint: b, env_vars: {MLFLOW_TRACKING_URI: 'http://me:abc@mlflow'}}", "like a secret"),
        ("{submission_id: a, entrypoint: b, env_vars: {X: 3}}", "env_vars.X must be text, but is 3: put it into quotes"),
        ("{submission_id: a, entrypoint: b, env_vars: {AWS_SECRET_ACCESS_KEY: x}}", "looks like a secret; list its name"),
        ("{submission_id: a, entrypoint: b, env_vars: {HF_TOKEN: x}}", "looks like a secret"),
        ("{submission_id: a, entrypoint: b, env_vars: {X: x}, env_from: [X]}", "X stands in env_vars and in env_from"),
        ("{submission_id: a, entrypoint: b, env_from: ['X=3']}", "env_from.0: "),
        ("{submission_id: a, entrypoint: b, entrypoint_num_cpus: -1}", "entrypoint_num_cpus: "),
        ("just text", "must hold keys and values, but holds str"),
        ("{a: [", "is no YAML"),
    ],
)  # fmt: skip
def test_faults_of_a_file_are_told_in_plain_words(tmp_path, text, message):
    with pytest.raises(JobError, match=message) as caught:
        read_job_file(write(tmp_path, text))
    assert "job.yaml" in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_a_command_may_name_secrets_of_the_environment(tmp_path):
    path = write(tmp_path, "{submission_id: a, entrypoint: 'TOKEN=$HF_TOKEN x --uri http://$ME:$PASSWORD@mlflow:5000'}")
    assert "$HF_TOKEN" in read_job_file(path).entrypoint


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(JobError, match=r"job.yaml must be text in UTF-8"):
        read_job_file(path)


def test_a_file_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(JobError, match=r"cannot read .*trian.yaml: No such file.*train.yaml"):
        read_job_file(REPOSITORY / "deploy" / "jobs" / "trian.yaml")


def test_an_address_is_wanted_and_the_one_given_counts():
    with pytest.raises(JobError, match="no address; give --address"):
        connect(None, {})
    with pytest.raises(JobError, match="must be like http://HEAD:8265"):
        connect("head:6379", {})
    with pytest.raises(ConnectionError):
        connect("https://127.0.0.1:9", {})
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    environment = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_API_SERVER_ADDRESS", address)  # as `connect` leaves it, when handed os.environ
        with pytest.raises(ConnectionError, match=address):
            connect(address, environment)
    assert environment["RAY_API_SERVER_ADDRESS"] == address


class Answers(BaseHTTPRequestHandler):
    """Ray's dashboard as far as a submission asks it, or one that refuses everything."""

    refusal: ClassVar[tuple[int, str] | None] = None
    received: ClassVar[list[dict]] = []

    def answer(self, content):
        status, text = self.refusal or (200, json.dumps(content))
        if status == 500 and self.path == "/api/version":  # a fault lies in what is asked, and not in the connection
            status, text = 200, json.dumps(content)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        earlier = {"type": "SUBMISSION", "submission_id": "train-xl2", "status": "STOPPED", "entrypoint": "python x"}
        self.answer(
            [earlier] if self.path.startswith("/api/jobs") else {"version": "4", "ray_version": ray.__version__}
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(body)
        self.answer({"job_id": body["submission_id"], "submission_id": body["submission_id"]})

    def log_message(self, format, *args):
        pass


def run_command(
    *arguments: str, refusal: tuple[int, str] | None = None
) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """`python -m deploy.jobs` with Ray's own client, and what arrived at the other end."""
    handler = type("Handler", (Answers,), {"refusal": refusal, "received": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asked = subprocess.run(
            [sys.executable, "-m", "deploy.jobs", *arguments, "--address", f"http://127.0.0.1:{server.server_port}"],
            cwd=REPOSITORY, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        server.shutdown()
    return asked, handler.received


def test_rays_own_client_sends_what_the_file_says():
    asked, [body] = run_command("submit", "deploy/jobs/train.yaml")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout == "train-xl2-2: submitted\n"  # an earlier one was stopped
    assert body["submission_id"] == "train-xl2-2"
    assert body["runtime_env"]["env_vars"]["STORAGE"] == ENVIRONMENT["STORAGE"]
    _, [body] = run_command("submit", "deploy/jobs/evaluate.yaml")
    assert body["entrypoint_label_selector"] == {"meanflow/pool": "cpu"}
    assert (body["entrypoint_num_cpus"], body["entrypoint_memory"]) == (4, 16 * 2**30)


@pytest.mark.parametrize(
    ("status", "text", "told"),
    [
        (401, "Unauthorized: Missing authentication token", "the cluster wants its token: export RAY_AUTH_MODE=token"),
        (403, "Forbidden: Invalid authentication token", "the cluster wants another token than this: export RAY_AUTH"),
        (200, "<html>something else</html>", "http://127.0.0.1:.* answers, but not as Ray's dashboard does"),
        (
            500,
            'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    raise ValueError\nValueError: in use\n.\n.',
            "ValueError: in use$",
        ),
    ],
)
def test_what_the_cluster_refuses_is_told_in_a_line(status, text, told):
    asked, _ = run_command("list", refusal=(status, text))
    assert asked.returncode == 2
    assert re.match(f"error: {told}", asked.stderr.splitlines()[-1])
    assert "Traceback" not in asked.stderr


def test_a_head_that_nobody_reaches_is_told_with_what_to_look_at(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jobs", "list", "--address", f"http://127.0.0.1:{free_port(0)}"])
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("Is the tunnel open (ray dashboard ray_cluster.yaml), and the address right?")


def test_an_interrupt_leaves_the_job_alone_and_says_so(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["jobs", "follow", "train-xl2", "--address", "http://127.0.0.1:8265"])
    monkeypatch.setattr("deploy.jobs.__main__.run", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; a job that was submitted goes on\n"


def test_job_and_cluster_files_are_part_of_the_installed_package():
    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "deploy"
    ]
    files = [path.relative_to(REPOSITORY / "deploy") for path in (REPOSITORY / "deploy").rglob("*.yaml")]
    assert len(files) >= 6
    for path in files:
        assert any(path.match(pattern) for pattern in patterns if "/" in pattern or len(path.parts) == 1), path
