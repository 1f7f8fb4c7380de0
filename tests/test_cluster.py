"""The README's commands submit all stages to a Ray cluster of several nodes, with and without a token."""

import contextlib
import json
import re
import shlex
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from pipelines.demo import images
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.demo.serving import free_port
from tests.support.endpoint import fetch
from tests.support.mlflow_server import Server
from tests.support.readme import REPOSITORY, commands
from tests.support.real_cluster import RealCluster, real_cluster
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.soak, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    images.write_folder(root, num_train=600, num_val=60, num_processes=1)
    return root


# Nodes on one machine share Ray's folder, and a node's first use of a working directory unpacks it again, even while a
# driver runs in it. So every node unpacks it once before the jobs.
ON_EVERY_NODE = """
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init()
empty_task = ray.remote(num_cpus=0)(lambda: None)
nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
for node in nodes:
    ray.get(empty_task.options(scheduling_strategy=On(node, soft=False)).remote())
"""


class User:
    """Runs the README's cluster commands, with paths and sizes for this machine."""

    def __init__(self, cluster: RealCluster, mlflow_uri: str, image_folder: Path, shared: Path) -> None:
        self.cluster, self.mlflow_uri, self.shared = cluster, mlflow_uri, shared
        self.lines = commands("existing-cluster", "docs/how-to/existing-cluster.md")
        self.replacements = {
            "http://HEAD:8265": cluster.dashboard,
            "http://MLFLOW:5000": mlflow_uri,
            "s3://BUCKET/ILSVRC/Data/CLS-LOC/train": str(image_folder / "train"),
            "s3://BUCKET/latents": str(shared / "latents"),
            "s3://BUCKET/runs": str(shared / "runs"),
            "stabilityai/sd-vae-ft-mse": str(SHIPPED_AUTOENCODER),
            "--image-size 256": "--image-size 64",
            "--device gpu --num-workers 8": "",  # no GPU here
            "--device gpu": "",
            '"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800"': '"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"',
            "pipelines.train xl2": "pipelines.train debug",
            "--run-name xl2": "--run-name first",
            "--num-workers 32": "--num-workers 2",
            "models:/meanflow-xl2@candidate": "models:/meanflow-debug@candidate",
            "--reference s3://BUCKET/imagenet256.npz": f"--train-images {image_folder / 'train'}",
            "--extractor inception": f"--extractor {SHIPPED_JUDGE}",
            "--output /tmp/report": f"--output {shared / 'report'}",
        }

        submit = ["ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", "."]
        succeeded(cluster.run(*submit, "--", "python", "-c", ON_EVERY_NODE, cwd=REPOSITORY))

    def words(self, part: str, *more: str) -> list[str]:
        """The words of the README's first line with this part."""
        line = next(line for line in self.lines if part in line)
        for documented, local in self.replacements.items():
            line = line.replace(documented, local)
        return [*shlex.split(line), *more]

    def submit(self, part: str, *more: str) -> subprocess.CompletedProcess:
        """Submits a stage and waits for its end."""
        words = self.words(part, *more)
        assert words[:3] == ["ray", "job", "submit"]
        return self.cluster.run(
            *words[:3], "--address", self.cluster.dashboard, *words[3:], cwd=REPOSITORY, timeout=400
        )

    def submit_in_background(self, part: str, log: Path, *more: str) -> subprocess.Popen:
        words = self.words(part, *more)
        with open(log, "wb") as output:
            return subprocess.Popen(
                self.cluster.command(*words[:3], "--address", self.cluster.dashboard, *words[3:]),
                env=self.cluster.environment, cwd=REPOSITORY, stdout=output, stderr=output,
            )  # fmt: skip


def succeeded(result):
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def serve_config(user, model, port):
    config = yaml.safe_load((REPOSITORY / "deploy" / "serve.yaml").read_text())
    config["proxy_location"] = "EveryNode"  # the head has no CPUs, but a proxy needs none
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    application = config["applications"][0]
    application["args"] = {"model": model, "tracking_uri": user.mlflow_uri}
    for deployment in application["deployments"]:
        deployment.pop("autoscaling_config", None)
        deployment["user_config"].pop("api_keys", None)
    return config


def deploy(user, config):
    path = user.shared / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    words = user.words("serve deploy")
    words[words.index("deploy/serve.yaml")] = str(path)
    succeeded(user.cluster.run(*words, cwd=REPOSITORY))


