"""The endpoint's routes and FastAPI application. Independent of Ray; `deploy.app` runs it on Ray Serve."""

import importlib.metadata
import time
from pathlib import Path
from typing import Annotated

import torch
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, Response
from fastapi.security import HTTPAuthorizationCredentials
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline

from deploy.api.answers import (
    common_fields,
    encode_files,
    file_mode,
    file_names,
    image_data,
    server_timing,
    timing_of,
)
from deploy.api.auth import bearer, identify_caller
from deploy.api.encoding import MEDIA_TYPES, encode_grid, encode_zip
from deploy.api.errors import EXCEPTION_HANDLERS, ApiError, document_errors, invalid_value
from deploy.api.middleware import AccessLog, BodyLimit, SecurityHeaders
from deploy.api.schema import (
    GenerateRequest,
    Health,
    ImageEvent,
    ImagesRequest,
    ImagesResponse,
    ModelList,
    Readiness,
    Version,
)
from deploy.api.service import ApiService
from deploy.api.streaming import event_stream, image_events
from deploy.messages import ClassEntry, ModelInfo

# ImagesResponse adds Timing to the document's components.
EVENT_SCHEMA = {
    name: value
    for name, value in ImageEvent.model_json_schema(ref_template="#/components/schemas/{model}").items()
    if name != "$defs"
}
# Headers of answers that pages of other origins may read, too.
EXPOSED_HEADERS = (
    "Retry-After",
    "Server-Timing",
    "X-Class-Id",
    "X-Milliseconds",
    "X-Model",
    "X-Preview",
    "X-Request-Id",
    "X-Seed",
)
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


@images.post(
    "/v1/images/generations",
    response_model=ImagesResponse,
    responses={
        200: {
            "description": "The images, or with `stream` an event for each of them.",
            "content": {"text/event-stream": {"schema": EVENT_SCHEMA}},
        }
    },
)
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
        num_partial=(body.partial_images or 0) if body.stream else 0,
    )
    service.admit(caller, generation.num_images)
    if body.stream:
        parts = service.stream(generation, request.state.log, "prompt")
        return await event_stream(image_events(service, body, generation, parts, started), request.state.log)
    result = await service.generate(generation, request.state.log, "prompt")
    encoded = await encode_files(service, body, result)
    answer = ImagesResponse(
        created=int(time.time()),
        data=image_data(generation, range(generation.num_images), result, encoded.content),
        seed=generation.seed,
        **common_fields(body, generation, result),
        timing=timing_of(result, encoded.seconds, started),
    )
    headers = {"Server-Timing": server_timing(answer.timing)}
    return Response(answer.model_dump_json(), media_type="application/json", headers=headers)


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
        "Server-Timing": server_timing(timing_of(result, encoded.seconds, started)),
    }
    return Response(encoded.content, media_type=media_type, headers=headers)


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
    if service.settings.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's JavaScript client sends headers of its own
            expose_headers=EXPOSED_HEADERS,
        )
    return api
