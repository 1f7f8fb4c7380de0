"""Error responses have one format, name the invalid field and give the reason."""

import asyncio

import pytest

from deploy.api import service
from deploy.api.schema import MAX_SEED
from deploy.messages import Refusal
from tests.support.api import error_of, stub_endpoint

OPENAI = "/v1/images/generations"


@pytest.mark.parametrize(
    ("body", "status", "param", "reason"),
    [
        ({}, 422, "prompt", "Field required"),
        ({"prompt": "unicorn"}, 400, "prompt", "prompt: unknown class 'unicorn'"),
        ({"prompt": ""}, 422, "prompt", "at least 1 character"),
        ({"prompt": "star", "n": 5}, 400, "n", "at most 4 here, but got 5"),
        ({"prompt": "star", "n": 0}, 422, "n", "greater than or equal to 1"),
        ({"prompt": "star", "n": "2"}, 422, "n", "valid integer"),
        ({"prompt": "star", "seed": -1}, 422, "seed", "greater than or equal to 0"),
        ({"prompt": "star", "seed": MAX_SEED + 1}, 422, "seed", "less than or equal to"),
        ({"prompt": "star", "num_inference_steps": 9}, 400, "num_inference_steps", "at most 8 steps here"),
        ({"prompt": "star", "timesteps": [0.9, 0.0]}, 400, "timesteps", "from 1.0 to 0.0"),
        ({"prompt": "star", "timesteps": [1.0, 0.5, 0.0], "num_inference_steps": 4}, 400, "timesteps", "either"),
        ({"prompt": "star", "size": "256x256"}, 400, "size", "64x64"),
        ({"prompt": "star", "response_format": "url"}, 400, "response_format", "use b64_json"),
        ({"prompt": "star", "output_format": "gif"}, 422, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"prompt": "star", "guidance_scale": 3.0}, 400, "guidance_scale", "built into its weights"),
        ({"prompt": "star", "guidance_interval": [0.8, 0.2]}, 400, "guidance_interval", "start <= end"),
        ({"prompt": "star", "guidance_interval": [0.1, 0.2]}, 400, "guidance_interval", "built into its weights"),
        ({"prompt": "star", "preview": True}, 400, "preview", "no preview decoder"),
        ({"prompt": "star", "seed_end": 3}, 400, "seed_end", "at least 2 images"),
        ({"prompt": "star", "model": "gpt-image-1"}, 404, "model", "this endpoint serves 'first'"),
        ({"prompt": "star", "path": "/etc/passwd"}, 422, "path", "not permitted"),
    ],
)  # fmt: skip
def test_openai_route_names_the_invalid_field_and_the_reason(client, body, status, param, reason):
    error = error_of(client.post(OPENAI, json=body), status)
    assert error["param"] == param
    assert reason in error["message"]
    assert error["message"].startswith(f"{param}: ")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"class": "unicorn"}, 400, "class"),
        ({"class": 1.5}, 422, "class"),
        ({"class": 1, "num_images": 5}, 400, "num_images"),
        ({"class": 1, "response_format": "gif"}, 422, "response_format"),
        ({"num_images": 1}, 422, "class"),
    ],
)
def test_generate_names_the_invalid_field(client, body, status, param):
    assert error_of(client.post("/generate", json=body), status)["param"] == param


def test_invalid_json_names_no_field(client):
    error = error_of(client.post("/generate", content=b"{", headers={"content-type": "application/json"}), 422)
    assert "JSON" in error["message"]
    assert error["param"] is None


def test_a_body_without_the_json_header_names_the_header(client):
    response = client.post("/generate", content=b'{"class": "star"}')
    assert "send the header Content-Type: application/json" in error_of(response, 422)["message"]


def test_unknown_routes_and_methods_get_the_same_error_format(client):
    error_of(client.get("/nothing"), 404)
    response = client.get("/generate")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


def test_only_the_first_ten_validation_errors_are_listed(client):
    body = {"class": "star", **{f"f{index}": 0 for index in range(150)}}
    message = error_of(client.post("/generate", json=body), 422)["message"]
    assert message.endswith("f9: Extra inputs are not permitted; and 140 more")


def test_body_above_the_limit_is_refused(client):
    error = error_of(client.post(OPENAI, json={"prompt": "star", "user": "x" * 3000}), 413)
    assert error["message"] == "the request body may have at most 2000 bytes"


def test_refusal_by_the_generator_is_returned_to_the_caller(stub):
    stub.generator.refusal = Refusal(status=429, code="overloaded", message="full", retry_after_seconds=2.3)
    response = stub.client.post("/generate", json={"class": "star"})
    assert error_of(response, 429) == {
        "message": "full", "type": "rate_limit_error", "param": None, "code": "overloaded",
    }  # fmt: skip
    assert response.headers["retry-after"] == "3"


def test_unexpected_error_is_a_500_without_details(stub, monkeypatch):
    async def fail(request):
        raise RuntimeError("secret")

    monkeypatch.setattr(stub.generator, "generate", fail)
    response = stub.client.post("/generate", json={"class": "star"})
    assert error_of(response, 500)["type"] == "server_error"
    assert "secret" not in response.text
    assert response.headers["x-content-type-options"] == "nosniff"
    tags = [tags for name, _, tags in stub.recorded.entries if name == "meanflow_requests_total"]
    assert tags == [{"route": "/generate", "method": "POST", "status": "500"}]


def test_unresponsive_generator_leads_to_a_timeout(monkeypatch):
    async def hang(*_):
        await asyncio.sleep(30)

    monkeypatch.setattr(service, "STATUS_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(service, "GRACE_SECONDS", 0.05)
    with stub_endpoint() as running:
        running.api.reconfigure({"deadline_seconds": 0.1})
        for name in ("generate", "describe", "list_classes"):
            monkeypatch.setattr(running.generator, name, hang)
        error = error_of(running.client.post("/generate", json={"class": "star"}), 504)
        assert (error["code"], error["message"]) == ("deadline_exceeded", "not done within 0.1 s")
        assert running.client.get("/readyz").status_code == 503
        for path in ("/v1/models", "/classes"):
            assert error_of(running.client.get(path), 503)["code"] == "not_ready"
