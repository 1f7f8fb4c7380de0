import hashlib
import math
import re
import subprocess
import sys
import time

import pytest
from pydantic import ValidationError

from deploy.api.auth import find_key_name, hash_key, is_loopback, require_safe_exposure
from deploy.api.rate_limit import RateLimiter
from deploy.settings import API_SETTINGS, Arguments, apply_user_config


@pytest.mark.parametrize("host", [None, "127.0.0.1", "localhost", "::1", "[::1]", "127.8.9.1"])
def test_loopback_may_be_open(host):
    assert is_loopback(host)
    require_safe_exposure(Arguments(model="m"), host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", ""])
def test_an_endpoint_that_others_reach_wants_keys_or_a_word(host):
    assert not is_loopback(host)
    with pytest.raises(
        ValueError, match=f"host {re.escape(host)} is reachable from other machines, and there are no API keys"
    ):
        require_safe_exposure(Arguments(model="m"), host)
    require_safe_exposure(Arguments(model="m", auth="none"), host)
    require_safe_exposure(Arguments(model="m", api_keys={"alice": hash_key("k")}), host)


def test_keys_are_found_by_their_hashes():
    keys = {"alice": hash_key("one"), "bob": hash_key("two")}
    assert find_key_name("two", keys) == "bob"
    assert find_key_name("three", keys) is None
    assert find_key_name(hash_key("one"), keys) is None  # the hash is no key
    assert hash_key("one") == hashlib.sha256(b"one").hexdigest()


@pytest.mark.parametrize("digest", ["plain-key", "A" * 64, hash_key("x") + "0"])
def test_a_key_in_plain_text_is_no_hash(digest):
    with pytest.raises(ValidationError, match=r"'alice' must be given as its SHA-256"):
        Arguments(model="m", api_keys={"alice": digest})


def test_rates_are_per_caller_and_by_images():
    limiter = RateLimiter("10/minute;100/hour")
    assert limiter.seconds_until_allowed("alice", 8) is None
    wait = limiter.seconds_until_allowed("alice", 3)
    assert 0 < wait <= 120
    assert limiter.seconds_until_allowed("alice", 2) is None  # what was refused did not count
    assert limiter.seconds_until_allowed("bob", 10) is None
    assert limiter.seconds_until_allowed("carol", 11) == math.inf
    assert RateLimiter(None).seconds_until_allowed("alice", 10**9) is None


def test_whoever_comes_again_when_told_is_allowed():
    limiter = RateLimiter("20/second")
    waited = 0
    for _ in range(12):
        wait = limiter.seconds_until_allowed("alice", 15)
        if wait is not None:
            assert wait <= 2.0
            time.sleep(wait + 0.01)
            waited += 1
            assert limiter.seconds_until_allowed("alice", 15) is None
        if waited == 3:
            break
    assert waited == 3


def test_settings_that_change_in_place_are_told_from_those_that_do_not():
    arguments = Arguments(model="m", max_images=7)
    changed = apply_user_config(arguments, {"max_steps": 3}, API_SETTINGS)
    assert (changed.max_images, changed.max_steps) == (7, 3)
    with pytest.raises(ValueError, match="but got model, num_gpus;"):
        apply_user_config(arguments, {"num_gpus": 1, "model": "x"}, API_SETTINGS)
    with pytest.raises(ValidationError, match="rate_limit"):
        apply_user_config(arguments, {"rate_limit": "often"}, API_SETTINGS)


def test_batch_sizes_come_from_the_command_line_and_reach_the_largest_batch():
    assert Arguments(model="m", batch_sizes="1,4,16").batch_sizes == [1, 4, 16]
    assert Arguments(model="m", compile=True, max_batch_size=12).batch_sizes == [1, 2, 4, 8, 12]
    assert Arguments(model="m").batch_sizes == []
    with pytest.raises(ValidationError, match=r"batch_sizes must reach max_batch_size, 16, but got \[1, 4\]"):
        Arguments(model="m", batch_sizes="1,4")


def test_the_command_makes_a_key_and_its_hash():
    made = subprocess.run(
        [sys.executable, "-m", "deploy.keys", "alice"], check=True, capture_output=True, text=True
    ).stdout  # fmt: skip
    key = re.search(r"mf-[\w-]{43}", made)[0]
    digest = re.search(r'alice: "([0-9a-f]{64})"', made)[1]
    assert find_key_name(key, {"alice": digest}) == "alice"
