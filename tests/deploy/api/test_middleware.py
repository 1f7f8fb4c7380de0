"""Security headers, access log and request metrics."""

import pytest

from deploy.settings import Arguments
from tests.support.api import KEYS, bearer, stub_endpoint

ALLOWED = "access-control-allow-origin"


def test_every_response_has_security_headers(stub):
    for response in (stub.client.get("/healthz"), stub.client.get("/nothing"), stub.client.post("/generate", json={})):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]


def test_access_log_contains_key_and_number_of_images_but_no_class_or_path(locked, caplog):
    with caplog.at_level("INFO", logger="meanflow.access"):
        locked.client.post("/generate", json={"class": "star", "num_images": 2}, headers=bearer(KEYS["alice"]))
        locked.client.get("/classes?search=star", headers=bearer(KEYS["bob"]))
        locked.client.get("/secret-path")
    generate, classes, other = (record for record in caplog.records if record.name == "meanflow.access")
    assert (generate.method, generate.route, generate.status) == ("POST", "/generate", 200)
    assert (generate.key, generate.images, generate.model) == ("alice", 2, "stub")
    assert generate.milliseconds > 0
    assert (classes.route, classes.key) == ("/classes", "bob")
    assert other.route == "other"
    for record in (generate, classes, other):
        assert "star" not in str(vars(record))
        assert "secret-path" not in str(vars(record))


def test_log_prompts_adds_the_class_to_the_access_log(stub, caplog):
    stub.api.reconfigure({"log_prompts": True})
    with caplog.at_level("INFO", logger="meanflow.access"):
        stub.client.post("/generate", json={"class": "star"})
    assert vars(caplog.records[-1])["class"] == "star"


def test_requests_are_counted_by_route_method_and_status(stub):
    stub.client.post("/generate", json={"class": "star"})
    stub.client.get("/generate")
    stub.client.get("/some/path")
    tags = [tuple(tags.values()) for name, _, tags in stub.recorded.entries if name == "meanflow_requests_total"]
    assert tags == [("/generate", "POST", "200"), ("/generate", "GET", "405"), ("other", "GET", "404")]
    assert len(stub.recorded.values("meanflow_request_seconds")) == 3
    assert stub.recorded.values("meanflow_encode_seconds")[0] > 0


def test_images_state_their_times_where_browsers_show_them(stub):
    for path, body in (("/generate", {"class": "star"}), ("/v1/images/generations", {"prompt": "star"})):
        header = stub.client.post(path, json=body).headers["server-timing"]
        times = dict(part.split(";dur=") for part in header.split(", "))
        assert list(times) == ["queue", "model", "decode", "encode", "total"]
        assert [float(times[part]) for part in ("queue", "model", "decode")] == [1.0, 2.0, 3.0]


def test_only_listed_origins_may_call_from_a_browser():
    with stub_endpoint(cors_origins="https://a.org, http://localhost:5173") as running:
        for origin, allowed in (("https://a.org", "https://a.org"), ("https://b.org", None)):
            headers = {"origin": origin, "access-control-request-method": "POST",
                       "access-control-request-headers": "authorization,content-type,x-stainless-lang"}  # fmt: skip
            preflight = running.client.options("/generate", headers=headers)
            assert preflight.headers.get(ALLOWED) == allowed
            assert preflight.status_code == (200 if allowed else 400)
            for answer in (
                running.client.post("/generate", json={"class": "star"}, headers={"origin": origin}),
                running.client.post("/generate", json={}, headers={"origin": origin}),  # an error can be read, too
            ):
                assert answer.headers.get(ALLOWED) == allowed
                assert "X-Seed" in answer.headers["access-control-expose-headers"]


def test_by_default_no_other_origin_may_call(stub):
    assert ALLOWED not in stub.client.get("/healthz", headers={"origin": "https://a.org"}).headers
    with pytest.raises(ValueError, match="expected an origin such as"):
        Arguments(model="m", cors_origins=["a.org/page"])
