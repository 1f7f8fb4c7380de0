"""The endpoint's routes and FastAPI application. Independent of Ray; `deploy.app` runs it on Ray Serve."""

import base64
import importlib.metadata
import time
from pathlib import Path
from typing import Annotated

import torch
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import FileResponse, Response
from fastapi.security import HTTPAuthorizationCredentials
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline

from deploy.api.auth import bearer, identify_caller
from deploy.api.encoding import MEDIA_TYPES, encode_grid, encode_image, encode_zip
from deploy.api.errors import EXCEPTION_HANDLERS, ApiError, document_errors, invalid_value
from deploy.api.middleware import AccessLog, BodyLimit, SecurityHeaders
from deploy.api.schema import (
    GenerateRequest,
    Health,
    ImageData,
    ImagesRequest,
    ImagesResponse,
    ModelList,
    Readiness,
    Sampling,
    Timing,
    Version,
)
from deploy.api.service import ApiService
from deploy.messages import ClassEntry, GenerationRequest, GenerationResult, ImageMode, ModelInfo

WEB = Path(__file__).parents[1] / "web"

IMAGE_ERRORS = document_errors(400, 401, 404, 413, 422, 429, 500, 503, 504)
LOOKUP_ERRORS = document_errors(401, 404, 422, 500, 503)

images = APIRouter(tags=["images"], responses=IMAGE_ERRORS)
models = APIRouter(tags=["models"], responses=LOOKUP_ERRORS)
health = APIRouter(tags=["health"])
pages = APIRouter(include_in_schema=False)


async def get_service(request: Request) -> ApiService:
    """Dependency: the service of this application."""
    return request.app.state.service


Service = Annotated[ApiService, Depends(get_service)]


