"""Streams of POST /v1/images/generations."""

import base64
import json
import re

import numpy as np
import openai
import pytest

from deploy.messages import Refusal
from meanflow_core.autoencoder import decode_latents
from meanflow_core.generator import load_pipeline
from meanflow_core.sampling import noise_from_seeds
from tests.support.api import StubGenerator, error_of, pixels
from tests.support.endpoint import write_generator

OPENAI = "/v1/images/generations"


def events_of(response):
    """[(event's name, its data)]"""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def openai_client(stub):
    return openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=stub.client, max_retries=0)


def assert_same(file, expected):
    assert np.abs(pixels(base64.b64decode(file)) - expected).max() <= 1


def test_a_stream_holds_each_step_that_was_asked_for_and_then_the_same_images_as_an_answer(client, generator_folder):
    body = {"prompt": "star", "n": 2, "seed": 5, "num_inference_steps": 4, "partial_images": 1, "stream": True}
    events = events_of(client.post(OPENAI, json=body))
    assert [name for name, _ in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"] * 2
    assert all(name == event["type"] for name, event in events)
    pipeline, predicted = load_pipeline(generator_folder), {}
    final = pipeline.sample_latents(
        [8, 8], noise_from_seeds([5, 6], pipeline.latent_shape), 4, on_step=predicted.__setitem__
    )
    assert set(predicted) == {1, 2, 3}
    for offset, latents in ((0, predicted[2]), (2, final)):
        expected = decode_latents(pipeline.vae, latents).numpy().astype(int)
        for index, (_, event) in enumerate(events[offset : offset + 2]):
            assert (event["index"], event["seed"], event["class_name"]) == (index, 5 + index, "star")
            assert_same(event["b64_json"], expected[index])
    assert [event.get("partial_image_index") for _, event in events] == [0, 0, None, None]
    timing = events[-1][1]["timing"]
    # Not their sum: images are encoded while the model goes on.
    assert all(0 < timing[part] <= timing["total_ms"] for part in ("queue_ms", "model_ms", "decode_ms", "encode_ms"))


def test_without_a_stream_no_partial_image_is_decoded(client):
    body = {"prompt": "star", "seed": 5, "num_inference_steps": 4, "partial_images": 3}
    assert len(client.post(OPENAI, json=body).json()["data"]) == 1


def test_the_openai_client_streams(stub):
    stream = openai_client(stub).images.generate(prompt="star", n=3, stream=True, extra_body={"seed": 5})
    events = list(stream)
    assert [type(event).__name__ for event in events] == ["ImageGenCompletedEvent"] * 3
    for index, event in enumerate(events):
        assert (event.index, event.size, event.output_format) == (index, "64x64", "png")
        assert_same(event.b64_json, StubGenerator.image(5 + index))


def test_a_refused_stream_has_its_own_status(client):
    error = error_of(client.post(OPENAI, json={"prompt": "unicorn", "stream": True}), 400)
    assert (error["param"], error["code"]) == ("prompt", "unknown_class")
    error_of(client.post(OPENAI, json={"prompt": "star", "stream": True, "partial_images": 4}), 422)


def test_an_error_after_the_first_image_is_an_event_that_the_openai_client_raises(stub):
    refusal = Refusal(status=503, code="replica_died", message="the replica died")
    stub.generator.refusal = refusal
    (_, image), (name, body) = events_of(stub.client.post(OPENAI, json={"prompt": "star", "n": 3, "stream": True}))
    assert image["index"] == 0
    assert (name, body["error"]["code"], body["error"]["message"]) == ("error", "replica_died", "the replica died")
    stub.generator.refusal = refusal
    with pytest.raises(openai.APIError, match="the replica died"):
        list(openai_client(stub).images.generate(prompt="star", n=3, stream=True))


def test_every_reference_of_the_openapi_document_resolves(stub):
    document = stub.client.get("/openapi.json").json()
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert "Timing" in names
    assert names <= set(document["components"]["schemas"])
    assert '"#/$defs' not in json.dumps(document)


@pytest.mark.parametrize("preset", ["demo_meanflow", "demo_flow_matching", "demo_consistency", "demo_ddpm"])
def test_every_prediction_tells_the_image_that_a_step_predicts(tmp_path, preset):
    pipeline = load_pipeline(write_generator(tmp_path / "generator", preset=preset))
    noise, predicted = noise_from_seeds([5], pipeline.latent_shape), {}
    final = pipeline.sample_latents([8], noise, 2, on_step=predicted.__setitem__)
    assert set(predicted) == {1}
    assert predicted[1].shape == final.shape
    assert not np.allclose(predicted[1], noise)
