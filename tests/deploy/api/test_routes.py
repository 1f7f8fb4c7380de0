import asyncio
import base64
import io
import time
import zipfile

import numpy as np
import pytest
from diffusers import AutoencoderTiny
from PIL import Image

from deploy.api.schema import MAX_SEED
from deploy.api.service import FullQueue
from deploy.messages import GeneratorStatus, Refusal
from deploy.settings import Arguments
from meanflow_core.generator import load_pipeline
from tests.support.endpoint import in_process


@pytest.fixture(scope="module")
def endpoint(generator_folder):
    arguments = Arguments(model=str(generator_folder), max_images=4, max_steps=8, max_body_bytes=2000)
    with in_process(arguments) as running:
        yield running


@pytest.fixture(scope="module")
def client(endpoint):
    return endpoint.client


@pytest.fixture(scope="module")
def guided(guided_folder):
    with in_process(Arguments(model=str(guided_folder))) as running:
        yield running.client


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def expected_images(folder, labels, seeds, steps=1):
    return load_pipeline(folder).images_from_seeds(labels, seeds, steps).numpy().astype(int)


def error_of(response, status):
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


def test_images_api_answers_an_image_per_seed(client, generator_folder):
    body = {"prompt": "star", "n": 3, "seed": 5, "num_inference_steps": 2, "model": "first", "size": "64x64",
            "response_format": "b64_json", "user": "me", "quality": "auto"}  # fmt: skip
    answer = client.post("/v1/images/generations", json=body)
    assert answer.status_code == 200
    content = answer.json()
    expected = expected_images(generator_folder, [8] * 3, [5, 6, 7], 2)
    for image, wanted, seed in zip(content["data"], expected, (5, 6, 7), strict=True):
        assert np.abs(pixels(base64.b64decode(image["b64_json"])) - wanted).max() <= 1
        assert (image["seed"], image["weight"]) == (seed, None)
    about = {key: content[key] for key in ("model", "size", "output_format", "class_id", "class_name", "wnid", "seed",
                                           "num_inference_steps", "preview")}  # fmt: skip
    assert about == {
        "model": "first", "size": "64x64", "output_format": "png", "class_id": 8, "class_name": "star",
        "wnid": "d0000008", "seed": 5, "num_inference_steps": 2, "preview": False,
    }  # fmt: skip
    timing = content["timing"]
    parts = sum(timing[part] for part in ("queue_ms", "model_ms", "decode_ms", "encode_ms"))
    assert 0 < parts <= timing["total_ms"]


@pytest.mark.parametrize("prompt", ["star", " STAR ", "d0000008", "class:8"])
def test_prompts_are_names_wnids_and_ids(client, prompt):
    assert client.post("/v1/images/generations", json={"prompt": prompt}).json()["class_id"] == 8


