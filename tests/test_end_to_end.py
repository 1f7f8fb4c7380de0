"""Runs the documented commands of all stages, with few images and few steps."""

import contextlib
import io
import json
import logging
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
from mlflow import MlflowClient
from PIL import Image

from meanflow_core.autoencoder import weight_hash
from meanflow_core.generator import load_pipeline
from meanflow_core.presets import PRESETS
from pipelines.cluster import start_ray
from pipelines.demo import images
from pipelines.demo.serving import fetch, free_port, wait_until_ready
from pipelines.latents.manifest import read_manifest
from tests.support.latents import read_shards
from tests.support.readme import REPOSITORY, commands
from tests.support.training_checkpoints import train_in_this_process

# Options added to the README's commands: few images, few steps, few processes.
SMALLER = {
    "pipelines.demo.images": ["--num-train", "80", "--num-val", "40"],
    "pipelines.encode": ["--images-per-shard", "32", "--max-rejected-fraction", "0.02", "--num-workers", "1"],
    "pipelines.check": ["--figure", "check.png"],
    "pipelines.train": ["--cache-dir", "cache", "--num-steps", "15", "--sample-interval-steps", "15"],
    "pipelines.evaluate": ["--num-samples", "40", "--steps", "1", "2", "--num-workers", "1"],
}
STAGES = ("pipelines.demo.images", "pipelines.encode", "pipelines.check", "pipelines.train", "pipelines.evaluate")
PAGE = "docs/reference/files.md"
DAMAGED = "d0000004/d0000004_24"  # truncated before encoding

pytestmark = pytest.mark.soak  # tests/test_own_images.py runs the same stages in `make test`


@dataclass(frozen=True)
class Workspace:
    """The working directory of the README's commands, whose paths are relative."""

    folder: Path
    environment: dict[str, str]

    @property
    def build(self) -> Path:
        return self.folder / "build"

    def documented(self, prefix: str) -> list[str]:
        """The README's command with this prefix, with the debug preset and the options of SMALLER."""
        line = next(line for line in commands("stages", PAGE) if line.startswith(prefix))
        words = shlex.split(line.replace("pipelines.train demo", "pipelines.train debug"))
        return words + SMALLER.get(words[2], [])

    def run(self, words: list[str], expected_code: int = 0) -> subprocess.CompletedProcess:
        result = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == expected_code, result.stdout[-3000:] + result.stderr[-6000:]
        return result


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "pipelines").symlink_to(REPOSITORY / "pipelines")  # a command names the autoencoder in it
    ray_folder = tempfile.mkdtemp(prefix="mfr-", dir="/tmp")  # Unix socket paths must be short
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"RAY_TMPDIR": ray_folder, "PATH": path, "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}
    yield Workspace(folder, {**os.environ, **environment})
    shutil.rmtree(ray_folder, ignore_errors=True)


@dataclass(frozen=True)
class Trained:
    """The stages up to evaluate, finished."""

    build: Path
    """The folder that they wrote."""
    stdout: dict[str, str]
    """What each stage printed, by its module."""
    log: str
    """What all stages and their workers logged."""


@pytest.fixture(scope="module")
def trained(workspace):
    """Runs the README's commands up to evaluate in this process and on one Ray cluster, which saves several starts.

    The demo's test runs the stages as separate processes.
    """
    stdout, log = {}, io.StringIO()
    handler = logging.StreamHandler(log)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(log):
        patch.chdir(workspace.folder)
        patch.setattr(logging.getLogger(), "level", logging.INFO)
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
        logging.getLogger().addHandler(handler)
        start_ray(needed_cpus=3)
        try:
            for stage in STAGES:
                if stage == "pipelines.encode":
                    damaged = workspace.build / "images/train" / f"{DAMAGED}.JPEG"
                    damaged.write_bytes(damaged.read_bytes()[:400])
                patch.setattr(sys, "argv", workspace.documented(f"python -m {stage}")[2:])
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    try:
                        runpy.run_module(stage, run_name="__main__", alter_sys=True)
                    except SystemExit as stop:
                        if stop.code:
                            pytest.fail(f"{stage} ended with {stop.code}: {log.getvalue()[-6000:]}")
                stdout[stage] = printed.getvalue()
        finally:
            ray.shutdown()
            logging.getLogger().removeHandler(handler)
    return Trained(workspace.build, stdout, log.getvalue())


