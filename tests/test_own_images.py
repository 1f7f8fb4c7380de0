"""Runs the tutorial on own images with sixty photographs of clothes, and the commands on pixels of docs/how-to/encode.md."""

import contextlib
import io
import json
import logging
import runpy
import shlex
import sys
from collections.abc import Iterator
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
from tests.support.image_formats import write_idx
from tests.support.readme import REPOSITORY, commands

PAGE = "docs/tutorials/own-images.ipynb"
# Options that make each command a matter of seconds.
SMALLER = {
    "pipelines.autoencoder": "--image-size 32 --width 8 --num-steps 40 --batch-size 8 --warm-up-steps 5 --ema-decay 0.9 "
    "--learning-rate 4e-3 --num-workers 1 --cpu-threads 1",
    "pipelines.encode": "--num-workers 1",
    "pipelines.judge": "--num-steps 10 --batch-size 4",
    "pipelines.train": "--network.hidden-size 32 --network.depth 2 --network.num-heads 2 --num-steps 6 --global-batch-size 8 "
    "--optimizer.warmup-steps 1 --optimizer.cooldown-steps 2 --ema-decays 0.5 --log-interval-steps 3 "
    "--checkpoint-interval-steps 3 --sample-interval-steps 6 --cache-dir none --num-workers 1 --cpu-threads 1",
    "pipelines.evaluate": "--num-samples 20 --num-workers 1 --steps 1",
}
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Iterator[Path]:
    """The folder in which the stages of the tutorial have run."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "photos").symlink_to(REPOSITORY / "tests/data/clothing")
    with in_folder(folder) as patch:
        run_stages(commands("own-images-run", PAGE), patch)
        yield folder


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Works in a folder, and logs as a command does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(logging.getLogger(), "level", logging.INFO)
        yield patch


def run_stages(lines: list[str], patch: pytest.MonkeyPatch) -> None:
    """Runs the commands of the stages in this process and on one Ray cluster, which saves several starts."""
    start_ray(needed_cpus=3)
    try:
        for line in lines:
            program, *words = shlex.split(line)
            if program == "python" and words[1] != "deploy.serve":  # which would serve until it is interrupted
                run_module(words[1:], patch)
    finally:
        ray.shutdown()


def run_module(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Runs `python -m WORDS` in this process, with the options of SMALLER."""
    patch.setattr(sys, "argv", [*words, *shlex.split(SMALLER.get(words[0], ""))])
    code = None
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    assert not code, words


def test_autoencoder_reconstructs_held_out_photographs(finished):
    card = (finished / "runs/photos-vae/README.md").read_text()
    psnr = float(card.split("held-out PSNR | ")[1].split()[0])
    assert psnr > 10.0  # 40 steps; noise has 5 to 8
    with Image.open(finished / "runs/photos-vae/reconstructions.png") as grid:
        assert grid.width >= 2 * 32


def test_check_draws_latents_of_the_photographs(finished):
    with Image.open(finished / "photos-check.png") as figure:
        assert figure.width > 500


def test_report_has_distance_probe_and_neighbours(finished):
    report = json.loads((finished / "photos-report/report.json").read_text())
    assert report["protocol"]["distance"] == "FD-EfficientNet-Lite0"
    assert report["protocol"]["class_counts"] == [4] * 10
    [samples] = report["samples"]
    for metrics in (samples, report["held_out"]):
        assert metrics["frechet"] > 0.0
        assert 0.0 <= metrics["probe_accuracy"] <= 1.0
        assert metrics["nearest_train_ratio"] > 0.0
        assert metrics["nearest_train_feature_ratio"] > 0.0
    assert (finished / "photos-report/nearest.png").is_file()


def test_endpoint_serves_a_dress(finished):
    folder = finished / "runs/photos/generator"
    with in_process(Arguments(model=str(folder))) as client:
        response = client.post("/generate", json={"class": "dress", "seed": 7})
    assert response.status_code == 200, response.text
    pipeline = load_pipeline(folder)
    expected = pipeline.images_from_seeds(pipeline.get_label_ids("dress"), [7])[0].numpy().astype(int)
    assert np.abs(pixels(response.content) - expected).max() <= 1


@pytest.mark.soak
def test_pixels_go_through_every_stage_and_stay_grey(tmp_path):
    finished = tmp_path
    for split in ("train", "t10k"):
        write_idx(finished / "fashion-mnist", split, compressed=True)
    with in_folder(finished) as patch:
        run_stages(commands("pixels", "docs/how-to/encode.md"), patch)
    report = json.loads((finished / "fashion-report/report.json").read_text())
    assert report["protocol"]["distance"] == "Fréchet distance (judge)"
    assert 0.0 <= report["samples"][0]["accuracy"] <= 1.0
    assert "held-out accuracy" in (finished / "fashion-judge/README.md").read_text()
    folder = finished / "runs/fashion/generator"
    assert "**Autoencoder** none: the generator works on pixels" in (folder / "README.md").read_text()
    with in_process(Arguments(model=str(folder))) as client:
        response = client.post("/generate", json={"class": 2, "seed": 7})
        rgb = client.post("/generate", json={"class": 2, "seed": 7, "image_mode": "RGB"})
        assert client.get("/v1/models").json()["data"][0]["image_mode"] == "L"
    with Image.open(io.BytesIO(response.content)) as image, Image.open(io.BytesIO(rgb.content)) as colour:
        assert (image.mode, image.size, colour.mode) == ("L", (28, 28), "RGB")
        expected = load_pipeline(folder).images_from_seeds([2], [7])[0, ..., 0].numpy().astype(int)
        assert np.abs(np.asarray(image, dtype=int) - expected).max() <= 1
