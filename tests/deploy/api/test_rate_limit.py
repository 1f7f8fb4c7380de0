"""Rate limits per caller, in images."""

import math
import time

import pytest

from deploy.api.rate_limit import RateLimiter
from tests.support.api import KEYS, bearer, error_of


def test_rates_count_images_per_caller():
    limiter = RateLimiter("10/minute;100/hour")
    assert limiter.seconds_until_allowed("alice", 8) is None
    assert 0 < limiter.seconds_until_allowed("alice", 3) <= 120
    assert limiter.seconds_until_allowed("alice", 2) is None  # refused images do not count
    assert limiter.seconds_until_allowed("bob", 10) is None
    assert limiter.seconds_until_allowed("carol", 11) == math.inf
    assert RateLimiter(None).seconds_until_allowed("alice", 10**9) is None


@pytest.mark.parametrize("num_images", [5, 15, 20])
def test_a_caller_that_waits_for_the_given_time_is_allowed(monkeypatch, num_images):
    now = [1_000_000.3]
    monkeypatch.setattr(time, "time", lambda: now[0])
    limiter = RateLimiter("20/second")
    num_refused = 0
    for _ in range(30):
        wait = limiter.seconds_until_allowed("alice", num_images)
        if wait is not None:
            num_refused += 1
            assert wait <= 2.0
            now[0] += wait + 0.001
            assert limiter.seconds_until_allowed("alice", num_images) is None
    assert num_refused > 5


def test_both_image_routes_count_against_the_rate_of_their_key(locked):
    locked.api.reconfigure({"rate_limit": "5/minute"})
    alice, bob = bearer(KEYS["alice"]), bearer(KEYS["bob"])
    openai, generate = {"prompt": "star", "n": 4}, {"class": "star", "num_images": 4}
    assert locked.client.post("/v1/images/generations", json=openai, headers=alice).status_code == 200
    response = locked.client.post("/generate", json=generate, headers=alice)
    assert error_of(response, 429)["code"] == "rate_limit_exceeded"
    assert 1 <= int(response.headers["retry-after"]) <= 120  # counts fade over the next window
    assert locked.client.post("/generate", json=generate, headers=bob).status_code == 200
    assert locked.client.get("/classes", headers=alice).status_code == 200


def test_more_images_than_the_rate_allows_at_all_are_invalid(stub):
    stub.api.reconfigure({"rate_limit": "5/minute"})
    response = stub.client.post("/generate", json={"class": "star", "num_images": 6})
    assert "6 images in one request exceed the rate of 5/minute" in error_of(response, 400)["message"]
    assert "retry-after" not in response.headers


def test_other_settings_do_not_reset_the_rate(stub):
    body = {"class": "star", "num_images": 2}
    stub.api.reconfigure({"rate_limit": "2/day"})
    assert stub.client.post("/generate", json=body).status_code == 200
    stub.api.reconfigure({"rate_limit": "2/day", "max_images": 3})
    assert stub.client.post("/generate", json=body).status_code == 429
