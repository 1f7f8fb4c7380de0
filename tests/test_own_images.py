"""Runs the tutorial on own images with sixty photographs of clothes."""

import contextlib
import json
import logging
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from deploy.settings import Arguments
from meanflow_core.generator import load_pipeline
from pipelines.cluster import start_ray
from tests.support.api import pixels
from tests.support.endpoint import in_process
from tests.support.readme import REPOSITORY, commands

PAGE = "docs/tutorials/own-images.md"
# Options that make each command a matter of seconds.
SMALLER = {
    "pipelines.autoencoder": "--image-size 32 --width 8 --num-steps 40 --batch-size 8 --warm-up-steps 5 --ema-decay 0.9 "
    "--learning-rate 4e-3 --num-workers 1 --cpu-threads 1",
    "pipelines.encode": "--image-size 32 --num-workers 1",
    "pipelines.train": "--network.hidden-size 32 --network.depth 2 --network.num-heads 2 --num-steps 6 --global-batch-size 8 "
    "--optimizer.warmup-steps 1 --optimizer.cooldown-steps 2 --ema-decays 0.5 --log-interval-steps 3 "
    "--checkpoint-interval-steps 3 --sample-interval-steps 6 --cache-dir none --num-workers 1 --cpu-threads 1",
    "pipelines.evaluate": "--num-samples 20 --num-workers 1 --steps 1",
}
pytestmark = pytest.mark.cluster


@dataclass(frozen=True)
class Finished:
    """The folder of the tutorial after its stages, and its commands for the endpoint."""

    folder: Path
    serve: list[str]
    curl: list[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "photos").symlink_to(REPOSITORY / "tests/data/clothing")
    *stages, serve, curl = (shlex.split(line) for line in commands("own-images-run", PAGE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(logging.getLogger(), "level", logging.INFO)
        start_ray(needed_cpus=3)
        try:
            for python, dash_m, module, *words in stages:
                assert (python, dash_m) == ("python", "-m")
                patch.setattr(sys, "argv", [module, *words, *shlex.split(SMALLER.get(module, ""))])
                with contextlib.suppress(SystemExit):
                    runpy.run_module(module, run_name="__main__", alter_sys=True)
        finally:
            ray.shutdown()
        yield Finished(folder, serve, curl)


def test_autoencoder_reconstructs_held_out_photographs(finished):
    card = (finished.folder / "photos-vae/README.md").read_text()
    psnr = float(card.split("held-out PSNR | ")[1].split()[0])
    assert psnr > 10.0  # 40 steps; noise has 5 to 8
    with Image.open(finished.folder / "photos-vae/reconstructions.png") as grid:
        assert grid.width >= 2 * 32


def test_check_draws_latents_of_the_photographs(finished):
    with Image.open(finished.folder / "photos-check.png") as figure:
        assert figure.width > 500


def test_report_has_distance_probe_and_neighbours(finished):
    report = json.loads((finished.folder / "photos-report/report.json").read_text())
    assert report["protocol"]["distance"] == "FD-EfficientNet-Lite0"
    [samples] = report["samples"]
    for metrics in (samples, report["held_out"]):
        assert metrics["frechet"] > 0.0
        assert 0.0 <= metrics["probe_accuracy"] <= 1.0
        assert metrics["nearest_train_ratio"] > 0.0
        assert metrics["nearest_train_feature_ratio"] > 0.0
    assert (finished.folder / "photos-report/nearest.png").is_file()


def test_endpoint_serves_a_dress(finished):
    [model] = [word.removeprefix("model=") for word in finished.serve if word.startswith("model=")]
    folder = finished.folder / model
    request = json.loads(finished.curl[finished.curl.index("-d") + 1])
    with in_process(Arguments(model=str(folder))) as client:
        response = client.post("/generate", json=request)
    assert response.status_code == 200, response.text
    pipeline = load_pipeline(folder)
    expected = pipeline.images_from_seeds(pipeline.get_label_ids("dress"), [7])[0].numpy().astype(int)
    assert np.abs(pixels(response.content) - expected).max() <= 1