async def get_caller(
    request: Request, service: Service, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> str:
    """Dependency: the caller's identity. Raises ApiError 401 if the endpoint requires a valid key and got none."""
    if not service.is_configured:
        raise ApiError(503, "the endpoint is not configured yet", "not_ready", retry_after_seconds=1.0)
    return identify_caller(request, credentials, service.settings.api_keys)


Caller = Annotated[str, Depends(get_caller)]


@images.post("/v1/images/generations", response_model=ImagesResponse)
async def images_generations(body: ImagesRequest, request: Request, service: Service, caller: Caller) -> Response:
    """Generates images like OpenAI's Images API. To use the `openai` client, set its base URL to this server's /v1."""
    started = time.perf_counter()
    if body.response_format == "url":
        raise invalid_value("response_format", "images are not stored, so url is unsupported; use b64_json")
    generation = service.make_generation_request(
        body,
        class_=body.prompt,
        num_images=body.n or 1,
        count_field="n",
        model=body.model,
        size=body.size or "auto",
    )
    service.admit(caller, generation.num_images)
    result = await service.generate(generation, request.state.log, "prompt")
    output_format = body.output_format or "png"
    mode = file_mode(body, result)
    encoded = await service.encode(
        lambda: [
            base64.b64encode(encode_image(image, output_format, body.output_compression, mode=mode)).decode()
            for image in result.images
        ]
    )
    answer = ImagesResponse(
        created=int(time.time()),
        data=image_data(generation, result, encoded.content),
        model=result.model,
        size=f"{result.images.shape[2]}x{result.images.shape[1]}",
        output_format=output_format,
        class_id=result.class_id,
        class_name=result.class_name,
        wnid=result.wnid,
        seed=generation.seed,
        num_inference_steps=len(generation.timesteps) - 1,
        preview=generation.is_preview,
        timing=Timing(
            queue_ms=1000.0 * result.queue_seconds,
            model_ms=1000.0 * result.model_seconds,
            decode_ms=1000.0 * result.decode_seconds,
            encode_ms=1000.0 * encoded.seconds,
            total_ms=1000.0 * (time.perf_counter() - started),
        ),
    )
    return Response(answer.model_dump_json(), media_type="application/json")


def image_data(generation: GenerationRequest, result: GenerationResult, files: list[str]) -> list[ImageData]:
    """The images of a response, each with its seed or its interpolation weight between two seeds."""
    return [
        ImageData(
            b64_json=file,
            seed=generation.seed if result.weights else generation.seed + index,
            seed_end=generation.seed_end,
            weight=result.weights[index] if result.weights else None,
        )
        for index, file in enumerate(files)
    ]


@images.post(
    "/generate",
    response_class=Response,
    responses={
        200: {
            "description": "A PNG, with several images arranged in a grid, or a ZIP of PNGs.",
            "content": {
                media_type: {"schema": {"type": "string", "format": "binary"}}
                for media_type in (MEDIA_TYPES["png"], "application/zip")
            },
        }
    },
)
async def generate(body: GenerateRequest, request: Request, service: Service, caller: Caller) -> Response:
    """Generates images of one class, as a file."""
    started = time.perf_counter()
    generation = service.make_generation_request(
        body, class_=body.class_, num_images=body.num_images, count_field="num_images", model=None, size="auto"
    )
    service.admit(caller, generation.num_images)
    result = await service.generate(generation, request.state.log, "class")
    mode = file_mode(body, result)
    if body.response_format == "zip":
        media_type = "application/zip"
        encoded = await service.encode(lambda: encode_zip(result.images, file_names(generation, result), mode))
    else:
        media_type = MEDIA_TYPES["png"]
        encoded = await service.encode(lambda: encode_grid(result.images, mode))
    headers = {
        "X-Class-Id": str(result.class_id),
        "X-Seed": str(generation.seed),
        "X-Model": result.model.encode("ascii", "replace").decode(),
        "X-Preview": str(generation.is_preview).lower(),
        "X-Milliseconds": f"{1000.0 * (time.perf_counter() - started):.1f}",
    }
    return Response(encoded.content, media_type=media_type, headers=headers)


def file_mode(body: Sampling, result: GenerationResult) -> ImageMode:
    """Pillow's mode of the image files of a response."""
    return result.image_mode if body.image_mode == "auto" else body.image_mode


def file_names(generation: GenerationRequest, result: GenerationResult) -> list[str]:
    """Names of the images in a ZIP: class and seed, or class and interpolation weight between two seeds."""
    if result.weights:
        return [f"class{result.class_id}-{weight:.3f}.png" for weight in result.weights]
    return [f"class{result.class_id}-seed{generation.seed + index}.png" for index in range(generation.num_images)]


@models.get("/v1/models", name="models")
async def list_models(service: Service, caller: Caller) -> ModelList:
    """Lists the model that is being served."""
    return ModelList(data=[await service.model_info()])


@models.get("/v1/models/{model_id:path}")
async def model(model_id: str, service: Service, caller: Caller) -> ModelInfo:
    """Returns the model that is being served, if `model_id` is its id."""
    info = await service.model_info()
    if model_id != info.id:
        raise ApiError(404, f"unknown model {model_id!r}; this endpoint serves {info.id!r}", "model_not_found", "model")
    return info


@models.get("/classes")
async def classes(
    service: Service,
    caller: Caller,
    search: Annotated[
        str | None, Query(max_length=200, description="Part of a name, or a complete wnid or id.")
    ] = None,
    limit: Annotated[int | None, Query(ge=1, le=100_000)] = None,
) -> list[ClassEntry]:
    """Lists the classes, ordered by id. `search` filters by name, wnid or id."""
    entries = await service.classes()
    if search is not None:
        word = search.strip().lower()
        entries = [
            entry
            for entry in entries
            if word in entry.name.lower() or word in ((entry.wnid or "").lower(), str(entry.id))
        ]
    return entries[:limit]


@health.get("/version", responses=LOOKUP_ERRORS)
async def version(request: Request, service: Service, caller: Caller) -> Version:
    """Returns the versions of the software and the model."""
    return Version(
        version=request.app.version,
        torch=torch.__version__,
        ray=importlib.metadata.version("ray"),
        model=await service.model_info(),
    )


@health.get("/healthz")
async def healthz() -> Health:
    """Liveness check: returns 200 while the process is running."""
    return Health()


@health.get("/readyz", responses={503: {"model": Readiness, "description": "No model is serving yet."}})
async def readyz(request: Request, service: Service) -> Response:
    """Readiness check: returns 200 once a model is being served.

    `problem` says why a requested model or setting is not in use.
    """
    body = await service.readiness()
    if body.problem is not None:
        try:
            # Not a dependency: probes send no key and would get 401.
            await get_caller(request, service, await bearer(request))
        except ApiError:
            body.problem = "details require an API key; they are also in the replica's log"
    status = 200 if body.status == "ready" else 503
    return Response(body.model_dump_json(), status, media_type="application/json")


@pages.get("/")
async def page() -> FileResponse:
    """The web page for trying the endpoint."""
    return FileResponse(WEB / "index.html", headers={"Cache-Control": "no-cache"})


def build_http_app(service: ApiService) -> FastAPI:
    """Builds the application: routes, error handlers and middleware for `service`."""
    api = FastAPIOffline(
        title="meanflow-ray",
        version=importlib.metadata.version("meanflow-ray"),
        description="Generates class-conditional images in one network call.",
        redoc_url=None,
        static_url="/static-docs",
        exception_handlers=EXCEPTION_HANDLERS,
    )
    api.state.service = service
    for router in (images, models, health, pages):
        api.include_router(router)
    api.mount("/static", StaticFiles(directory=WEB), name="static")
    # The middleware added last runs first.
    api.add_middleware(BodyLimit, max_body_bytes=service.settings.max_body_bytes)
    api.add_middleware(AccessLog, recorder=service.recorder)
    api.add_middleware(SecurityHeaders)
    return api