@pytest.mark.parametrize(("kind", "lossless"), [("png", True), ("webp", False), ("jpeg", False)])
def test_images_come_in_the_format_asked_for(client, generator_folder, kind, lossless):
    body = {"prompt": "star", "seed": 7, "output_format": kind}
    answer = client.post("/v1/images/generations", json={**body, "output_compression": 95}).json()
    content = base64.b64decode(answer["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(content)).format == kind.upper()
    error = np.abs(pixels(content) - expected_images(generator_folder, [8], [7])[0])
    assert error.max() <= 1 if lossless else error.mean() < 12
    worse = client.post("/v1/images/generations", json={**body, "output_compression": 5}).json()
    assert lossless or len(worse["data"][0]["b64_json"]) < len(answer["data"][0]["b64_json"])


def test_images_lie_between_two_seeds(client, generator_folder):
    answer = client.post("/v1/images/generations", json={"prompt": "star", "n": 3, "seed": 1, "seed_end": 4}).json()
    assert [(image["seed"], image["seed_end"], image["weight"]) for image in answer["data"]] == [
        (1, 4, 0.0), (1, 4, 0.5), (1, 4, 1.0),
    ]  # fmt: skip
    ends = expected_images(generator_folder, [8, 8], [1, 4])
    for image, end in zip((answer["data"][0], answer["data"][2]), ends, strict=True):
        assert np.abs(pixels(base64.b64decode(image["b64_json"])) - end).max() <= 1


def test_times_may_lie_on_any_grid(client, generator_folder):
    body = {"prompt": "star", "seed": 7, "timesteps": [1.0, 0.3, 0.0]}
    answer = client.post("/v1/images/generations", json=body).json()
    assert answer["num_inference_steps"] == 2
    expected = load_pipeline(generator_folder)(class_labels=[8], seeds=[7], timesteps=(1.0, 0.3, 0.0)).images[0]
    got = pixels(base64.b64decode(answer["data"][0]["b64_json"]))
    assert np.abs(got - np.asarray(expected).astype(int)).max() <= 1


def test_previews_are_flagged(generator_folder, tmp_path):
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).save_pretrained(tmp_path / "tiny")  # fmt: skip
    arguments = Arguments(model=str(generator_folder), preview_vae=str(tmp_path / "tiny"), batch_wait_seconds=0.05)
    with in_process(arguments) as running:
        assert running.client.get("/v1/models").json()["data"][0]["has_previews"] is True
        body = {"prompt": "star", "seed": 7}
        preview, image = (
            running.client.post("/v1/images/generations", json={**body, "preview": flag}).json()
            for flag in (True, False)
        )
        assert (preview["preview"], image["preview"]) == (True, False)
        difference = (
            pixels(base64.b64decode(preview["data"][0]["b64_json"])) - expected_images(generator_folder, [8], [7])[0]
        )
        assert np.abs(difference).max() > 1
        assert (
            np.abs(
                pixels(base64.b64decode(image["data"][0]["b64_json"])) - expected_images(generator_folder, [8], [7])[0]
            ).max()
            <= 1
        )
        file = running.client.post("/generate", json={"class": "star", "preview": True})
        assert file.headers["x-preview"] == "true"


def test_without_a_seed_images_differ_and_the_seed_is_told(client):
    first, second = (client.post("/v1/images/generations", json={"prompt": "star"}).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    again = client.post("/v1/images/generations", json={"prompt": "star", "seed": first["seed"]}).json()
    assert again["data"] == first["data"]


def test_guidance_reaches_a_model_that_takes_it(guided, guided_folder):
    body = {"prompt": "star", "seed": 7, "guidance_scale": 6.0, "guidance_interval": [0.1, 0.9]}
    image = guided.post("/v1/images/generations", json=body).json()["data"][0]
    expected = load_pipeline(guided_folder).images_from_seeds(
        [8], [7], guidance_scale=6.0, guidance_interval=(0.1, 0.9)
    )  # fmt: skip
    assert np.abs(pixels(base64.b64decode(image["b64_json"])) - expected[0].numpy().astype(int)).max() <= 1
    card = guided.get("/v1/models").json()["data"][0]
    assert (card["takes_guidance"], card["guidance_interval"]) == (True, [0.0, 1.0])


def test_generate_answers_a_png_and_a_grid_of_several(client, generator_folder):
    one = client.post("/generate", json={"class": "star", "seed": 7})
    assert one.headers["content-type"] == "image/png"
    assert {key: one.headers[key] for key in ("x-class-id", "x-seed", "x-preview", "x-model")} == {
        "x-class-id": "8", "x-seed": "7", "x-preview": "false", "x-model": "first",
    }  # fmt: skip
    assert float(one.headers["x-milliseconds"]) > 0
    expected = expected_images(generator_folder, [8] * 3, [7, 8, 9])
    assert np.abs(pixels(one.content) - expected[0]).max() <= 1
    grid = pixels(client.post("/generate", json={"class": 8, "seed": 7, "num_images": 3}).content)
    assert grid.shape == (130, 130, 3)
    assert np.abs(grid[66:, :64] - expected[2]).max() <= 1


def test_generate_answers_a_zip_whose_names_tell_the_seeds(client, generator_folder):
    body = {"class": "star", "seed": 7, "num_images": 2, "response_format": "zip"}
    answer = client.post("/generate", json=body)
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.namelist() == ["class8-seed7.png", "class8-seed8.png"]
        second = pixels(archive.read("class8-seed8.png"))
    assert np.abs(second - expected_images(generator_folder, [8], [8])[0]).max() <= 1


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({}, 422, "prompt", "Field required"),
        ({"prompt": "unicorn"}, 400, "prompt", "prompt: unknown class 'unicorn'"),
        ({"prompt": "class:10"}, 400, "prompt", r"[0, 9], but got 10"),
        ({"prompt": ""}, 422, "prompt", "at least 1 character"),
        ({"prompt": "star", "n": 5}, 400, "n", "at most 4 here, but got 5"),
        ({"prompt": "star", "n": 0}, 422, "n", "greater than or equal to 1"),
        ({"prompt": "star", "n": "2"}, 422, "n", "valid integer"),
        ({"prompt": "star", "seed": -1}, 422, "seed", "greater than or equal to 0"),
        ({"prompt": "star", "seed": MAX_SEED + 1}, 422, "seed", "less than or equal to"),
        ({"prompt": "star", "num_inference_steps": 9}, 400, "num_inference_steps", "at most 8 steps here"),
        ({"prompt": "star", "num_inference_steps": 0}, 422, "num_inference_steps", "greater than or equal to 1"),
        ({"prompt": "star", "timesteps": [0.9, 0.0]}, 400, "timesteps", "must fall from 1.0 to 0.0"),
        ({"prompt": "star", "timesteps": [1.0, 0.5, 0.0], "num_inference_steps": 4}, 400, "timesteps", "either"),
        ({"prompt": "star", "size": "256x256"}, 400, "size", "only generates 64x64 images"),
        ({"prompt": "star", "response_format": "url"}, 400, "response_format", "ask for b64_json"),
        ({"prompt": "star", "output_format": "gif"}, 422, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"prompt": "star", "guidance_scale": 3.0}, 400, "guidance_scale", "built into its weights"),
        ({"prompt": "star", "guidance_interval": [0.8, 0.2]}, 400, "guidance_interval", "start <= end"),
        ({"prompt": "star", "seed_end": 3}, 400, "seed_end", "at least 2 images"),
        ({"prompt": "star", "preview": True}, 400, "preview", "no preview decoder"),
        ({"prompt": "star", "model": "gpt-image-1"}, 404, "model", "'first' serves here"),
        ({"prompt": "star", "path": "/etc/passwd"}, 422, "path", "not permitted"),
    ],
)  # fmt: skip
def test_bad_requests_are_answered_with_the_field_and_the_reason(client, body, status, param, words):
    error = error_of(client.post("/v1/images/generations", json=body), status)
    assert error["param"] == param
    assert words in error["message"]
    assert error["message"].startswith(f"{param}: ")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"class": "unicorn"}, 400, "class"),
        ({"class": 10}, 400, "class"),
        ({"class": 1.5}, 422, "class"),
        ({"class": 1, "num_images": 5}, 400, "num_images"),
        ({"class": 1, "response_format": "gif"}, 422, "response_format"),
        ({"num_images": 1}, 422, "class"),
    ],
)
def test_bad_requests_for_files_likewise(client, body, status, param):
    assert error_of(client.post("/generate", json=body), status)["param"] == param


