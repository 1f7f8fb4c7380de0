"""Tests the endpoint under `serve run`: two replicas, real HTTP, model swaps and killed replicas."""

import base64
import contextlib
import http.server
import json
import os
import re
import threading
import time

import numpy as np
import openai
import pytest

from tests.support.api import pixels
from tests.support.endpoint import DEPLOYMENTS, fetch, running_endpoint, write_generator
from tests.support.endpoint_load import (
    CLASS,
    Load,
    expected_images,
    generate,
    served_models,
    wait_for_models,
    wait_for_replicas,
)
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    broken = folder / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text("{}")
    written = {name: write_generator(folder / name, seed) for seed, name in enumerate(("first", "second"))}
    return {**written, "broken": broken}


@pytest.fixture(scope="module")
def expected(models):
    return {name: expected_images(models[name]) for name in ("first", "second")}


@pytest.fixture(scope="module")
def collector():
    """Takes what the endpoint sends to an OpenTelemetry collector. Yields the bodies of the requests."""
    bodies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", "deploy.tracing:otlp")
        patch.setenv("RAY_SERVE_TRACING_SAMPLING_RATIO", "0")  # only requests whose caller records them
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield bodies
        server.shutdown()


@pytest.fixture(scope="module", params=["one", pytest.param("two", marks=pytest.mark.soak)])
def endpoint(models, collector, request):
    arguments = {
        "model": str(models["first"]), "topology": request.param, "num_replicas": 2, "max_batch_size": 8,
        "batch_wait_seconds": 0.002,
    }  # fmt: skip
    # An empty `user_config:`, as in a config file with every setting under it commented out.
    deployments = [{"name": name, "user_config": None} for name in DEPLOYMENTS[request.param]]
    with running_endpoint(arguments, deployments) as running:
        yield running


def request_model(endpoint, folder, **settings):
    """Requests another model in place, with the user_config of the generator's deployment."""
    config = json.loads(json.dumps(endpoint.config))
    user_config = {"model": str(folder), **settings}
    config["applications"][0]["deployments"] = [{"name": endpoint.generator, "user_config": user_config}]
    endpoint.deploy(config)


def wait_for_problem(endpoint, words):
    """Waits until a replica reports a problem with these words in /readyz."""
    endpoint.wait_until(lambda _, content: words in (json.loads(content)["problem"] or ""))


def log_text(endpoint, deployment):
    return "".join(path.read_text() for path in (endpoint.folder / "ray").rglob(f"replica_meanflow_{deployment}_*.log"))


def test_the_openai_client_works(endpoint, expected):
    client = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="any")
    answer = client.images.generate(
        prompt="star", model="first", n=2, size="64x64", response_format="b64_json", extra_body={"seed": 5}
    )
    for image, wanted in zip(answer.data, expected["first"][5:7], strict=True):
        assert np.abs(pixels(base64.b64decode(image.b64_json)) - wanted).max() <= 1
    assert [model.id for model in client.models.list()] == ["first"]
    assert client.models.retrieve("first").id == "first"
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="unicorn")
    assert refused.value.param == "prompt"
    assert "unknown class 'unicorn'" in refused.value.message
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="star", model="dall-e-3")


def test_a_request_joins_the_trace_of_its_caller(endpoint, collector):
    collector.clear()
    trace, parent = os.urandom(16), os.urandom(8)
    headers = {"traceparent": f"00-{trace.hex()}-{parent.hex()}-01"}
    assert fetch(f"{endpoint.url}/generate", b'{"class": 8, "seed": 1}', headers=headers)[0] == 200
    names = [b"POST /generate"] + [b"ImageGenerator generate"] * (endpoint.generator == "ImageGenerator")
    wait_until(lambda: all(any(trace in body and name in body for body in collector) for name in names), 10)
    time.sleep(1)  # the rest of its spans
    collector.clear()
    assert fetch(f"{endpoint.url}/generate", b'{"class": 8, "seed": 2}')[0] == 200
    time.sleep(1)
    assert not any(b"POST /generate" in body for body in collector)  # a caller without a trace is not recorded


def test_a_stream_holds_the_same_images(endpoint, expected):
    client = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="any")
    events = list(client.images.generate(prompt="star", n=10, stream=True, extra_body={"seed": 5}))
    assert sorted(event.index for event in events) == list(range(10))
    for event in events:
        wanted = expected["first"][5 + event.index]
        assert np.abs(pixels(base64.b64decode(event.b64_json)) - wanted).max() <= 1
    with pytest.raises(openai.BadRequestError, match="unknown class 'unicorn'"):
        client.images.generate(prompt="unicorn", stream=True)


