"""The endpoint as `serve run` starts it: two replicas, real HTTP, things going wrong."""

import base64
import collections
import contextlib
import io
import json
import random
import re
import threading
import time

import numpy as np
import openai
import pytest
from PIL import Image

from meanflow_core.generator import load_pipeline
from tests.support.endpoint import fetch, running_endpoint, write_generator

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

CLASS, SEEDS = 8, range(40)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    return {name: write_generator(folder / name, seed) for seed, name in enumerate(("first", "second"))}


@pytest.fixture(scope="module")
def expected(models):
    """What each model makes of each seed."""
    return {
        name: load_pipeline(folder).images_from_seeds([CLASS] * len(SEEDS), list(SEEDS)).numpy().astype(int)
        for name, folder in models.items()
    }


@pytest.fixture(scope="module")
def endpoint(models):
    arguments = {"model": str(models["first"]), "num_replicas": 2, "max_batch_size": 8, "batch_wait_seconds": 0.002}
    # What a config with an empty `user_config:` says, as where every setting under it is commented out.
    deployments = [{"name": name, "user_config": None} for name in ("ImageGenerator", "Api")]
    with running_endpoint(arguments, deployments) as running:
        yield running


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def generate(url, seed, timeout=60.0):
    body = json.dumps({"class": CLASS, "seed": seed}).encode()
    return fetch(f"{url}/generate", body, timeout)


class Load:
    """Asks for images from several threads until it is told to stop; keeps what came back."""

    def __init__(self, url, expected, num_callers=6):
        self.url, self.expected = url, expected
        self.kinds = collections.Counter()
        self.wrong = []
        self.retried = collections.Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(index,)) for index in range(num_callers)]

    def _ask(self, index):
        draw = random.Random(index)
        while not self._stop.is_set():
            seed = draw.choice(SEEDS)
            try:
                status, headers, content = generate(self.url, seed)
            except Exception as error:  # a connection that broke, or hung, is a kind of its own
                self.kinds[type(error).__name__] += 1
                continue
            self.kinds[status, headers.get("x-model")] += 1
            if status == 200:
                if np.abs(pixels(content) - self.expected[headers["x-model"]][seed]).max() > 1:
                    self.wrong.append((seed, headers["x-model"]))
            else:
                assert "error" in json.loads(content), content
                time.sleep(float(headers.get("retry-after", 0)))
                self.retried[generate(self.url, seed)[0]] += 1

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=90)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"


def test_the_openai_client_makes_an_image(endpoint, expected):
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
    with pytest.raises(openai.BadRequestError, match="no url"):
        client.images.generate(prompt="star", response_format="url")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="star", model="dall-e-3")


def test_a_caller_who_goes_away_leaves_the_queue(endpoint):
    body = json.dumps({"class": CLASS, "num_images": 64, "num_inference_steps": 128}).encode()

    def leave():
        with contextlib.suppress(TimeoutError, OSError):
            fetch(f"{endpoint.url}/generate", body, timeout=0.5)

    for _ in range(3):  # 3 times 64 images at 128 steps: minutes of work, were it done
        leave()
    began = time.monotonic()
    assert generate(endpoint.url, 1)[0] == 200
    assert time.monotonic() - began < 20


def test_a_replica_killed_under_load_loses_at_most_what_it_held(endpoint, expected):
    with Load(endpoint.url, expected) as load:
        while sum(load.kinds.values()) < 40:
            time.sleep(0.05)
        assert len(endpoint.family("ImageGenerator")) == 2
        kill_a_replica(endpoint)
        wait_for_replicas(endpoint)
        before = sum(load.kinds.values())
        while sum(load.kinds.values()) < before + 200:
            time.sleep(0.05)
    print("killed:", dict(load.kinds), "on retry:", dict(load.retried))
    assert load.wrong == []
    assert set(load.kinds) <= {(200, "first"), (503, None)}
    assert load.kinds[503, None] <= 6  # one per caller at most
    assert set(load.retried) <= {200}


def models_seen(endpoint):
    return {generate(endpoint.url, 1)[1].get("x-model") for _ in range(20)}


def wait_until_all_serve(endpoint, name, seconds=120):
    deadline = time.monotonic() + seconds
    while (seen := models_seen(endpoint)) != {name}:
        assert time.monotonic() < deadline, seen
        time.sleep(0.2)


def wait_for_replicas(endpoint, count=2, seconds=180):
    deadline = time.monotonic() + seconds
    while len(running := endpoint.running_replicas("ImageGenerator")) != count:
        assert time.monotonic() < deadline, running
        time.sleep(0.2)
    return running