def test_what_is_no_json_no_route_or_no_method_is_answered_in_the_same_shape(client):
    assert (
        "JSON"
        in error_of(client.post("/generate", content=b"{", headers={"content-type": "application/json"}), 422)[
            "message"
        ]
    )
    assert (
        error_of(client.post("/generate", content=b"{", headers={"content-type": "application/json"}), 422)["param"]
        is None
    )
    error_of(client.get("/nothing"), 404)
    response = client.get("/generate")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


def test_of_many_faults_the_first_are_told(client):
    body = {"class": "star", **{f"f{index}": 0 for index in range(150)}}
    message = error_of(client.post("/generate", json=body), 422)["message"]
    assert message.endswith("f9: Extra inputs are not permitted; and 140 more")


def test_a_generator_that_does_not_answer_is_given_up(generator_folder, monkeypatch):
    from deploy.api import service

    async def forever(*_):
        await asyncio.sleep(30)

    monkeypatch.setattr(service, "DESCRIBE_SECONDS", 0.05)
    monkeypatch.setattr(service, "GRACE_SECONDS", 0.05)
    with in_process(Arguments(model=str(generator_folder), deadline_seconds=0.1)) as running:
        for name in ("generate", "describe", "list_classes"):
            monkeypatch.setattr(running.generator, name, forever)
        error = error_of(running.client.post("/generate", json={"class": "star"}), 504)
        assert (error["code"], error["message"]) == ("deadline_exceeded", "not done within 0.1 s")
        assert running.client.get("/readyz").status_code == 503
        for path in ("/v1/models", "/classes"):
            assert error_of(running.client.get(path), 503)["code"] == "not_ready"