@pytest.mark.cluster
def test_encode_keeps_every_readable_image_once(trained):
    build = trained.build
    manifest = json.loads((build / "latents" / "manifest.json").read_text())
    assert (manifest["num_samples"], manifest["num_rejected"]) == (79, 1)
    assert sorted(manifest["shard_num_samples"]) == [16, 31, 32]
    assert pq.read_table(build / "latents/rejected.parquet")["sample_id"].to_pylist() == [DAMAGED]
    ids = [sample_id for shard in read_shards(build / "latents") for sample_id in shard.sample_ids]
    images = build / "images/train"
    on_disk = sorted(str(path.relative_to(images).with_suffix("")) for path in images.rglob("*.JPEG"))
    assert ids == [sample_id for sample_id in on_disk if sample_id != DAMAGED]
    assert "images/s" in trained.log
    assert "79 samples of 10 classes, 1 rejected" in trained.log


@pytest.mark.cluster
def test_check_finds_no_problem_and_draws_samples(trained, workspace):
    report = trained.stdout["pipelines.check"]
    assert "79 samples of 10 classes" in report
    assert "problems: none" in report
    assert float(re.search(r"against their images: ([\d.]+) dB", report)[1]) > 30
    assert Image.open(workspace.folder / "check.png").size[0] > 1000


@pytest.mark.cluster
def test_train_publishes_a_generator_an_mlflow_run_and_a_registered_model(trained):
    build = trained.build
    assert f"generator: {build}/runs/first/generator" in trained.stdout["pipelines.train"]
    assert "model: models:/meanflow-debug@candidate" in trained.stdout["pipelines.train"]
    assert "15 of 15 steps" in trained.log
    pipeline = load_pipeline(build / "runs/first/generator")
    assert pipeline.class_names[8] == "star"
    config = json.loads((build / "runs/first/generator/vae/config.json").read_text())
    assert len(config["latents_mean"]) == 4

    client = MlflowClient(f"sqlite:///{build}/runs/mlflow.db")
    run_id = json.loads((build / "runs/first/training.json").read_text())["mlflow_run_id"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["loss.guidance.kappa"] == "0.5"
    for name in ("loss", "squared_error_r_equals_t", "squared_error_r_below_t", "gradient_norm", "dudt_norm",
                 "ema_distance_0.9", "learning_rate", "images_per_second", "model_flops_per_second",
                 "peak_memory_bytes", "data_wait_share"):  # fmt: skip
        history = client.get_metric_history(run_id, name)
        assert [metric.step for metric in history] == [5, 10, 15], name
        assert np.isfinite([metric.value for metric in history]).all()
    for key in ("one_step", "two_steps"):
        assert len(list((build / "runs/mlflow-artifacts").rglob(f"*{key}*.png"))) == 1
    assert "system/node-0/cpu_utilization_percentage" in run.data.metrics
    assert run.data.tags["torch"] == torch.__version__
    files = {file.path for file in client.list_artifacts(run_id)}
    assert {"configuration.json", "data_manifest.json"} <= files
    manifest = read_manifest(str(build / "latents"))
    [used] = run.inputs.dataset_inputs
    assert manifest.content_sha256.startswith(used.dataset.digest)
    assert json.loads(used.dataset.source) == {"uri": str(build / "latents")}
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]
    version = client.get_model_version_by_alias("meanflow-debug", "candidate")
    assert version.run_id == run_id
    assert version.tags["data.sha256"] == run.data.params["data.sha256"] == manifest.content_sha256
    assert version.tags["transformer_sha256"] == weight_hash(pipeline.transformer)
    assert (version.tags["step"], version.tags["generator"]) == ("15", f"{build}/runs/first/generator")
    card = (build / "runs/first/generator/README.md").read_text()
    assert f"MLflow run {run_id}" in card
    assert manifest.content_sha256 in card


@pytest.mark.cluster
def test_two_workers_train_the_same_network_as_one_process(trained):
    build = trained.build
    config = replace(PRESETS["debug"](), num_steps=15)
    expected = train_in_this_process(build / "latents", config)
    client = MlflowClient(f"sqlite:///{build}/runs/mlflow.db")
    run_id = json.loads((build / "runs/first/training.json").read_text())["mlflow_run_id"]
    logged = [metric.value for metric in client.get_metric_history(run_id, "gradient_norm")]
    np.testing.assert_allclose(logged, np.reshape(expected.gradient_norms, (3, 5)).mean(axis=1), rtol=1e-3)

    trained_network = load_pipeline(build / "runs/first/generator").transformer
    ours, theirs = (
        torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
        for network in (expected.state.ema_network, trained_network)
    )
    assert (ours - theirs).norm() / ours.norm() < 1e-3


