import asyncio
import base64
import io

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import ValidationError

from deploy.app import ImageOrder, api, find_class, make_images
from deploy.models import fetch_generator
from deploy.schema import MAX_SEED, Arguments, GenerateRequest

NAMES = {0: "arrow", 1: "circle", 2: "crane, wader", 3: "crane"}


def test_classes_are_found_by_id_and_by_name():
    assert find_class(1, NAMES) == 1
    assert find_class(" Circle ", NAMES) == 1
    assert find_class("wader", NAMES) == 2


@pytest.mark.parametrize(
    ("wanted", "words"),
    [(4, r"\[0, 3\], but got 4"), (-1, "but got -1"), ("unicorn", "unknown class"), ("crane", r"ids \[2, 3\]")],
)
def test_unknown_and_shared_classes_are_refused(wanted, words):
    with pytest.raises(ValueError, match=words):
        find_class(wanted, NAMES)


def test_orders_of_mixed_steps_come_back_in_their_order(pipeline):
    orders = [ImageOrder(3, 7, 2), ImageOrder(1, 8, 1), ImageOrder(3, 7, 1), ImageOrder(9, 0, 2)]
    together = make_images(pipeline, orders)
    for order, image in zip(orders, together, strict=True):
        alone = make_images(pipeline, [order])[0]
        assert np.abs(image.astype(int) - alone.astype(int)).max() <= 1
    assert not np.array_equal(together[0], together[2])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "class"),
        ({"class": "star", "num_images": 0}, "num_images"),
        ({"class": "star", "num_inference_steps": -3}, "num_inference_steps"),
        ({"class": "star", "seed": -1}, "seed"),
        ({"class": "star", "seed": MAX_SEED + 1}, "seed"),
        ({"class": "star", "response_format": "gif"}, "response_format"),
        ({"class": "star", "guidance": 3}, "guidance"),
        ({"class": [1]}, "class"),
    ],
)
def test_malformed_requests_are_refused_by_field(body, field):
    with pytest.raises(ValidationError) as error:
        GenerateRequest.model_validate(body)
    assert field in str(error.value)


def test_arguments_refuse_what_they_do_not_know():
    with pytest.raises(ValidationError, match="max_batch"):
        Arguments.model_validate({"model": "x", "max_batch": 3})
    assert Arguments.model_validate({"model": "x", "max_batch_size": "8"}).max_batch_size == 8  # from a command line


def test_missing_models_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="is no folder; wanted a generator's folder"):
        fetch_generator(str(tmp_path / "none"), None)
    with pytest.raises(ValueError, match="cannot fetch models:/none@champion"):
        fetch_generator("models:/none@champion", f"sqlite:///{tmp_path}/mlflow.db")


class InProcessGenerator:
    """The generator without a cluster: the same functions behind the handle's interface."""

    def __init__(self, pipeline):
        async def class_names():
            return pipeline.class_names

        async def make(order):
            return await asyncio.to_thread(lambda: make_images(pipeline, [order])[0])

        self.class_names = type("Method", (), {"remote": staticmethod(class_names)})
        self.make = type("Method", (), {"remote": staticmethod(make)})


@pytest.fixture
def client(pipeline, monkeypatch):
    """The HTTP side over an in-process generator."""
    from deploy.app import Api

    plain_class = Api.func_or_class.__mro__[1]  # ours, beneath Serve's wrapper
    ingress = plain_class(InProcessGenerator(pipeline), Arguments(model="here", max_images=4, max_steps=8))
    # Serve binds the routes to its replica's instance by this dependency; here it is ours.
    from ray import serve

    monkeypatch.setattr(serve, "get_replica_context", lambda: type("Context", (), {"servable_object": ingress}))
    return TestClient(api)


def test_png_is_the_image_of_class_and_seed(client, pipeline):
    response = client.post("/generate", json={"class": "star", "seed": 7, "num_images": 2})
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-class-id"] == "8"
    picture = np.asarray(Image.open(io.BytesIO(response.content))).astype(int)
    expected = pipeline.images_from_seeds([8, 8], [7, 8], 1).numpy().astype(int)
    assert picture.shape == (64, 128, 3)
    assert np.abs(picture[:, 64:] - expected[1]).max() <= 1


def test_json_carries_an_image_per_seed(client):
    answer = client.post(
        "/generate", json={"class": 3, "seed": 5, "num_images": 3, "num_inference_steps": 2, "response_format": "json"}
    ).json()
    assert (answer["class_id"], answer["class_name"], answer["num_inference_steps"]) == (3, "cross", 2)
    assert [image["seed"] for image in answer["images"]] == [5, 6, 7]
    assert base64.b64decode(answer["images"][0]["png_base64"])[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"class": "unicorn"}, "unknown class 'unicorn'"),
        ({"class": 10}, "but got 10"),
        ({"class": 1, "num_images": 5}, "num_images: at most 4 here, but got 5"),
        ({"class": 1, "num_inference_steps": 9}, "num_inference_steps: at most 8"),
        ({"class": 1, "num_inference_steps": 0}, "num_inference_steps: Input should be greater than or equal to 1"),
        ({"num_images": 1}, "class: Field required"),
    ],
)
def test_bad_requests_get_422_and_the_reason(client, body, words):
    response = client.post("/generate", json=body)
    assert response.status_code == 422
    assert words in response.json()["detail"]


def test_health_and_classes(client):
    assert client.get("/healthz").json() == {"status": "ok", "model": "here", "num_classes": 10}
    assert client.get("/classes").json()[8] == {"id": 8, "name": "star"}
    assert len(client.get("/classes").json()) == 10
