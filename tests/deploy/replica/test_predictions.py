"""Generators of every objective serve: the same images as the pipeline, and a clear refusal of unequal diffusion steps."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from deploy.settings import Arguments
from meanflow_core.generator import load_pipeline
from tests.support.endpoint import in_process, write_generator

REQUEST = {"prompt": "star", "seed": 7, "n": 2, "response_format": "b64_json"}


@pytest.mark.parametrize("preset", ["demo_flow_matching", "demo_ect", "demo_ddpm"])
def test_generator_of_every_prediction_serves_the_pipelines_images(preset, tmp_path):
    folder = write_generator(tmp_path / "generator", preset=preset)
    pipeline = load_pipeline(folder)
    label = pipeline.get_label_ids("star")[0]
    expected = pipeline.images_from_seeds([label, label], [7, 8], num_inference_steps=3).numpy()
    with in_process(Arguments(model=str(folder))) as client:
        answer = client.post("/v1/images/generations", json={**REQUEST, "num_inference_steps": 3})
        assert answer.status_code == 200, answer.text
        served = [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))) for item in answer.json()["data"]
        ]
        unequal = client.post("/v1/images/generations", json={**REQUEST, "timesteps": [1.0, 0.4, 0.0]})
    assert np.abs(np.stack(served).astype(int) - expected).max() <= 1
    assert not np.array_equal(expected[0], expected[1])
    assert unequal.status_code == (400 if preset == "demo_ddpm" else 200)
    if preset == "demo_ddpm":
        assert unequal.json()["error"]["code"] == "unequal_timesteps"
