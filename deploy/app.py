"""Stage 4: the one-step generator over HTTP, with Ray Serve.

    serve run deploy.app:build_app model=runs/demo/generator        # http://127.0.0.1:8000
    curl 127.0.0.1:8000/generate -H 'content-type: application/json' -d '{"class": "star", "seed": 7}' -o star.png

An ingress answers HTTP and encodes PNGs; the generator, a deployment of its own, gathers the images of all requests
that arrive together into one network call. An image is a function of (class, seed, steps), whatever shares its batch.
"""

import asyncio
import base64
import io
import logging
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

from deploy.models import fetch_generator, is_registered
from deploy.schema import MAX_SEED, Arguments, ClassEntry, GeneratedImage, GenerateRequest, GenerateResponse, Health
from meanflow_core.generator import load_pipeline
from meanflow_core.pipeline import MeanFlowPipeline

logger = logging.getLogger(__name__)

api = FastAPI(title="meanflow-ray", description="Class-conditional images in one network call.")


@dataclass(frozen=True)
class ImageOrder:
    """One image to make."""

    label: int
    seed: int
    num_inference_steps: int


def make_images(pipeline: MeanFlowPipeline, orders: list[ImageOrder]) -> list[np.ndarray]:
    """Images uint8 (H, W, 3) for orders of any classes, seeds and steps: a pipeline call per number of steps."""
    images: list[np.ndarray | None] = [None] * len(orders)
    for steps in {order.num_inference_steps for order in orders}:
        rows = [row for row, order in enumerate(orders) if order.num_inference_steps == steps]
        labels, seeds = [orders[row].label for row in rows], [orders[row].seed for row in rows]
        made = pipeline.images_from_seeds(labels, seeds, steps)
        for row, image in zip(rows, made.cpu().numpy(), strict=True):
            images[row] = image
    return [image for image in images if image is not None]


@serve.deployment
class ImageGenerator:
    """A generator on one device, its calls batched over requests."""

    def __init__(self, arguments: Arguments) -> None:
        self._pipeline = load_pipeline(
            fetch_generator(arguments.model, arguments.tracking_uri), "cuda" if torch.cuda.is_available() else "cpu"
        )
        self._class_names = self._pipeline.class_names or {
            label: str(label) for label in range(self._pipeline.transformer.config.num_classes)
        }
        self.make.set_max_batch_size(arguments.max_batch_size)
        self.make.set_batch_wait_timeout_s(arguments.batch_wait_seconds)
        make_images(self._pipeline, [ImageOrder(0, 0, 1)])  # the first call is slow; a request should not pay for it

    async def class_names(self) -> dict[int, str]:
        """{class id: name}."""
        return self._class_names

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def make(self, orders: list[ImageOrder]) -> list[np.ndarray]:
        """One image uint8 (H, W, 3) per order; callers hand in one order each."""
        # Off the event loop, so that the next batch gathers meanwhile.
        return await asyncio.to_thread(make_images, self._pipeline, orders)


def find_class(wanted: int | str, class_names: dict[int, str]) -> int:
    """The id of a class given by id or by name. Raises ValueError for an unknown one, or a name that several share."""
    if isinstance(wanted, int):
        if wanted not in class_names:
            raise ValueError(f"class ids lie in [0, {len(class_names) - 1}], but got {wanted}")
        return wanted
    name = wanted.strip().lower()
    found = [
        label
        for label, names in class_names.items()
        if name in (synonym.strip().lower() for synonym in names.split(","))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"class name {wanted!r} is shared by the ids {found}; name the id")
    raise ValueError(f"unknown class {wanted!r}; GET /classes lists the {len(class_names)} known ones")


