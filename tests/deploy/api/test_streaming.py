"""Streams of POST /v1/images/generations."""

import base64
import json
import re

import numpy as np
import openai
import pytest
import torch

from deploy.api import service
from deploy.messages import Refusal
from meanflow_core.autoencoder import decode_latents
from meanflow_core.generator import load_pipeline
from meanflow_core.networks.interface import Conditioning
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


def refusing(refusal):
    """A generator's `stream` that refuses every request."""

    async def stream(request):
        yield refusal

    return stream


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


@pytest.mark.parametrize(
    ("steps", "stream", "expected"), [(4, False, 0), (1, True, 0), (2, True, 1), (4, True, 3), (64, True, 3)]
)
def test_partial_images_are_fewer_than_the_steps_and_belong_to_streams(stub, steps, stream, expected):
    body = {"prompt": "star", "num_inference_steps": steps, "partial_images": 3, "stream": stream}
    assert stub.client.post(OPENAI, json=body).status_code == 200
    assert stub.generator.requests[-1].num_partial == expected


def test_a_refused_stream_is_not_repeated_to_requests_that_are_batched_apart(stub, monkeypatch):
    monkeypatch.setattr(service, "REPEAT_REFUSAL_SECONDS", 100.0)
    body = {"prompt": "star", "num_inference_steps": 4, "stream": True}

    def statuses(*all_partial):
        return [
            stub.client.post(OPENAI, json={**body, "partial_images": partial}).status_code for partial in all_partial
        ]

    refusal = Refusal(status=429, code="overloaded", message="full", retry_after_seconds=1.0)
    monkeypatch.setattr(stub.generator, "stream", refusing(refusal))
    assert statuses(2) == [429]
    monkeypatch.undo()
    monkeypatch.setattr(service, "REPEAT_REFUSAL_SECONDS", 100.0)
    assert statuses(2, 0, 2) == [429, 200, 429]


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
    if preset == "demo_meanflow":
        one, half = torch.ones(1), torch.full((1,), 0.5)
        with torch.no_grad():
            expected = noise - pipeline.transformer(noise, Conditioning(t=one, r=half, labels=torch.tensor([8]))).u
    else:
        expected = pipeline.sample_latents([8], noise, 1)  # such a step does not know where it ends
    torch.testing.assert_close(predicted[1], expected)
    assert not torch.allclose(predicted[1], final)