@pytest.mark.cluster
def test_evaluate_writes_table_samples_plot_and_report(trained):
    build = trained.build
    report = json.loads((build / "report/report.json").read_text())
    assert [entry["num_steps"] for entry in report["samples"]] == [1, 2]
    assert report["autoencoder_psnr"] > 30
    assert report["held_out"]["accuracy"] >= 0.97
    assert report["held_out"]["frechet"] < report["samples"][0]["frechet"]  # 15 steps learn nothing
    assert Image.open(build / "report/samples.png").size == (4 * 66 - 2, 10 * 66 - 2)  # a row per class
    assert (build / "report/quality_against_steps.png").stat().st_size > 5000
    assert "| samples, 1 step | 1 |" in trained.stdout["pipelines.evaluate"]
    client = MlflowClient(f"sqlite:///{build}/runs/mlflow.db")
    run_id = json.loads((build / "runs/first/training.json").read_text())["mlflow_run_id"]
    assert [metric.step for metric in client.get_metric_history(run_id, "evaluate/accuracy")] == [1, 2]
    assert {file.path for file in client.list_artifacts(run_id, "evaluate")} >= {
        "evaluate/report.json",
        "evaluate/samples.png",
    }
    tags = client.get_model_version_by_alias("meanflow-debug", "candidate").tags
    assert tags["evaluate.report"] == f"runs:/{run_id}/evaluate/report.json"
    assert tags["evaluate.reference_sha256"] == report["protocol"]["reference"]["sha256"]
    assert tags["evaluate.frechet.2-steps"].startswith(f"{report['samples'][1]['frechet']:.4g} +- ")


@pytest.mark.cluster
@pytest.mark.soak
def test_same_run_name_resumes_and_another_experiment_is_refused(trained, workspace):
    build = trained.build
    train = workspace.documented("python -m pipelines.train")
    again = workspace.run([*train, "--num-steps", "20", "--num-workers", "1"])
    assert "resumed at step 15" in again.stderr + again.stdout
    client = MlflowClient(f"sqlite:///{build}/runs/mlflow.db")
    run_id = json.loads((build / "runs/first/training.json").read_text())["mlflow_run_id"]
    steps = [metric.step for metric in client.get_metric_history(run_id, "loss")]
    assert steps == [5, 10, 15, 20]
    assert client.get_model_version_by_alias("meanflow-debug", "candidate").version == 2

    other = workspace.run([*train, "--optimizer.learning-rate", "0.5"], expected_code=2)
    assert any(line.startswith("error: run first in") for line in other.stderr.splitlines())
    assert "config.optimizer.learning_rate was 0.001, is 0.5" in other.stderr


@pytest.mark.cluster
def test_serve_returns_the_image_of_class_and_seed(trained, workspace, tmp_path):
    build = trained.build
    port = free_port(0)
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(
            [*workspace.documented("python -m deploy.serve"), "--port", str(port)],
            cwd=workspace.folder, env=workspace.environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server)
        curl = shlex.split(next(line for line in commands("stages", PAGE) if line.startswith("curl")))
        body = json.loads(curl[curl.index("-d") + 1])
        status, content_type, content = fetch(f"{url}/generate", body)
        assert (status, content_type) == (200, "image/png")
        served = np.asarray(Image.open(io.BytesIO(content))).astype(int)
        expected = load_pipeline(build / "runs/first/generator").images_from_seeds([8], [7], 1)[0].numpy().astype(int)
        assert np.abs(served - expected).max() <= 1
        batch = fetch(f"{url}/generate", {**body, "seed": 5, "num_images": 4, "response_format": "png"})[2]
        third = np.asarray(Image.open(io.BytesIO(batch)))[66:, :64].astype(int)
        assert np.abs(third - expected).max() <= 1  # seed 7, now in a batch
        status, _, message = fetch(f"{url}/generate", {**body, "class": "unicorn"})
        assert status == 400
        assert b"unknown class" in message
        assert json.loads(fetch(f"{url}/classes")[2])[8] == {"id": 8, "name": "star", "wnid": images.wnid(8)}
    finally:
        processes = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=90)
        _, alive = psutil.wait_procs(processes, timeout=30)
        for process in alive:
            process.kill()
        server.kill()
    assert len(processes) > 5
    assert not alive
    assert server.returncode == 0
