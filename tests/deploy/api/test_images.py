"""Responses of the two image routes."""

import base64
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from meanflow_core.generator import load_pipeline
from tests.support.api import StubGenerator, pixels

OPENAI = "/v1/images/generations"


def expected_images(folder, labels, seeds, steps=1):
    return load_pipeline(folder).images_from_seeds(labels, seeds, steps).numpy().astype(int)


def files_of(response):
    assert response.status_code == 200, response.text
    return [base64.b64decode(image["b64_json"]) for image in response.json()["data"]]


def assert_same(image, expected):
    assert np.abs(image - expected).max() <= 1


def test_openai_route_returns_one_image_per_seed(client, generator_folder):
    body = {"prompt": "star", "n": 3, "seed": 5, "num_inference_steps": 2, "model": "first", "size": "64x64",
            "response_format": "b64_json", "user": "me", "quality": "auto"}  # fmt: skip
    response = client.post(OPENAI, json=body)
    for file, expected in zip(
        files_of(response), expected_images(generator_folder, [8] * 3, [5, 6, 7], 2), strict=True
    ):
        assert_same(pixels(file), expected)
    content = response.json()
    assert [(image["seed"], image["weight"]) for image in content.pop("data")] == [(5, None), (6, None), (7, None)]
    timing = content.pop("timing")
    assert 0 < sum(timing[part] for part in ("queue_ms", "model_ms", "decode_ms", "encode_ms")) <= timing["total_ms"]
    assert content.pop("created") > 1.7e9
    assert content == {
        "model": "first", "size": "64x64", "output_format": "png", "background": "opaque", "class_id": 8,
        "class_name": "star", "wnid": "d0000008", "seed": 5, "num_inference_steps": 2, "preview": False,
    }  # fmt: skip


def test_generate_returns_one_image_as_a_png(client, generator_folder):
    response = client.post("/generate", json={"class": "star", "seed": 7})
    assert_same(pixels(response.content), expected_images(generator_folder, [8], [7])[0])
    headers = {
        name: response.headers[name] for name in ("content-type", "x-class-id", "x-seed", "x-preview", "x-model")
    }
    assert headers == {
        "content-type": "image/png", "x-class-id": "8", "x-seed": "7", "x-preview": "false", "x-model": "first",
    }  # fmt: skip
    assert float(response.headers["x-milliseconds"]) > 0


def test_without_a_seed_images_differ_and_the_seed_is_reported(client):
    first, second = (client.post(OPENAI, json={"prompt": "star"}).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    again = client.post(OPENAI, json={"prompt": "star", "seed": first["seed"]}).json()
    assert again["data"] == first["data"]


def test_sampling_options_and_deadline_reach_the_generator(stub):
    stub.api.reconfigure({"deadline_seconds": 7.0})
    options = {"seed": 1, "seed_end": 4, "guidance_scale": 6.0, "guidance_interval": [0.1, 0.9], "preview": True}
    stub.client.post(OPENAI, json={"prompt": "class:8", "n": 2, "timesteps": [1.0, 0.3, 0.0], **options})
    stub.client.post("/generate", json={"class": 8, "num_images": 2, "num_inference_steps": 2, **options})
    openai, generate = stub.generator.requests
    assert (openai.class_, generate.class_) == ("class:8", 8)
    assert (openai.timesteps, generate.timesteps) == ((1.0, 0.3, 0.0), (1.0, 0.5, 0.0))
    for request in (openai, generate):
        assert (request.num_images, request.seed, request.seed_end) == (2, 1, 4)
        assert (request.guidance_scale, request.guidance_interval, request.is_preview) == (6.0, (0.1, 0.9), True)
        assert request.timeout_seconds == 7.0


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_images_have_the_requested_format_and_quality(stub, image_format):
    body = {"prompt": "star", "seed": 7, "output_format": image_format}
    good, bad = (files_of(stub.client.post(OPENAI, json={**body, "output_compression": q}))[0] for q in (95, 5))
    assert Image.open(io.BytesIO(good)).format == image_format.upper()
    error = np.abs(pixels(good) - StubGenerator.image(7))
    if image_format == "png":
        assert error.max() == 0
        assert good == bad
    else:
        assert error.mean() < 5
        assert len(bad) < len(good)


@pytest.mark.parametrize(
    ("generator_mode", "asked", "file_mode"),
    [("L", "auto", "L"), ("L", "RGB", "RGB"), ("RGB", "auto", "RGB"), ("RGB", "L", "L")],
)
def test_images_are_grey_if_the_generator_is_or_if_asked(stub, generator_mode, asked, file_mode):
    stub.generator.image_mode = generator_mode
    openai = files_of(stub.client.post(OPENAI, json={"prompt": "star", "seed": 7, "image_mode": asked}))[0]
    grid = stub.client.post("/generate", json={"class": 8, "num_images": 3, "image_mode": asked}).content
    body = {"class": 8, "num_images": 2, "image_mode": asked, "response_format": "zip"}
    with zipfile.ZipFile(io.BytesIO(stub.client.post("/generate", json=body).content)) as archive:
        zipped = archive.read(archive.namelist()[0])
    body = {"prompt": "star", "image_mode": asked, "output_format": "jpeg"}
    jpeg = files_of(stub.client.post(OPENAI, json=body))[0]
    assert {Image.open(io.BytesIO(file)).mode for file in (openai, grid, zipped, jpeg)} == {file_mode}


def test_images_between_two_seeds_report_their_weight(stub):
    body = {"prompt": "star", "n": 3, "seed": 1, "seed_end": 4, "preview": True}
    content = stub.client.post(OPENAI, json=body).json()
    weights = [(image["seed"], image["seed_end"], image["weight"]) for image in content["data"]]
    assert weights == [(1, 4, 0.0), (1, 4, 0.5), (1, 4, 1.0)]
    assert content["preview"] is True


def test_generate_returns_several_images_as_a_grid(stub):
    response = stub.client.post("/generate", json={"class": 8, "seed": 7, "num_images": 3, "preview": True})
    grid = pixels(response.content)
    assert grid.shape == (130, 130, 3)
    assert (grid[66:, :64] == StubGenerator.image(9)).all()
    assert response.headers["x-preview"] == "true"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["class8-seed7.png", "class8-seed8.png", "class8-seed9.png"]),
        ({"seed_end": 9}, ["class8-0.000.png", "class8-0.500.png", "class8-1.000.png"]),
    ],
)
def test_generate_returns_a_zip_with_seeds_or_weights_as_file_names(stub, options, names):
    body = {"class": "star", "seed": 7, "num_images": 3, "response_format": "zip", **options}
    response = stub.client.post("/generate", json=body)
    assert response.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.namelist() == names
        assert (pixels(archive.read(names[1])) == StubGenerator.image(8)).all()
