"""Models, classes, health, and the pages."""

import re

import pytest

from deploy.messages import GeneratorStatus
from tests.support.api import error_of

STAR = {"id": 8, "name": "star", "wnid": "d0000008"}


def test_classes_are_listed_by_id(client):
    classes = client.get("/classes").json()
    assert len(classes) == 10
    assert classes[8] == STAR
    assert client.get("/classes", params={"limit": 3}).json() == classes[:3]
    error_of(client.get("/classes", params={"limit": 0}), 422)


@pytest.mark.parametrize("search", ["ta", "8", "D0000008", " STAR "])
def test_classes_are_searched_by_name_id_and_wnid(client, search):
    matches = client.get("/classes", params={"search": search}).json()
    assert STAR in matches
    assert len(matches) < 10


def test_model_and_version_describe_the_serving_model(client, generator_folder):
    models = client.get("/v1/models").json()
    model = models["data"][0]
    assert (models["object"], model["id"], model["object"], model["image_size"]) == ("list", "first", "model", 64)
    assert (model["max_images"], model["max_steps"], model["has_previews"]) == (4, 8, False)
    assert model["source"]["model"] == str(generator_folder)
    assert len(model["hashes"]["transformer"]) == len(model["hashes"]["vae"]) == 64
    assert client.get("/v1/models/first").json() == model
    assert error_of(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    assert client.get("/version").json()["model"] == model


def test_health_and_readiness_of_a_serving_endpoint(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "model": "first", "problem": None}


def test_without_a_model_the_endpoint_is_alive_but_not_ready(stub):
    stub.generator.status = GeneratorStatus(model=None, problem="loading")
    response = stub.client.get("/readyz")
    assert response.status_code == 503
    assert response.json() == {"status": "not ready", "model": None, "problem": "loading"}
    response = stub.client.get("/v1/models")
    assert error_of(response, 503)["code"] == "not_ready"
    assert response.headers["retry-after"] == "5"
    assert stub.client.get("/healthz").status_code == 200


def test_readiness_reports_the_problems_of_generator_and_api(stub):
    stub.generator.status = GeneratorStatus(model=stub.generator.status.model, problem="an older model serves")
    stub.api.reconfigure({"rate_limit": "much"})
    response = stub.client.get("/readyz")
    assert (response.status_code, response.json()["status"]) == (200, "ready")
    problem = response.json()["problem"]
    assert problem.startswith("an older model serves; settings of the HTTP API refused")
    assert "expected a rate" in problem


def test_page_and_docs_load_nothing_from_other_hosts(client):
    page, docs = client.get("/"), client.get("/docs")
    for response in (page, docs):
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/html")
        assert re.findall(r"(?:src|href)=[\"'](https?:)?//", response.text) == []
    for path in re.findall(r"(?:src|href)=[\"'](/static(?:-docs)?/[^\"']+)", page.text + docs.text):
        assert client.get(path).status_code == 200
    assert "'unsafe-inline'" not in page.headers["content-security-policy"]
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