def test_the_deadline_of_the_settings_reaches_the_generator(generator_folder):
    with in_process(Arguments(model=str(generator_folder), batch_wait_seconds=1.0)) as running:
        running.api.reconfigure({"deadline_seconds": 0.05})
        error = error_of(running.client.post("/generate", json={"class": "star"}), 504)
        assert error["message"] == "not done within 0.05 s"


def test_an_ambiguous_name_is_answered_with_the_ids(tmp_path):
    from pipelines.demo import images
    from tests.support.endpoint import write_generator

    names = list(images.CLASS_NAMES)
    names[2], names[5] = "crane, wader", "crane"
    folder = write_generator(tmp_path / "cranes", class_names=names)
    with in_process(Arguments(model=str(folder))) as running:
        error = error_of(running.client.post("/v1/images/generations", json={"prompt": "crane"}), 400)
    assert "class:2 (crane, wader), class:5 (crane)" in error["message"]


def test_a_long_body_is_refused(client):
    error = error_of(client.post("/v1/images/generations", json={"prompt": "star", "user": "x" * 3000}), 413)
    assert error["message"] == "a body may have at most 2000 bytes"


def test_classes_can_be_searched(client):
    everything = client.get("/classes").json()
    assert len(everything) == 10
    assert everything[8] == {"id": 8, "name": "star", "wnid": "d0000008"}
    for word in ("ta", "8", "D0000008"):
        found = client.get("/classes", params={"search": word}).json()
        assert {"id": 8, "name": "star", "wnid": "d0000008"} in found
        assert len(found) < 10
    assert len(client.get("/classes", params={"limit": 3}).json()) == 3
    error_of(client.get("/classes", params={"limit": 0}), 422)


def test_models_versions_and_health(client, generator_folder):
    models = client.get("/v1/models").json()
    card = models["data"][0]
    assert (models["object"], card["id"], card["object"], card["image_size"]) == ("list", "first", "model", 64)
    assert (card["max_images"], card["max_steps"], card["has_previews"]) == (4, 8, False)
    assert card["source"]["model"] == str(generator_folder)
    assert len(card["hashes"]["transformer"]) == len(card["hashes"]["vae"]) == 64
    assert client.get("/v1/models/first").json() == card
    assert error_of(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    assert client.get("/version").json()["model"] == card
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "model": "first", "problem": None}


def test_a_problem_is_told_while_the_old_model_serves(generator_folder, tmp_path):
    with in_process(Arguments(model=str(generator_folder))) as running:
        running.reconfigure({"model": str(tmp_path / "none")})
        for _ in range(100):
            ready = running.client.get("/readyz")
            if ready.json()["problem"]:
                break
        assert ready.status_code == 200
        assert "first instead" in ready.json()["problem"]
        running.api.reconfigure({"rate_limit": "much"})
        assert "expected a rate" in running.client.get("/readyz").json()["problem"]