def test_requests_of_disconnected_clients_leave_the_queue(endpoint):
    body = json.dumps({"class": CLASS, "num_images": 64, "num_inference_steps": 128}).encode()
    for _ in range(3):  # together they would take minutes
        with contextlib.suppress(TimeoutError, OSError):
            fetch(f"{endpoint.url}/generate", body, timeout=0.5)
    start = time.monotonic()
    assert generate(endpoint.url, 1)[0] == 200
    assert time.monotonic() - start < 20


def test_a_model_swap_under_load_loses_no_request_and_a_broken_model_changes_nothing(endpoint, expected, models):
    with Load(endpoint.url, expected, num_clients=3) as load:
        load.wait_for_answers(10)
        request_model(endpoint, models["second"])
        wait_for_models(endpoint, "second")
        request_model(endpoint, models["broken"])
        wait_for_problem(endpoint, "second instead")
        load.wait_for_answers(20)
        assert served_models(endpoint) == {"second"}
    print("swapped:", dict(load.outcomes))
    assert load.wrong_images == []
    assert set(load.outcomes) == {(200, "first"), (200, "second")}


def test_a_killed_replica_loses_only_its_requests_and_its_successor_serves_the_deployed_model(
    endpoint, expected, models
):
    request_model(endpoint, models["second"])
    wait_for_models(endpoint, "second")
    request_model(endpoint, models["broken"])
    wait_for_problem(endpoint, "second instead")
    with Load(endpoint.url, expected, num_clients=6) as load:
        load.wait_for_answers(40)
        replicas = endpoint.processes(endpoint.generator)
        assert len(replicas) == 2
        replicas[0].kill()
        wait_for_models(endpoint, "first", "second")
        wait_for_problem(endpoint, "first instead")
        load.wait_for_answers(100)
    print("killed:", dict(load.outcomes), "on retry:", dict(load.retried))
    assert load.wrong_images == []
    # What the replica held is sent to another one, or refused (topology two), or its connection breaks within the answer.
    assert set(load.outcomes) <= {(200, "first"), (200, "second"), (503, None), "RemoteDisconnected"}
    assert load.outcomes[503, None] + load.outcomes["RemoteDisconnected"] <= 6  # at most one per client
    assert set(load.retried) <= {200}
    request_model(endpoint, models["first"], max_batch_size=4)
    wait_for_models(endpoint, "first")
    wait_for_replicas(endpoint, 2)


def test_prometheus_gets_the_metrics_of_the_dashboard(endpoint):
    generate(endpoint.url, 1)
    deadline = time.monotonic() + 90
    expected_names = {
        "ray_meanflow_requests_total", "ray_meanflow_request_seconds_bucket", "ray_meanflow_batch_rows_bucket",
        "ray_meanflow_queue_wait_seconds_bucket", "ray_meanflow_model_seconds_bucket",
        "ray_meanflow_decode_seconds_bucket", "ray_meanflow_encode_seconds_bucket", "ray_meanflow_images_total",
    }  # fmt: skip
    missing = expected_names
    while missing and time.monotonic() < deadline:
        text = fetch(f"http://127.0.0.1:{endpoint.metrics_port}/metrics")[2].decode()
        missing = expected_names - set(re.findall(r"^(ray_meanflow_\w+)\{", text, re.MULTILINE))
        time.sleep(0.5)
    assert not missing
    assert re.search(r'ray_meanflow_requests_total\{.*route="/generate".*status="200"', text)


def test_the_log_is_structured_and_names_the_http_host_but_no_class(endpoint):
    generate(endpoint.url, 3)
    deadline = time.monotonic() + 20
    entries = []
    while not entries and time.monotonic() < deadline:
        text = log_text(endpoint, endpoint.api)
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        entries = [line for line in lines if (line.get("message"), line.get("route")) == ("request", "/generate")]
        time.sleep(0.2)
    entry = entries[-1]
    assert (entry["method"], entry["status"], entry["images"]) == ("POST", 200, 1)
    assert {"milliseconds", "client", "request_id", "replica"} <= set(entry)
    assert "class" not in entry
    assert "Serve's HTTP host is 127.0.0.1; API keys: none" in text
    assert "serving" in log_text(endpoint, endpoint.generator)


@pytest.mark.soak
def test_a_new_application_replaces_every_replica_without_losing_a_request(endpoint, expected):
    config = json.loads(json.dumps(endpoint.config))
    config["applications"][0]["args"]["served_name"] = "renamed"
    with Load(endpoint.url, {**expected, "renamed": expected["first"]}, num_clients=4) as load:
        endpoint.deploy(config)
        wait_for_models(endpoint, "renamed")
        time.sleep(2.0)
    print("replaced:", dict(load.outcomes))
    assert load.wrong_images == []
    assert load.outcomes[200, "renamed"] > 0
    assert set(load.outcomes) <= {(200, "first"), (200, "renamed")}