def kill_a_replica(endpoint, held=False):
    """Ends one of two at once; its successor's process, once it is there, and stopped before it has a model if held."""
    known = endpoint.family("ImageGenerator")
    known[0].kill()
    deadline = time.monotonic() + 60
    while True:
        successors = [process for process in endpoint.family("ImageGenerator") if process not in known]
        if successors:
            if held:
                successors[0].suspend()
            return successors[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def replica_log(endpoint, words):
    """The generator's replicas with these words in their logs."""
    paths = (endpoint.folder / "ray").rglob("replica_meanflow_ImageGenerator_*.log")
    return {path.stem.rpartition("_")[2] for path in paths if words in path.read_text()}


def with_user_config(endpoint, name, user_config):
    config = json.loads(json.dumps(endpoint.config))
    config["applications"][0]["deployments"] = [{"name": name, "user_config": user_config}]
    return config


def test_models_change_under_load_without_a_lost_request_and_a_broken_one_changes_nothing(endpoint, expected, models):
    broken = models["second"].parent / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "model_index.json").write_text("{}")
    with Load(endpoint.url, expected, num_callers=3) as load:
        endpoint.deploy(with_user_config(endpoint, "ImageGenerator", {"model": str(models["second"])}))
        wait_until_all_serve(endpoint, "second")
        endpoint.deploy(with_user_config(endpoint, "ImageGenerator", {"model": str(broken)}))
        problem = endpoint.wait_until(lambda _, content: json.loads(content)["problem"], 120)
        # The successor of a replica that dies now is asked for the broken model too, and takes the last good one.
        kill_a_replica(endpoint)
        wait_for_replicas(endpoint)
        wait_until_all_serve(endpoint, "second")
    print("changed:", dict(load.kinds), "on retry:", dict(load.retried))
    assert "no vae/ in" in problem
    assert load.wrong == []
    assert set(load.kinds) <= {(200, "first"), (200, "second"), (503, None)}
    assert load.kinds[200, "first"] > 0
    assert load.kinds[200, "second"] > 100
    assert load.kinds[503, None] <= 3  # of the kill; the changes lose none
    assert set(load.retried) <= {200}
    endpoint.deploy(with_user_config(endpoint, "ImageGenerator", {"model": str(models["first"]), "max_batch_size": 4}))
    wait_until_all_serve(endpoint, "first")


def test_a_replica_that_starts_late_with_an_older_model_does_not_lead_the_others_back(endpoint, models):
    """Serve tells a starting replica nothing of changes: it comes up with what was asked for when it was made."""
    broken = models["second"].parent / "broken too"
    broken.mkdir(exist_ok=True)
    (broken / "model_index.json").write_text("{}")
    words = "is not known to be the newest"
    assert replica_log(endpoint, "first serves now")
    assert replica_log(endpoint, words) == set()  # each that started so far was given the newest
    late = kill_a_replica(endpoint, held=True)
    try:
        endpoint.deploy(with_user_config(endpoint, "ImageGenerator", {"model": str(models["second"])}))
        wait_until_all_serve(endpoint, "second")
        endpoint.deploy(with_user_config(endpoint, "ImageGenerator", {"model": str(broken)}))
        endpoint.wait_until(lambda _, content: json.loads(content)["problem"], 120)
    finally:
        late.resume()
    assert late.pid in {replica["pid"] for replica in wait_for_replicas(endpoint)}
    wait_until_all_serve(endpoint, "second")
    time.sleep(1.0)
    assert models_seen(endpoint) == {"second"}  # and it stays so
    assert len(replica_log(endpoint, words)) == 1
    endpoint.deploy(with_user_config(endpoint, "ImageGenerator", {"model": str(models["first"])}))
    wait_until_all_serve(endpoint, "first")


def test_prometheus_learns_what_the_dashboard_shows(endpoint):
    generate(endpoint.url, 1)
    deadline = time.monotonic() + 90
    wanted = {
        "ray_meanflow_requests_total", "ray_meanflow_request_seconds_bucket", "ray_meanflow_batch_rows_bucket",
        "ray_meanflow_queue_wait_seconds_bucket", "ray_meanflow_model_seconds_bucket",
        "ray_meanflow_decode_seconds_bucket", "ray_meanflow_encode_seconds_bucket", "ray_meanflow_images_total",
    }  # fmt: skip
    while time.monotonic() < deadline:
        text = fetch(f"http://127.0.0.1:{endpoint.metrics_port}/metrics")[2].decode()
        found = set(re.findall(r"^(ray_meanflow_\w+)\{", text, re.MULTILINE))
        if wanted <= found:
            break
        time.sleep(1)
    assert wanted <= found, wanted - found
    assert re.search(r'ray_meanflow_requests_total\{.*route="/generate".*status="200"', text)


def test_the_log_is_structured_and_names_no_class(endpoint):
    generate(endpoint.url, 3)
    deadline = time.monotonic() + 20
    lines = []
    while not lines and time.monotonic() < deadline:
        for path in (endpoint.folder / "ray").rglob("replica_meanflow_Api_*.log"):
            entries = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
            lines += [
                entry for entry in entries if (entry.get("message"), entry.get("route")) == ("request", "/generate")
            ]
        time.sleep(0.2)
    entry = lines[-1]
    assert (entry["method"], entry["status"], entry["images"]) == ("POST", 200, 1)
    assert {"milliseconds", "client", "request_id", "replica"} <= set(entry)
    assert "class" not in entry


def test_the_http_side_knows_where_serve_listens(endpoint):
    text = "".join(path.read_text() for path in (endpoint.folder / "ray").rglob("replica_meanflow_Api_*.log"))
    assert "Serve's HTTP host is 127.0.0.1; API keys: none" in text


@pytest.mark.soak
def test_a_new_application_replaces_the_old_one_replica_by_replica_without_a_lost_request(endpoint, expected):
    config = json.loads(json.dumps(endpoint.config))
    config["applications"][0]["args"]["served_name"] = "renamed"
    with Load(endpoint.url, {**expected, "renamed": expected["first"]}, num_callers=4) as load:
        endpoint.deploy(config)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if {generate(endpoint.url, 1)[1].get("x-model") for _ in range(12)} == {"renamed"}:
                break
            time.sleep(0.5)
        time.sleep(2.0)
    print("replaced:", dict(load.kinds), "on retry:", dict(load.retried))
    assert load.wrong == []
    assert load.kinds[200, "renamed"] > 0
    assert set(load.kinds) <= {(200, "first"), (200, "second"), (200, "renamed")}
