"""The HTTP side: checks requests, asks a generator, encodes images. FastAPI, and no Ray: `deploy.app` puts it on Serve."""

import asyncio
import base64
import importlib.metadata
import logging
import math
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from fastapi import Depends, FastAPI, Query
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from deploy.api.auth import Guard, RateLimiter, find_key, require_safe_exposure
from deploy.api.encoding import MEDIA_TYPES, encode_grid, encode_image, encode_zip
from deploy.api.schema import (
    ErrorBody,
    ErrorResponse,
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
from deploy.messages import ClassEntry, GenerationRequest, GenerationResult, GeneratorStatus, ModelInfo, Refusal
from deploy.metrics import Recorder
from deploy.settings import API_SETTINGS, Arguments, apply_user_config
from meanflow_core.pipeline import time_grid

logger = logging.getLogger(__name__)

WEB = Path(__file__).parents[1] / "web"
# Asking a replica how it is; one that is busy still answers at once.
DESCRIBE_SECONDS = 5.0
# The generator keeps the deadline itself; this much later, one that does not answer at all is given up.
GRACE_SECONDS = 1.0
# How long a refusal for a full queue is taken to hold: a small part of any queue, so that none runs empty meanwhile.
FULL_SECONDS = 0.1
# Of a body's faults, as many are told; each unknown field is one.
MAX_FAULTS = 10
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "A field has a value that this model does not take; `param` names it.",
        401: "No API key, or an unknown one.",
        404: "Not found.",
        413: "The body is too long.",
        422: "A field is missing, unknown, or of another type or range; `param` names it.",
        429: "Too many images wait, or the key's rate is used up; Retry-After says when to come again.",
        500: "A fault of the server.",
        503: "No replica could do it just now; the same request may succeed a moment later.",
        504: "Not done by the deadline.",
    }.items()
}
OF_IMAGES: dict[int | str, dict[str, Any]] = {
    status: ERRORS[status] for status in (400, 401, 404, 413, 422, 429, 500, 503, 504)
}
OF_LOOKUPS: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 404, 422, 500, 503)}


class GeneratorClient(Protocol):
    """Who makes images: a replica in another process, or in this one."""

    async def generate(self, order: GenerationRequest) -> GenerationResult | Refusal:
        """The images of an order, or why there are none."""

    async def describe(self) -> GeneratorStatus:
        """The serving model and any problem."""

    async def list_classes(self) -> list[ClassEntry]:
        """The classes, by id; none where no model serves."""


