"""Security headers, access log and request metrics."""

from tests.support.api import KEYS, bearer


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