def test_without_a_model_the_endpoint_is_not_ready(endpoint, monkeypatch):
    async def nothing():
        return GeneratorStatus(model=None, problem="loading")

    monkeypatch.setattr(endpoint.api.generator, "describe", nothing)
    ready = endpoint.client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json() == {"status": "not ready", "model": None, "problem": "loading"}
    response = endpoint.client.get("/v1/models")
    assert error_of(response, 503)["code"] == "not_ready"
    assert response.headers["retry-after"] == "5"


def test_refusals_of_the_generator_reach_the_caller(endpoint, monkeypatch):
    async def refuse(order):
        return Refusal(status=429, code="overloaded", message="full", retry_after_seconds=2.3)

    monkeypatch.setattr(endpoint.api.generator, "generate", refuse)
    monkeypatch.setattr(endpoint.api, "full_queue", FullQueue())  # and so again afterwards
    response = endpoint.client.post("/generate", json={"class": "star"})
    assert error_of(response, 429) == {
        "message": "full", "type": "rate_limit_error", "param": None, "code": "overloaded",
    }  # fmt: skip
    assert response.headers["retry-after"] == "3"


def test_a_full_queue_is_told_for_a_moment_without_asking_again(endpoint, monkeypatch):
    asked, make = [], endpoint.api.generator.generate

    async def full(order):
        asked.append(order.num_images)
        if order.num_images == 1:
            return await make(order)
        return Refusal(status=429, code="overloaded", message="full", retry_after_seconds=1.0)

    monkeypatch.setattr(endpoint.api.generator, "generate", full)
    monkeypatch.setattr("deploy.api.service.FULL_QUEUE_SECONDS", 0.5)
    monkeypatch.setattr(endpoint.api, "full_queue", FullQueue())

    def status(num_images):
        return endpoint.client.post("/generate", json={"class": "star", "num_images": num_images}).status_code

    assert [status(2), status(2), status(4), status(1)] == [429, 429, 429, 200]  # fewer may fit
    assert asked == [2, 1]
    time.sleep(0.6)
    assert status(2) == 429
    assert asked == [2, 1, 2]


def test_a_full_queue_of_some_steps_is_not_told_to_those_who_ask_for_others(endpoint, monkeypatch):
    asked, make = [], endpoint.api.generator.generate

    async def full_of_two_steps(order):
        asked.append(len(order.timesteps) - 1)
        if len(order.timesteps) == 2:
            return await make(order)
        return Refusal(status=429, code="overloaded", message="full", retry_after_seconds=30.0)

    monkeypatch.setattr(endpoint.api.generator, "generate", full_of_two_steps)
    monkeypatch.setattr("deploy.api.service.FULL_QUEUE_SECONDS", 5.0)
    monkeypatch.setattr(endpoint.api, "full_queue", FullQueue())

    def status(steps):
        return endpoint.client.post("/generate", json={"class": "star", "num_inference_steps": steps}).status_code

    assert [status(2), status(1), status(2)] == [429, 200, 429]
    assert asked == [2, 1]


def test_a_fault_is_a_500_without_its_details(endpoint, monkeypatch):
    async def fail(order):
        raise RuntimeError("secret")

    monkeypatch.setattr(endpoint.api.generator, "generate", fail)
    response = endpoint.client.post("/generate", json={"class": "star"})
    assert error_of(response, 500)["type"] == "server_error"
    assert "secret" not in response.text
    assert response.headers["x-content-type-options"] == "nosniff"
    tags = [tags for name, _, tags in endpoint.recorded.entries if name == "meanflow_requests_total"]
    assert tags[-1] == {"route": "/generate", "method": "POST", "status": "500"}