class ApiError(Exception):
    """Answered in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after


def error_response(
    status: int, message: str, code: str | None = None, param: str | None = None, retry_after: float | None = None
) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = ErrorResponse(error=ErrorBody(message=message, type=kind, param=param, code=code))
    headers = {}
    if retry_after is not None and math.isfinite(retry_after):
        headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


class ApiService:
    """What a replica of the HTTP side does."""

    def __init__(
        self, generator: GeneratorClient, arguments: Arguments, recorder: Recorder, http_host: str | None = None
    ) -> None:
        """http_host: where Serve listens; None where nothing does."""
        self.generator = generator
        self.recorder = recorder
        self.settings = arguments
        """In force now."""
        self.problem: str | None = None
        self._arguments = arguments
        self._limiter = RateLimiter(arguments.rate_limit)
        self._http_host = http_host
        self._is_checked = False
        # Until when so many images or more are refused without asking the generator, and what it said. Of the same steps:
        # others have turns of their own.
        self._full: Refusal | None = None
        self._full_group: tuple[tuple[float, ...], bool] | None = None
        self._full_from, self._full_until = 0, 0.0
        for image_format in MEDIA_TYPES:  # Pillow finds its formats at the first image, which takes half a second
            encode_image(np.zeros((8, 8, 3), np.uint8), image_format)

    def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Takes settings; those that do not fit are refused, reported, and change nothing.

        Nor are keys taken away altogether: that would open a closed endpoint. Raises ValueError at the first call alone,
        for keys that do not fit, and for an endpoint that others reach, without keys, and without a word that this is
        meant.
        """
        try:
            settings = apply_user_config(self._arguments, user_config, API_SETTINGS)
            if self.settings.api_keys and not settings.api_keys:
                raise ValueError("api_keys may be exchanged while the endpoint runs, but not left out")
            if settings.rate_limit != self.settings.rate_limit:
                self._limiter = RateLimiter(settings.rate_limit)
            self.settings = settings
            self.problem = None
        except (ValidationError, ValueError) as error:
            self.problem = f"settings of the HTTP side refused, the earlier ones stay: {error}"
            logger.error(self.problem)
            if not self._is_checked:
                # A replica that starts now has no earlier settings; without its keys it would be open to everybody.
                only_keys = {name: value for name, value in (user_config or {}).items() if name == "api_keys"}
                self.settings = apply_user_config(self._arguments, only_keys, API_SETTINGS)
        self.recorder.record("meanflow_settings_refused", float(self.problem is not None))
        if not self._is_checked:
            require_safe_exposure(self.settings, self._http_host)
            keys = ", ".join(self.settings.api_keys) or "none"
            logger.info("Serve's HTTP host is %s; API keys: %s", self._http_host, keys)
            self._is_checked = True

    def authorize(self, request: Request, credentials: HTTPAuthorizationCredentials | None) -> str:
        """The caller's name: of its key, or its address where there are no keys. Raises ApiError 401."""
        api_keys = self.settings.api_keys
        if not self._is_checked:
            raise ApiError(503, "not configured yet", "not_ready", retry_after=1.0)
        if not api_keys:
            return f"address {request.client.host if request.client else 'unknown'}"
        name = find_key(credentials.credentials, api_keys) if credentials else None
        if name is None:
            given = "an unknown one" if credentials else "none"
            raise ApiError(401, f"wanted an API key as `Authorization: Bearer KEY`, but got {given}", "invalid_api_key")
        request.state.log["key"] = name
        return f"key {name}"

    def admit(self, caller: str, num_images: int) -> None:
        """Counts images against a caller's rate. Raises ApiError 429."""
        wait = self._limiter.seconds_until_allowed(caller, num_images)
        if wait is not None:
            rate = self.settings.rate_limit
            raise ApiError(429, f"more than {rate} images; try again later", "rate_limit_exceeded", retry_after=wait)

    async def card(self) -> ModelInfo:
        """The model that serves. Raises ApiError 503 where none does."""
        try:
            async with asyncio.timeout(DESCRIBE_SECONDS):
                card = (await self.generator.describe()).model
        except TimeoutError:
            card = None
        if card is None:
            raise ApiError(503, "no replica of the generator answers yet", "not_ready", retry_after=5.0)
        limits = self.settings
        return card.model_copy(update={"max_images": limits.max_images, "max_steps": limits.max_steps})

    async def classes(self) -> list[ClassEntry]:
        """The classes, by id. Raises ApiError 503 where no model serves."""
        try:
            async with asyncio.timeout(DESCRIBE_SECONDS):
                found = await self.generator.list_classes()
        except TimeoutError:
            found = []
        if not found:
            raise ApiError(503, "no replica of the generator answers yet", "not_ready", retry_after=5.0)
        return found

    def order(
        self, wanted: Sampling, *, class_: int | str, num_images: int, count_field: str, model: str | None, size: str
    ) -> GenerationRequest:
        """What the generator is asked. Raises ApiError 400 for what no model takes, or is not allowed here."""
        limits = self.settings
        if num_images > limits.max_images:
            raise bad_value(count_field, f"at most {limits.max_images} here, but got {num_images}")
        try:
            timesteps = tuple(time_grid(wanted.num_inference_steps, wanted.timesteps))
        except ValueError as error:
            raise bad_value("timesteps", str(error)) from error
        if len(timesteps) - 1 > limits.max_steps:
            field = "num_inference_steps" if wanted.timesteps is None else "timesteps"
            raise bad_value(field, f"at most {limits.max_steps} steps here, but got {len(timesteps) - 1}")
        if wanted.timesteps is not None and wanted.num_inference_steps not in (1, len(timesteps) - 1):
            raise bad_value("timesteps", "give either timesteps or num_inference_steps")
        interval = wanted.guidance_interval
        if interval is not None and interval[0] > interval[1]:
            raise bad_value("guidance_interval", f"wanted [start, end], start <= end, but got {interval}")
        if wanted.seed_end is not None and num_images < 2:
            raise bad_value("seed_end", f"wanted at least 2 images on the way to it, but {count_field} is {num_images}")
        return GenerationRequest(
            class_=class_,
            num_images=num_images,
            seed=secrets.randbelow(2**32) if wanted.seed is None else wanted.seed,
            seed_end=wanted.seed_end,
            timesteps=timesteps,
            guidance_scale=wanted.guidance_scale,
            guidance_interval=None if interval is None else (interval[0], interval[1]),
            is_preview=wanted.preview,
            model=model,
            size=size,
            timeout_seconds=limits.deadline_seconds,
        )

    async def _ask(self, order: GenerationRequest) -> GenerationResult | Refusal:
        """The generator's answer; a refusal for a full queue holds for a moment. Raises ApiError 504."""
        group = (order.timesteps, order.is_preview)
        may_fit = group != self._full_group or order.num_images < self._full_from
        if self._full is not None and not may_fit and time.monotonic() < self._full_until:
            return self._full
        try:
            # The replica keeps the deadline; this is for where there is none to take the order.
            async with asyncio.timeout(order.timeout_seconds + GRACE_SECONDS):
                made = await self.generator.generate(order)
        except TimeoutError as error:
            raise ApiError(504, f"not done within {order.timeout_seconds:g} s", "deadline_exceeded") from error
        if isinstance(made, Refusal) and made.code == "overloaded":
            self._full, self._full_group, self._full_from = made, group, order.num_images
            self._full_until = time.monotonic() + FULL_SECONDS
        return made

    async def make(self, order: GenerationRequest, request: Request, class_field: str) -> GenerationResult:
        """The generator's images. Raises ApiError for a refusal."""
        about = request.state.log
        about["images"] = order.num_images
        if self.settings.log_prompts:
            about["class"] = order.class_
        made = await self._ask(order)
        if isinstance(made, Refusal):
            param = class_field if made.param == "class" else made.param
            message = made.message if param is None else f"{param}: {made.message}"
            raise ApiError(made.status, message, made.code, param, made.retry_after_seconds)
        about["model"] = made.model
        return made

    async def encode(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """What the work gives, and its seconds; in another thread, because compression takes its time."""
        began = time.perf_counter()
        encoded = await asyncio.to_thread(work)
        seconds = time.perf_counter() - began
        self.recorder.record("meanflow_encode_seconds", seconds)
        return encoded, seconds


def bad_value(param: str, message: str) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, f"{param}: {message}", "invalid_value", param)


