"""All stages with every input and output in an object store: an S3 server on this machine."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from mlflow import MlflowClient
from pyarrow import fs

from deploy.models import resolve_model
from deploy.settings import Arguments
from pipelines import storage
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.demo.judge import SHIPPED_JUDGE
from tests.support.endpoint import in_process
from tests.support.object_store import s3_bucket

pytestmark = [pytest.mark.soak, pytest.mark.cluster, pytest.mark.timeout(1500)]


def run(folder: Path, tracking_uri: str, *words: str) -> None:
    """Runs a stage as a user does."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri}
    command = [sys.executable, "-m", *words]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


def test_every_stage_reads_and_writes_an_object_store(image_root, tmp_path, monkeypatch):
    tracking_uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    copies = tempfile.mkdtemp(prefix="mfs-")  # short: Ray's sockets are in it
    monkeypatch.setenv("TMPDIR", copies)
    monkeypatch.setattr(tempfile, "tempdir", copies)
    with s3_bucket() as bucket:
        filesystem, path = storage.open_storage(f"{bucket}/images")
        fs.copy_files(str(image_root), path, destination_filesystem=filesystem)
        encode = ["pipelines.encode", "--vae", str(SHIPPED_AUTOENCODER), "--image-size", "64", "--num-workers", "1"]
        run(tmp_path, tracking_uri, *encode, "--images", f"{bucket}/images/train", "--output", f"{bucket}/latents",
            "--max-rejected-fraction", "0.5")  # fmt: skip
        train = ["pipelines.train", "debug", "--data", f"{bucket}/latents", "--storage", f"{bucket}/runs",
                 "--num-steps", "4", "--sample-interval-steps", "4", "--checkpoint-interval-steps", "2",
                 "--ema-decays", "0.9", "0.5", "--model-name", "shapes"]  # fmt: skip
        run(tmp_path, tracking_uri, *train, "--run-name", "first")
        generator = f"{bucket}/runs/first/generator"
        run(tmp_path, tracking_uri, *train, "--run-name", "second", "--init-from", generator)

        evaluate = ["pipelines.evaluate", "--extractor", str(SHIPPED_JUDGE), "--num-samples", "40", "--steps", "1",
                    "--num-workers", "1", "--num-precision-recall", "20"]  # fmt: skip
        images = ["--train-images", f"{bucket}/images/train"]
        run(tmp_path, tracking_uri, *evaluate, *images, "--model", f"{generator}-ema-0.5", "--output", "ema")
        assert json.loads((tmp_path / "ema/report.json").read_text())["protocol"]["generator"]["ema_decay"] == 0.5
        run(tmp_path, tracking_uri, *evaluate, *images, "--model", "models:/shapes/1", "--output", "one", "--promote")
        client = MlflowClient(tracking_uri)
        assert str(client.get_model_version_by_alias("shapes", "champion").version) == "1"
        assert str(client.get_model_version_by_alias("shapes", "candidate").version) == "2"

        for model in (generator, "models:/shapes@champion"):
            resolved = resolve_model(model, tracking_uri)
            with in_process(Arguments(model=resolved, tracking_uri=tracking_uri, max_batch_size=2)) as api:
                assert api.post("/generate", json={"class": 3, "seed": 7}).content[:4] == b"\x89PNG"
        folders = [path for path in Path(copies).glob("meanflow-ray-generators-*/*") if path.is_dir()]
        assert len(folders) == 3  # the first run's two averages, and the registered version
    shutil.rmtree(copies)