def to_png(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


@api.exception_handler(RequestValidationError)
async def explain_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    """422 with one readable sentence per fault."""
    faults = [
        f"{'.'.join(str(part) for part in fault['loc'][1:]) or 'body'}: {fault['msg']}" for fault in error.errors()
    ]
    return JSONResponse({"detail": "; ".join(faults)}, status_code=422)


@serve.deployment
@serve.ingress(api)
class Api:
    """The HTTP side: checks requests, asks the generator, encodes images."""

    def __init__(self, generator: DeploymentHandle, arguments: Arguments) -> None:
        self._generator = generator
        self._arguments = arguments
        self._class_names: dict[int, str] = {}

    async def _known_classes(self) -> dict[int, str]:
        if not self._class_names:
            self._class_names = await self._generator.class_names.remote()
        return self._class_names

    @api.get("/healthz")
    async def healthz(self) -> Health:
        """200 once the generator answers."""
        return Health(
            status="ok", model=self._arguments.model, num_classes=len(await self._generator.class_names.remote())
        )

    @api.get("/classes")
    async def classes(self) -> list[ClassEntry]:
        """The classes, by id."""
        return [ClassEntry(id=label, name=name) for label, name in sorted((await self._known_classes()).items())]

    @api.post(
        "/generate",
        response_model=GenerateResponse,
        responses={
            200: {"content": {"image/png": {}}},
            422: {"description": "A field is wrong; `detail` says which and why."},
        },
    )
    async def generate(self, request: GenerateRequest) -> Response:
        """Images of one class, each made in `num_inference_steps` network calls."""
        began = time.perf_counter()
        limits = self._arguments
        for name, value, limit in (
            ("num_images", request.num_images, limits.max_images),
            ("num_inference_steps", request.num_inference_steps, limits.max_steps),
        ):
            if value > limit:
                raise HTTPException(422, f"{name}: at most {limit} here, but got {value}")
        class_names = await self._known_classes()
        try:
            label = find_class(request.class_, class_names)
        except ValueError as error:
            raise HTTPException(422, f"class: {error}") from error
        first_seed = secrets.randbelow(MAX_SEED) if request.seed is None else request.seed
        seeds = range(first_seed, first_seed + request.num_images)
        orders = [ImageOrder(label, seed, request.num_inference_steps) for seed in seeds]
        images = await asyncio.gather(*(self._generator.make.remote(order) for order in orders))
        milliseconds = 1000.0 * (time.perf_counter() - began)
        if request.response_format == "png":
            picture = await asyncio.to_thread(to_png, np.concatenate(images, axis=1))
            headers = {"X-Class-Id": str(label), "X-Seed": str(first_seed), "X-Milliseconds": f"{milliseconds:.1f}"}
            return Response(picture, media_type="image/png", headers=headers)
        pngs = await asyncio.to_thread(lambda: [base64.b64encode(to_png(image)).decode() for image in images])
        answer = GenerateResponse(
            class_id=label,
            class_name=class_names[label],
            num_inference_steps=request.num_inference_steps,
            milliseconds=milliseconds,
            images=[GeneratedImage(seed=seed, png_base64=png) for seed, png in zip(seeds, pngs, strict=True)],
        )
        return JSONResponse(answer.model_dump())


def build_app(arguments: Arguments) -> Application:
    """The application, for `serve run deploy.app:build_app model=...` and for `import_path` in a Serve config.

    Raises ValueError where the model cannot be had.
    """
    # Resolved once and here: replicas have another working directory, and perhaps another environment.
    model = arguments.model if is_registered(arguments.model) else str(Path(arguments.model).expanduser().absolute())
    tracking_uri = arguments.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    arguments = arguments.model_copy(update={"model": model, "tracking_uri": tracking_uri})
    fetch_generator(model, tracking_uri)  # a wrong name fails at once and in plain words
    generator = ImageGenerator.options(  # type: ignore[attr-defined]  # the decorator is untyped
        ray_actor_options={"num_gpus": arguments.num_gpus, "num_cpus": 0 if arguments.num_gpus else 1},
        max_ongoing_requests=4 * arguments.max_batch_size,  # or batches never fill (ray#43288)
    ).bind(arguments)
    ingress = Api.options(max_ongoing_requests=100)  # type: ignore[attr-defined]
    return ingress.bind(generator, arguments)
