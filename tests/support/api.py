"""The HTTP API of the endpoint, with a stub in place of the generator."""

import contextlib
import io
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from fastapi.testclient import TestClient
from PIL import Image

from deploy.api.auth import hash_key
from deploy.api.routes import build_http_app
from deploy.api.service import ApiService
from deploy.messages import (
    ClassEntry,
    GenerationPart,
    GenerationRequest,
    GenerationResult,
    GeneratorStatus,
    ImageMode,
    ModelHashes,
    ModelInfo,
    ModelSource,
    Refusal,
)
from deploy.settings import Arguments
from tests.support.endpoint import Recorded

KEYS = {"alice": "wonderland-key", "bob": "builder-key"}
KEY_HASHES = {name: hash_key(key) for name, key in KEYS.items()}
ERROR_FIELDS = {"message", "type", "param", "code"}


def bearer(key: str) -> dict[str, str]:
    """The header that sends an API key."""
    return {"Authorization": f"Bearer {key}"}


def error_of(response: Any, status: int) -> dict[str, Any]:
    """Checks a response's status and the fields of its error, and returns the error."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == ERROR_FIELDS
    return error


def pixels(content: bytes) -> np.ndarray:
    """An image file -> int (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


class StubGenerator:
    """Generates smooth 64x64 images that depend on the seed alone, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.refusal: Refusal | None = None
        """If set, refuses every request."""
        self.image_mode: ImageMode = "RGB"
        self.classes = [ClassEntry(id=id, name=f"class {id}", wnid=f"n{id}") for id in range(10)]
        self.status = GeneratorStatus(
            model=ModelInfo(
                id="stub", created=0, image_size=64, image_mode="RGB", num_classes=10, supports_guidance=True,
                guidance_scale=1.0,
                guidance_interval=[0.0, 1.0], has_previews=True, precision="float32", prediction="u",
                source=ModelSource(model="stub", name="stub"), hashes=ModelHashes(transformer="0", vae="0"),
            ),
            problem=None,
        )  # fmt: skip

    @staticmethod
    def image(seed: int) -> np.ndarray:
        """uint8 (64, 64, 3)."""
        corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(corners).resize((64, 64)))

    async def generate(self, request: GenerationRequest) -> GenerationResult | Refusal:
        self.requests.append(request)
        if self.refusal is not None:
            return self.refusal
        weights = None
        if request.seed_end is not None:
            weights = [index / (request.num_images - 1) for index in range(request.num_images)]
        return GenerationResult(
            images=np.stack([self.image(request.seed + index) for index in range(request.num_images)]),
            image_mode=self.image_mode, class_id=8, class_name="star", wnid="d0000008", model="stub", weights=weights,
            queue_seconds=0.001, model_seconds=0.002, decode_seconds=0.003,
        )  # fmt: skip

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationPart | Refusal]:
        """Yields the images one by one. With a refusal, the first image and then the refusal."""
        refusal, self.refusal = self.refusal, None
        answer = await self.generate(request)
        assert isinstance(answer, GenerationResult)
        for index in range(request.num_images if refusal is None else 1):
            yield GenerationPart(
                indices=[index],
                partial_index=None,
                result=replace(
                    answer,
                    images=answer.images[index : index + 1],
                    weights=answer.weights and answer.weights[index : index + 1],
                ),
            )
        if refusal is not None:
            yield refusal

    async def describe(self) -> GeneratorStatus:
        return self.status

    async def list_classes(self) -> list[ClassEntry]:
        return self.classes


@dataclass
class StubEndpoint:
    """The HTTP API in this process, with a stub generator."""

    client: TestClient
    generator: StubGenerator
    api: ApiService
    recorded: Recorded


@contextlib.contextmanager
def stub_endpoint(http_host: str | None = None, **arguments: Any) -> Iterator[StubEndpoint]:
    """Starts the HTTP API in this process. arguments: of the application, other than the model."""
    generator, recorded = StubGenerator(), Recorded()
    api = ApiService(generator, Arguments(model="stub", **arguments), recorded, http_host)
    api.reconfigure({})
    with TestClient(build_http_app(api), raise_server_exceptions=False) as client:
        yield StubEndpoint(client, generator, api, recorded)