def explain_validation_error(error: RequestValidationError) -> JSONResponse:
    """422 with one readable sentence per fault; `param` is the first field."""
    faults, fields = [], []
    for fault in error.errors():
        # FastAPI begins with where the field stood, and pydantic goes on into the types that a union tried.
        path = [str(part) for part in fault["loc"][1:] if not str(part).startswith(("constrained-", "function-"))]
        if fault["type"] == "json_invalid":
            path.clear()  # a place in the text, and no field
        while path and path[-1] in ("int", "str"):
            path.pop()
        field = ".".join(path)
        fields.append(field or None)
        faults.append(f"{field or 'body'}: {fault['msg']}")
    told = list(dict.fromkeys(faults))
    if len(told) > MAX_FAULTS:
        told[MAX_FAULTS:] = [f"and {len(told) - MAX_FAULTS} more"]
    return error_response(422, "; ".join(told), "invalid_request", next(filter(None, fields), None))


def build_http_app(service: ApiService) -> FastAPI:
    """The application: routes, errors in one shape, and the guard around them."""
    api = FastAPIOffline(
        title="meanflow-ray",
        version=importlib.metadata.version("meanflow-ray"),
        description="Class-conditional images in one network call.",
        redoc_url=None,
        static_url="/static-docs",
    )
    bearer = HTTPBearer(auto_error=False, description="An API key, where the endpoint has any.")

    async def authorized(
        request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
    ) -> str:
        return service.authorize(request, credentials)

    Caller = Annotated[str, Depends(authorized)]  # noqa: N806  # a type

    @api.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return error_response(error.status, error.message, error.code, error.param, error.retry_after)

    @api.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return explain_validation_error(error)

    @api.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        response = error_response(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    def on_fault(error: Exception) -> JSONResponse:
        logger.error("a request failed", exc_info=error)
        return error_response(500, "a fault of the server; its log says more")

    @api.post("/v1/images/generations", response_model=ImagesResponse, responses=OF_IMAGES, tags=["images"])
    async def images_generations(wanted: ImagesRequest, request: Request, caller: Caller) -> Response:
        """Images as OpenAI's Images API answers them; the `openai` client works with this address as its base URL."""
        began = time.perf_counter()
        if wanted.response_format == "url":
            raise bad_value("response_format", "images are not kept, so there is no url; ask for b64_json")
        num_images, output_format = wanted.n or 1, wanted.output_format or "png"
        order = service.order(
            wanted, class_=wanted.prompt, num_images=num_images, count_field="n", model=wanted.model,
            size=wanted.size or "auto",
        )  # fmt: skip
        service.admit(caller, num_images)
        made = await service.make(order, request, "prompt")
        files, encode_seconds = await service.encode(
            lambda: [
                base64.b64encode(encode_image(image, output_format, wanted.output_compression)).decode()
                for image in made.images
            ]
        )
        data = [
            ImageData(
                b64_json=file,
                seed=order.seed if made.weights else order.seed + index,
                seed_end=order.seed_end,
                weight=made.weights[index] if made.weights else None,
            )
            for index, file in enumerate(files)
        ]
        answer = ImagesResponse(
            created=int(time.time()),
            data=data,
            model=made.model,
            size=f"{made.images.shape[2]}x{made.images.shape[1]}",
            output_format=output_format,
            class_id=made.class_id,
            class_name=made.class_name,
            wnid=made.wnid,
            seed=order.seed,
            num_inference_steps=len(order.timesteps) - 1,
            preview=order.is_preview,
            timing=Timing(
                queue_ms=1000.0 * made.queue_seconds,
                model_ms=1000.0 * made.model_seconds,
                decode_ms=1000.0 * made.decode_seconds,
                encode_ms=1000.0 * encode_seconds,
                total_ms=1000.0 * (time.perf_counter() - began),
            ),
        )
        return Response(answer.model_dump_json(), media_type="application/json")

    @api.post(
        "/generate",
        response_class=Response,
        tags=["images"],
        responses={
            **OF_IMAGES,
            200: {
                "description": "One PNG, several images as a grid, or a ZIP of PNGs.",
                "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in
                            (MEDIA_TYPES["png"], "application/zip")},
            },
        },
    )  # fmt: skip
    async def generate(wanted: GenerateRequest, request: Request, caller: Caller) -> Response:
        """Images of one class as a file."""
        began = time.perf_counter()
        order = service.order(
            wanted,
            class_=wanted.class_,
            num_images=wanted.num_images,
            count_field="num_images",
            model=None,
            size="auto",
        )
        service.admit(caller, wanted.num_images)
        made = await service.make(order, request, "class")
        if wanted.response_format == "zip":
            places = made.weights or range(order.seed, order.seed + order.num_images)
            names = [f"class{made.class_id}-{place:.3f}.png" if made.weights else f"class{made.class_id}-seed{place}.png"
                     for place in places]  # fmt: skip
            content, _ = await service.encode(lambda: encode_zip(made.images, names))
        else:
            content, _ = await service.encode(lambda: encode_grid(made.images))
        headers = {
            "X-Class-Id": str(made.class_id),
            "X-Seed": str(order.seed),
            "X-Model": made.model.encode("ascii", "replace").decode(),
            "X-Preview": str(order.is_preview).lower(),
            "X-Milliseconds": f"{1000.0 * (time.perf_counter() - began):.1f}",
        }
        media_type = "application/zip" if wanted.response_format == "zip" else MEDIA_TYPES["png"]
        return Response(content, media_type=media_type, headers=headers)

    @api.get("/v1/models", responses=OF_LOOKUPS, tags=["models"])
    async def models(caller: Caller) -> ModelList:
        """The model that serves."""
        return ModelList(data=[await service.card()])

    @api.get("/v1/models/{model_id:path}", responses=OF_LOOKUPS, tags=["models"])
    async def model(model_id: str, caller: Caller) -> ModelInfo:
        """The model that serves, by its id."""
        card = await service.card()
        if model_id != card.id:
            raise ApiError(404, f"unknown model {model_id!r}; {card.id!r} serves here", "model_not_found", "model")
        return card

    @api.get("/classes", responses=OF_LOOKUPS, tags=["models"])
    async def classes(
        caller: Caller,
        search: Annotated[str | None, Query(max_length=200, description="Part of a name, a wnid, or an id.")] = None,
        limit: Annotated[int | None, Query(ge=1, le=100_000)] = None,
    ) -> list[ClassEntry]:
        """The classes, by id; with `search`, those that it may mean."""
        found = await service.classes()
        if search is not None:
            word = search.strip().lower()
            found = [
                entry
                for entry in found
                if word in entry.name.lower() or word == (entry.wnid or "").lower() or word == str(entry.id)
            ]
        return found[:limit]

    @api.get("/version", responses=OF_LOOKUPS, tags=["health"])
    async def version(caller: Caller) -> Version:
        """What runs here, and which weights."""
        return Version(
            version=api.version,
            torch=torch.__version__,
            ray=importlib.metadata.version("ray"),
            model=await service.card(),
        )

    @api.get("/healthz", tags=["health"])
    async def healthz() -> Health:
        """200 while this process answers."""
        return Health()

    @api.get("/readyz", responses={503: {"model": Readiness, "description": "No model serves yet."}}, tags=["health"])
    async def readyz(request: Request) -> Response:
        """200 once a model serves; what was asked for and is not in use stands in `problem`."""
        try:
            async with asyncio.timeout(DESCRIBE_SECONDS):
                status = await service.generator.describe()
            card, problem = status.model, status.problem
        except TimeoutError:
            card, problem = None, "no replica of the generator answers"
        problem = "; ".join(filter(None, (problem, service.problem))) or None
        if problem is not None:
            try:
                service.authorize(request, await bearer(request))  # no dependency: it asks for no key
            except ApiError:
                problem = "there is one; with an API key, or in the log, it says which"
        body = Readiness(
            status="not ready" if card is None else "ready", model=card.id if card else None, problem=problem
        )
        return Response(body.model_dump_json(), 503 if card is None else 200, media_type="application/json")

    @api.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(WEB / "index.html", headers={"Cache-Control": "no-cache"})

    api.mount("/static", StaticFiles(directory=WEB), name="static")
    api.add_middleware(
        Guard,
        max_body_bytes=service.settings.max_body_bytes,
        recorder=service.recorder,
        access_log=logging.getLogger("meanflow.access"),
        on_fault=on_fault,
    )
    return api