def test_the_page_and_the_docs_need_nothing_from_elsewhere(client):
    import re

    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    docs = client.get("/docs")
    for response in (page, docs):
        assert response.status_code == 200
        assert re.findall(r"(?:src|href)=[\"'](https?:)?//", response.text) == []
    for path in re.findall(r"(?:src|href)=[\"'](/static-docs/[^\"']+)", docs.text):
        assert client.get(path).status_code == 200
    assert "'unsafe-inline'" not in page.headers["content-security-policy"]
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")


def test_every_answer_carries_security_headers(client):
    for response in (client.get("/healthz"), client.get("/nothing"), client.post("/generate", json={"class": 1})):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]


KEYS = {"alice": "wonderland-key", "bob": "builder-key"}


@pytest.fixture
def locked(generator_folder):
    from deploy.api.auth import hash_key

    hashes = {name: hash_key(key) for name, key in KEYS.items()}
    with in_process(Arguments(model=str(generator_folder), api_keys=hashes), http_host="0.0.0.0") as running:
        yield running


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_with_keys_every_request_but_health_and_the_page_needs_one(locked):
    client = locked.client
    for method, path in [("post", "/generate"), ("post", "/v1/images/generations"), ("get", "/classes"),
                         ("get", "/v1/models"), ("get", "/v1/models/first"), ("get", "/version")]:  # fmt: skip
        options = {"json": {"class": "star", "prompt": "star"}} if method == "post" else {}
        for headers in ({}, bearer("wrong"), {"Authorization": "Basic wonderland-key"}, bearer("")):
            response = getattr(client, method)(path, headers=headers, **options)
            assert error_of(response, 401)["code"] == "invalid_api_key", (path, headers)
            assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200
    for key in KEYS.values():
        assert client.post("/generate", json={"class": "star"}, headers=bearer(key)).status_code == 200


def test_keys_are_exchanged_while_it_runs_and_never_all_taken_away(locked):
    from deploy.api.auth import hash_key

    locked.api.reconfigure({"api_keys": {"carol": hash_key("new-key")}})
    client = locked.client
    assert client.get("/version", headers=bearer("new-key")).status_code == 200
    assert client.get("/version", headers=bearer(KEYS["alice"])).status_code == 401
    locked.api.reconfigure({"api_keys": {}})
    assert client.get("/version").status_code == 401
    assert client.get("/version", headers=bearer("new-key")).status_code == 200
    assert "not left out" in client.get("/readyz", headers=bearer("new-key")).json()["problem"]
    assert "not left out" not in client.get("/readyz").json()["problem"]  # nobody else's business


def test_no_key_in_plain_text_is_told(locked):
    locked.api.reconfigure({"api_keys": {"carol": "a-plain-key"}})
    problem = locked.client.get("/readyz", headers=bearer(KEYS["alice"])).json()["problem"]
    assert "'carol' must be given as its SHA-256" in problem
    assert "a-plain-key" not in problem


def api_of(arguments=None, http_host=None):
    from deploy.api.service import ApiService
    from tests.support.endpoint import Recorded

    return ApiService(None, Arguments(model="m", **(arguments or {})), Recorded(), http_host)


def test_a_successor_whose_settings_are_refused_keeps_the_keys():
    from deploy.api.auth import hash_key

    keys = {"alice": hash_key("one")}
    for host in ("127.0.0.1", "0.0.0.0"):
        api = api_of(http_host=host)
        api.reconfigure({"api_keys": keys, "rate_limit": "much"})
        assert api.settings.api_keys == keys
        assert "expected a rate" in api.problem
    with pytest.raises(ValueError, match="must be given as its SHA-256"):
        api_of(http_host="127.0.0.1").reconfigure({"api_keys": {"alice": "plain"}})


def test_the_http_side_does_not_start_open_to_others():
    with pytest.raises(ValueError, match=r"host 0\.0\.0\.0 is reachable"):
        api_of(http_host="0.0.0.0").reconfigure({})
    api_of({"auth": "none"}, "0.0.0.0").reconfigure({})


