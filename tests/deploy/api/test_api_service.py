"""Settings of the HTTP API, and the repetition of refusals for overload."""

import pytest

from deploy.api import service
from deploy.api.service import ApiService
from deploy.messages import Refusal
from deploy.settings import Arguments
from tests.support.api import KEY_HASHES, stub_endpoint
from tests.support.endpoint import Recorded


def api_without_generator(http_host=None, **arguments):
    return ApiService(None, Arguments(model="m", **arguments), Recorded(), http_host)


@pytest.mark.parametrize("http_host", ["127.0.0.1", "0.0.0.0"])
def test_a_new_replica_keeps_its_keys_when_other_settings_are_invalid(http_host):
    api = api_without_generator(http_host)
    api.reconfigure({"api_keys": KEY_HASHES, "rate_limit": "much"})
    assert api.settings.api_keys == KEY_HASHES
    assert "expected a rate" in api.problem


def test_a_new_replica_does_not_start_with_invalid_keys():
    with pytest.raises(ValueError, match="must be given as its SHA-256"):
        api_without_generator("127.0.0.1").reconfigure({"api_keys": {"alice": "plain"}})


def test_a_new_replica_does_not_start_open_to_other_machines():
    with pytest.raises(ValueError, match=r"host 0\.0\.0\.0 is reachable"):
        api_without_generator("0.0.0.0").reconfigure({})
    api_without_generator("0.0.0.0", auth="none").reconfigure({})


def test_requests_before_the_first_configuration_are_refused():
    with stub_endpoint(api_keys=KEY_HASHES) as running:
        running.api.is_configured = False
        assert running.client.get("/version").status_code == 503


def test_rejected_settings_are_reported_until_they_are_valid_again():
    api = api_without_generator()
    for rate in (None, "much", None):
        api.reconfigure({"rate_limit": rate})
    assert api.recorder.values("meanflow_settings_refused") == [0.0, 1.0, 0.0]
    parts = [tags for name, _, tags in api.recorder.entries if name == "meanflow_settings_refused"]
    assert parts == [{"part": "api"}] * len(parts)
    assert api.problem is None


FULL = Refusal(status=429, code="overloaded", message="full", retry_after_seconds=30.0)


def statuses(running, *requests):
    """Sends requests of (images, steps) one after the other; returns their statuses."""
    return [
        running.client.post(
            "/generate", json={"class": "star", "num_images": images, "num_inference_steps": steps}
        ).status_code
        for images, steps in requests
    ]


def test_an_overloaded_refusal_is_repeated_without_calling_the_generator(stub, monkeypatch):
    monkeypatch.setattr(service, "REPEAT_REFUSAL_SECONDS", 100.0)
    stub.generator.refusal = FULL
    assert statuses(stub, (2, 1), (2, 1), (4, 1)) == [429, 429, 429]
    assert len(stub.generator.requests) == 1
    stub.generator.refusal = None
    # Fewer images may fit, and other step counts have their own batches.
    assert statuses(stub, (1, 1), (2, 2), (2, 1)) == [200, 200, 429]


def test_an_overloaded_refusal_expires(stub, monkeypatch):
    monkeypatch.setattr(service, "REPEAT_REFUSAL_SECONDS", 0.0)
    stub.generator.refusal = FULL
    assert statuses(stub, (2, 1), (2, 1)) == [429, 429]
    assert len(stub.generator.requests) == 2
