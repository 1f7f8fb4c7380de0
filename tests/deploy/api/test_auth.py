"""API keys: which hosts and routes require one, and how keys are hashed and replaced."""

import hashlib
import re

import pytest
from pydantic import ValidationError

from deploy import keys
from deploy.api.auth import find_key_name, hash_key, is_loopback, require_safe_exposure
from deploy.settings import Arguments
from tests.support.api import KEYS, bearer, error_of

GENERATE = {"json": {"class": "star"}}
OPENAI = {"json": {"prompt": "star"}}


@pytest.mark.parametrize("host", [None, "127.0.0.1", "localhost", "::1", "[::1]", "127.8.9.1"])
def test_endpoint_on_loopback_needs_no_keys(host):
    assert is_loopback(host)
    require_safe_exposure(Arguments(model="m"), host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", ""])
def test_endpoint_on_other_hosts_needs_keys_or_auth_none(host):
    assert not is_loopback(host)
    with pytest.raises(ValueError, match=f"host {re.escape(host)} is reachable from other machines"):
        require_safe_exposure(Arguments(model="m"), host)
    require_safe_exposure(Arguments(model="m", auth="none"), host)
    require_safe_exposure(Arguments(model="m", api_keys={"alice": hash_key("k")}), host)


def test_keys_are_found_by_their_hash():
    api_keys = {"alice": hash_key("one"), "bob": hash_key("two")}
    assert find_key_name("two", api_keys) == "bob"
    assert find_key_name("three", api_keys) is None
    assert find_key_name(hash_key("one"), api_keys) is None  # the hash itself is not a key
    assert hash_key("one") == hashlib.sha256(b"one").hexdigest()


@pytest.mark.parametrize("digest", ["plain-key", "A" * 64, hash_key("x") + "0"])
def test_plain_text_key_is_refused_where_a_hash_is_required(digest):
    with pytest.raises(ValidationError, match=r"'alice' must be given as its SHA-256"):
        Arguments(model="m", api_keys={"alice": digest})


def test_keys_command_prints_a_key_and_its_hash(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["deploy.keys", "alice"])
    keys.main()
    output = capsys.readouterr().out
    key = re.search(r"mf-[\w-]{43}", output)[0]
    digest = re.search(r'alice: "([0-9a-f]{64})"', output)[1]
    assert find_key_name(key, {"alice": digest}) == "alice"


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("POST", "/generate", GENERATE), ("POST", "/v1/images/generations", OPENAI), ("GET", "/classes", {}),
        ("GET", "/v1/models", {}), ("GET", "/v1/models/stub", {}), ("GET", "/version", {}),
    ],
)  # fmt: skip
def test_images_and_models_need_a_valid_key(locked, method, path, options):
    for headers in ({}, bearer("wrong"), {"Authorization": f"Basic {KEYS['alice']}"}, bearer("")):
        response = locked.client.request(method, path, headers=headers, **options)
        assert error_of(response, 401)["code"] == "invalid_api_key", headers
        assert response.headers["www-authenticate"] == "Bearer"
    for key in KEYS.values():
        assert locked.client.request(method, path, headers=bearer(key), **options).status_code == 200


@pytest.mark.parametrize(
    ("headers", "received"),
    [
        ({}, "none"),
        (bearer("wrong"), "an unknown one"),
        ({"Authorization": KEYS["alice"]}, "another scheme than Bearer"),
    ],
)
def test_a_refused_key_is_described(locked, headers, received):
    response = locked.client.post("/generate", headers=headers, **GENERATE)
    assert error_of(response, 401)["message"].endswith(f"but got {received}")


def test_pages_and_health_checks_need_no_key(locked):
    for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json"):
        assert locked.client.get(path).status_code == 200


def test_keys_can_be_replaced_at_runtime_but_not_removed(locked):
    locked.api.reconfigure({"api_keys": {"carol": hash_key("new-key")}})
    assert locked.client.get("/version", headers=bearer("new-key")).status_code == 200
    assert locked.client.get("/version", headers=bearer(KEYS["alice"])).status_code == 401
    locked.api.reconfigure({"api_keys": {}})
    assert locked.client.get("/version").status_code == 401
    assert locked.client.get("/version", headers=bearer("new-key")).status_code == 200


def test_readiness_details_require_a_key(locked):
    locked.api.reconfigure({"api_keys": {}})
    assert "not removed" in locked.client.get("/readyz", headers=bearer(KEYS["alice"])).json()["problem"]
    assert "not removed" not in locked.client.get("/readyz").json()["problem"]


def test_messages_never_contain_a_plain_text_key(locked):
    locked.api.reconfigure({"api_keys": {"carol": "a-plain-key"}})
    problem = locked.client.get("/readyz", headers=bearer(KEYS["alice"])).json()["problem"]
    assert "'carol' must be given as its SHA-256" in problem
    assert "a-plain-key" not in problem