def test_a_refused_setting_shows_until_it_is_taken_back():
    api = api_of()
    for rate in (None, "much", None):
        api.reconfigure({"rate_limit": rate})
    assert api.recorder.values("meanflow_settings_refused") == [0.0, 1.0, 0.0]
    assert api.problem is None


def test_images_are_counted_against_a_rate_per_key(locked):
    locked.api.reconfigure({"rate_limit": "5/minute"})
    client, body = locked.client, {"class": "star", "num_images": 4}
    assert client.post("/generate", json=body, headers=bearer(KEYS["alice"])).status_code == 200
    response = client.post("/generate", json=body, headers=bearer(KEYS["alice"]))
    assert error_of(response, 429)["code"] == "rate_limit_exceeded"
    assert 1 <= int(response.headers["retry-after"]) <= 120  # what a window counted fades over the next
    assert client.post("/generate", json=body, headers=bearer(KEYS["bob"])).status_code == 200
    assert client.get("/classes", headers=bearer(KEYS["alice"])).status_code == 200
    response = client.post("/generate", json={**body, "num_images": 6}, headers=bearer(KEYS["bob"]))
    error_of(response, 429)
    assert "retry-after" not in response.headers  # never, at this rate


def test_the_access_log_names_key_and_images_and_no_prompt(locked, caplog):
    with caplog.at_level("INFO", logger="meanflow.access"):
        locked.client.post("/generate", json={"class": "star", "num_images": 2}, headers=bearer(KEYS["alice"]))
        locked.client.get("/classes?search=star", headers=bearer(KEYS["bob"]))
        locked.client.get("/secret-path")
    generate, classes, other = (record for record in caplog.records if record.name == "meanflow.access")
    assert (generate.method, generate.route, generate.status, generate.key, generate.images) == (
        "POST", "/generate", 200, "alice", 2,
    )  # fmt: skip
    assert generate.milliseconds > 0
    assert (classes.route, classes.key) == ("/classes", "bob")
    assert other.route == "other"
    for record in (generate, classes, other):
        assert "star" not in str(vars(record))
        assert "secret-path" not in str(vars(record))
    locked.api.reconfigure({"log_prompts": True})
    with caplog.at_level("INFO", logger="meanflow.access"):
        locked.client.post("/generate", json={"class": "star"}, headers=bearer(KEYS["alice"]))
    assert vars(caplog.records[-1])["class"] == "star"


def test_requests_are_counted_by_route_and_status(endpoint):
    endpoint.client.post("/generate", json={"class": "star"})
    endpoint.client.get("/some/path")
    tags = [tags for name, _, tags in endpoint.recorded.entries if name == "meanflow_requests_total"]
    assert {"route": "/generate", "method": "POST", "status": "200"} in tags
    assert tags[-1] == {"route": "other", "method": "GET", "status": "404"}
    assert endpoint.recorded.values("meanflow_encode_seconds")[-1] > 0


def test_many_requests_at_once_share_batches(generator_folder):
    with in_process(Arguments(model=str(generator_folder), batch_wait_seconds=0.05)) as running:
        order = running.api.make_generation_request

        async def many():
            from deploy.api.schema import GenerateRequest

            wanted = GenerateRequest(class_="star", seed=3)
            orders = [order(wanted, class_="star", num_images=1, count_field="n", model=None, size="auto")] * 8
            return await asyncio.gather(*(running.generator.generate(one) for one in orders))

        running.client.portal.call(many)
        assert running.recorded.values("meanflow_batch_rows") == [8]


def test_both_endpoints_count_against_the_rate_and_other_settings_do_not_reset_it(locked):
    locked.api.reconfigure({"rate_limit": "2/day"})
    alice = bearer(KEYS["alice"])
    body = {"prompt": "star", "n": 2}
    assert locked.client.post("/v1/images/generations", json=body, headers=alice).status_code == 200
    locked.api.reconfigure({"rate_limit": "2/day", "max_images": 3})
    assert locked.client.post("/v1/images/generations", json=body, headers=alice).status_code == 429
