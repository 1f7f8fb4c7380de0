"""Fuzz tests with requests generated from the OpenAPI document and with random bodies."""

import collections
import json
import random
import subprocess
import sys

import pytest

from deploy.settings import Arguments
from tests.support.api import ERROR_FIELDS, KEY_HASHES, KEYS
from tests.support.endpoint import DEPLOYMENTS, fetch, over_http, running_endpoint

# Excludes positive_data_acceptance: the OpenAPI document allows any string as a class name.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,ignored_auth"
)
# Schemathesis' defaults plus 413, because invalid data may also be too long.
CONFIG = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429]
"""
KEY = KEYS["alice"]


def run_schemathesis(url, folder, num_examples, seed=None):
    """Tests every operation of a running endpoint. Without a seed, Schemathesis draws one and prints it."""
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG)
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{url}/openapi.json",
        "--checks", CHECKS, "--mode", "all", "--max-examples", str(num_examples),
        "--phases", "examples,coverage,fuzzing", "--no-color", "--header", f"Authorization: Bearer {KEY}",
        *([] if seed is None else ["--seed", str(seed)]),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500)
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.timeout(300)
def test_responses_conform_to_the_openapi_document(generator_folder, tmp_path):
    arguments = Arguments(model=str(generator_folder), max_images=2, max_steps=3, api_keys=KEY_HASHES)
    with over_http(arguments) as url:
        # This seed includes an invalid body of more than 64 KiB.
        run_schemathesis(url, tmp_path, 20, seed=263958209578772595287919339039673785419)


def random_body(draw):
    """Draws a request body that may be invalid."""
    values = [None, True, 0, 1, -1, 3, 2**63, 2**70, 1e308, 0.5, "", "star", "class:3", "class:99", "x" * 300, "\u0000",
              "\ud7ff", [], {}, [1.0, 0.0], [1, 0.5, 0], ["a"], {"a": 1}, "png", "url", "64x64"]  # fmt: skip
    fields = ["class", "prompt", "n", "num_images", "seed", "seed_end", "num_inference_steps", "timesteps", "preview",
              "guidance_scale", "guidance_interval", "response_format", "output_format", "size", "other"]  # fmt: skip
    kind = draw.random()
    if kind < 0.1:
        return draw.randbytes(draw.randrange(200))
    body = {field: draw.choice(values) for field in draw.sample(fields, draw.randrange(6))}
    if kind < 0.6:
        body[draw.choice(["class", "prompt"])] = draw.choice(["star", 3, "class:2"])
    content = json.dumps(body).encode()
    return content[: draw.randrange(len(content) + 1)] if kind > 0.95 else content


@pytest.mark.cluster
@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("topology", DEPLOYMENTS)
def test_replicas_survive_ten_thousand_random_bodies(generator_folder, tmp_path, topology):
    arguments = {"model": str(generator_folder), "topology": topology, "max_images": 4, "max_steps": 4,
                 "api_keys": KEY_HASHES}  # fmt: skip
    with running_endpoint(arguments) as endpoint:
        replicas = {process.pid for process in endpoint.processes("ServeReplica")}
        assert len(replicas) == len(DEPLOYMENTS[topology])
        draw, counts = random.Random(0), collections.Counter()
        for number in range(10_000):
            path = draw.choice(["/generate", "/v1/images/generations"])
            status, _, content = fetch(endpoint.url + path, random_body(draw), key=KEY)
            counts[path, status] += 1
            assert status < 500, content
            if status != 200:
                assert set(json.loads(content)["error"]) == ERROR_FIELDS
            if number % 1000 == 999:
                print(number + 1, dict(counts))
        assert {process.pid for process in endpoint.processes("ServeReplica")} == replicas
        assert {status for _, status in counts} >= {200, 400, 422}
        run_schemathesis(endpoint.url, tmp_path, 300)
        assert {process.pid for process in endpoint.processes("ServeReplica")} == replicas