def served_version(url):
    """The model version in /version; None while the endpoint does not answer."""
    with contextlib.suppress(OSError):
        status, _, content = fetch(f"{url}/version", timeout=10)
        return json.loads(content)["model"]["source"]["version"] if status == 200 else None


def test_readme_commands_lead_from_images_to_an_endpoint(mlflow_server, image_folder, tmp_path):
    with real_cluster(num_workers=2, cpus_each=2, token="a-token-of-32-characters-or-more-0123") as cluster:
        user = User(cluster, mlflow_server.uri, image_folder, tmp_path)
        encoded = succeeded(user.submit("pipelines.encode", "--images-per-shard", "64"))
        assert "600 samples of 10 classes, 0 rejected" in encoded
        trained = succeeded(user.submit("pipelines.train"))
        assert "model: models:/meanflow-debug@candidate" in trained
        evaluated = succeeded(user.submit("pipelines.evaluate", "--num-samples", "40", "--steps", "1"))
        assert "| samples, 1 step | 1 |" in evaluated
        client = MlflowClient(mlflow_server.uri)
        version = client.get_model_version_by_alias("meanflow-debug", "champion")
        assert client.get_metric_history(version.run_id, "evaluate/accuracy")

        port = free_port(0)
        deploy(user, serve_config(user, "models:/meanflow-debug@champion", port))
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: served_version(url) == version.version, 180, lambda: served_version(url))
        status, headers, png = fetch(f"{url}/generate", json.dumps({"class": "star", "seed": 7}).encode())
        assert (status, headers["content-type"]) == (200, "image/png")
        assert png.startswith(b"\x89PNG")

        name_and_version = ("meanflow-debug", version.version)
        wait_until(lambda: "endpoint.meanflow-debug" in client.get_model_version(*name_and_version).tags, 60)
        # A user_config with a newer version puts it live.
        succeeded(user.submit("pipelines.train", "--num-steps", "35"))
        newer = client.get_model_version_by_alias("meanflow-debug", "candidate").version
        assert int(newer) > int(version.version)
        config = serve_config(user, "models:/meanflow-debug@champion", port)
        config["applications"][0]["deployments"][0]["user_config"]["model"] = f"models:/meanflow-debug/{newer}"
        deploy(user, config)
        wait_until(lambda: served_version(url) == newer, 180, lambda: served_version(url))
        succeeded(cluster.run("serve", "shutdown", "--yes", "--address", cluster.dashboard))
        cluster.environment.pop("RAY_AUTH_TOKEN")
        refused = cluster.run("ray", "job", "list", "--address", cluster.dashboard)
        assert refused.returncode != 0
        assert re.search("(?i)auth|token|401", refused.stdout + refused.stderr)


def test_jobs_without_a_token_survive_a_killed_node(mlflow_server, image_folder, tmp_path):
    with real_cluster(num_workers=3, cpus_each=2) as cluster:
        user = User(cluster, mlflow_server.uri, image_folder, tmp_path)
        log = tmp_path / "encode.log"
        job = user.submit_in_background("pipelines.encode", log, "--images-per-shard", "16")
        latents = tmp_path / "latents"
        while len(list(latents.rglob("*.arrow"))) < 6:
            assert job.poll() is None, log.read_text()[-4000:]
            time.sleep(0.02)
        worker = next(node for node in cluster.nodes[1:] if not _runs_the_driver(node))
        worker.kill()
        assert job.wait(timeout=400) == 0, log.read_text()[-6000:]
        assert "600 samples of 10 classes, 0 rejected" in log.read_text()

        log = tmp_path / "train.log"
        job = user.submit_in_background("pipelines.train", log, "--run-name", "killed", "--num-steps", "200")
        client = MlflowClient(mlflow_server.uri)
        while "of 200 steps" not in log.read_text():
            assert job.poll() is None, log.read_text()[-4000:]
            time.sleep(0.1)
        worker = next(node for node in cluster.nodes[1:] if node.process.poll() is None and not _runs_the_driver(node))
        worker.kill()
        assert job.wait(timeout=400) == 0, log.read_text()[-6000:]
        run_id = json.loads((tmp_path / "runs/killed/training.json").read_text())["mlflow_run_id"]
        steps = [metric.step for metric in client.get_metric_history(run_id, "loss")]
        assert steps == list(range(5, 201, 5))  # each step once


def _runs_the_driver(node) -> bool:
    return any(
        any("pipelines." in word for word in process.cmdline())
        for process in psutil.Process(node.process.pid).children(recursive=True)
    )
