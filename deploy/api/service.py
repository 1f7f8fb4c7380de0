"""Handles requests for the routes: checks limits, calls the generator, encodes images. Independent of HTTP."""

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from deploy.api.auth import require_safe_exposure
from deploy.api.encoding import MEDIA_TYPES, encode_image
from deploy.api.errors import ApiError, invalid_value
from deploy.api.rate_limit import RateLimiter
from deploy.api.schema import Readiness, Sampling
from deploy.messages import (
    ClassEntry,
    GenerationPart,
    GenerationRequest,
    GenerationResult,
    GeneratorStatus,
    ModelInfo,
    Refusal,
)
from deploy.metrics import Recorder
from deploy.settings import API_SETTINGS, Arguments, apply_user_config
from meanflow_core.sampling import time_grid

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Timeout for status calls. A busy generator still answers these at once.
STATUS_TIMEOUT_SECONDS = 3.0
# The generator enforces the deadline itself. If it does not answer at all, the request fails this much later.
GRACE_SECONDS = 1.0
# How long to repeat an "overloaded" refusal. A full queue takes longer than this to drain.
REPEAT_REFUSAL_SECONDS = 0.1


class GeneratorClient(Protocol):
    """Interface of the generator, which runs in another process or in this one."""

    async def generate(self, request: GenerationRequest) -> GenerationResult | Refusal:
        """Returns the images, or a refusal."""

    def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationPart | Refusal]:
        """Yields the images as soon as they are made. A refusal ends the stream."""

    async def describe(self) -> GeneratorStatus:
        """The serving model and any problem."""

    async def list_classes(self) -> list[ClassEntry]:
        """The classes, sorted by id; empty if no model serves."""


@dataclass(frozen=True)
class Encoded(Generic[T]):
    """Encoded images, and the time that encoding took."""

    content: T
    seconds: float


class RefusalCache:
    """Repeats the last "overloaded" refusal for REPEAT_REFUSAL_SECONDS, which saves calls to a busy generator.

    The refusal applies to requests with the same timesteps, decoder and number of partial images, and at least as many
    images. The generator may accept others: it batches them separately, and fewer images may fit into the queue.
    """

    def __init__(self) -> None:
        self._refusal: Refusal | None = None
        self._refused_request: GenerationRequest | None = None
        self._until = 0.0

    def find(self, request: GenerationRequest) -> Refusal | None:
        """The refusal to repeat, or None."""
        refused = self._refused_request
        if refused is None or time.monotonic() >= self._until:
            return None
        is_same_group = _group_of(request) == _group_of(refused)
        return self._refusal if is_same_group and request.num_images >= refused.num_images else None

    def store(self, request: GenerationRequest, refusal: Refusal) -> None:
        """Stores the refusal of a request."""
        self._refused_request, self._refusal = request, refusal
        self._until = time.monotonic() + REPEAT_REFUSAL_SECONDS


def _group_of(request: GenerationRequest) -> tuple[Any, ...]:
    """What requests must share for the generator to batch them."""
    return request.timesteps, request.is_preview, request.num_partial


class ApiService:
    """One replica of the HTTP API.

    http_host: Serve's HTTP host; None outside of Serve.
    """

    def __init__(
        self, generator: GeneratorClient, arguments: Arguments, recorder: Recorder, http_host: str | None = None
    ) -> None:
        self.generator = generator
        self.recorder = recorder
        self.settings = arguments
        """Settings in use."""
        self.problem: str | None = None
        """Why the latest user_config was refused; None if it is in use."""
        self.is_configured = False
        """False until `reconfigure` has checked the API keys."""
        self._refusal_cache = RefusalCache()
        self._arguments = arguments
        self._limiter = RateLimiter(arguments.rate_limit)
        self._http_host = http_host
        for image_format in MEDIA_TYPES:  # Pillow loads a plugin at the first image of a format: half a second
            encode_image(np.zeros((8, 8, 3), np.uint8), image_format)

    def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Applies settings. Invalid settings change nothing; the log and `problem` report them.

        Settings that remove all API keys are invalid too, because they would open a closed endpoint.

        At the first call, raises ValueError for invalid API keys, and for an endpoint that other machines can reach
        without keys.
        """
        try:
            settings = apply_user_config(self._arguments, user_config, API_SETTINGS)
            if self.settings.api_keys and not settings.api_keys:
                raise ValueError("api_keys can be replaced while the endpoint runs, but not removed")
            if settings.rate_limit != self.settings.rate_limit:
                self._limiter = RateLimiter(settings.rate_limit)
            self.settings = settings
            self.problem = None
        except ValueError as error:
            self.problem = f"settings of the HTTP API refused; the previous ones remain in use: {error}"
            logger.error(self.problem)
            if not self.is_configured:
                # A new replica has no previous user_config to keep. Without its API keys it would be open to everybody.
                only_keys = {name: value for name, value in (user_config or {}).items() if name == "api_keys"}
                self.settings = apply_user_config(self._arguments, only_keys, API_SETTINGS)
        self.recorder.record("meanflow_settings_refused", float(self.problem is not None), tags={"part": "api"})
        if not self.is_configured:
            require_safe_exposure(self.settings, self._http_host)
            key_names = ", ".join(self.settings.api_keys) or "none"
            logger.info("Serve's HTTP host is %s; API keys: %s", self._http_host, key_names)
            self.is_configured = True

    def admit(self, caller: str, num_images: int) -> None:
        """Counts images against a caller's rate. Raises ApiError 429 if they exceed it."""
        wait = self._limiter.seconds_until_allowed(caller, num_images)
        if wait is not None:
            if math.isinf(wait):
                limit = (
                    f"{num_images} images in one request exceed the rate of {self.settings.rate_limit}; request fewer"
                )
                raise ApiError(400, limit, "invalid_value")
            message = f"more than {self.settings.rate_limit} images; try again later"
            raise ApiError(429, message, "rate_limit_exceeded", retry_after_seconds=wait)

    async def describe(self) -> GeneratorStatus:
        """The serving model and any problem."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_SECONDS):
                return await self.generator.describe()
        except TimeoutError:
            return GeneratorStatus(model=None, problem="no replica of the generator responds")

    async def readiness(self) -> Readiness:
        """Whether a model serves, and any problems of the generator and of the HTTP API."""
        status = await self.describe()
        problems = "; ".join(filter(None, (status.problem, self.problem)))
        return Readiness(
            status="ready" if status.model else "not ready",
            model=status.model.id if status.model else None,
            problem=problems or None,
        )

    async def model_info(self) -> ModelInfo:
        """The model that serves, with this endpoint's limits. Raises ApiError 503 if none does."""
        model = (await self.describe()).model
        if model is None:
            raise not_ready()
        return model.model_copy(update={"max_images": self.settings.max_images, "max_steps": self.settings.max_steps})

    async def classes(self) -> list[ClassEntry]:
        """The classes, by id. Raises ApiError 503 if no model serves."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_SECONDS):
                classes = await self.generator.list_classes()
        except TimeoutError:
            classes = []
        if not classes:
            raise not_ready()
        return classes

    def make_generation_request(
        self,
        body: Sampling,
        *,
        class_: int | str,
        num_images: int,
        count_field: str,
        model: str | None,
        size: str,
        num_partial: int = 0,
    ) -> GenerationRequest:
        """Converts a request body into the generator's request. Raises ApiError 400 for invalid values and exceeded limits.

        count_field: the body's field for `num_images`, named in error messages.
        """
        settings = self.settings
        if num_images > settings.max_images:
            raise invalid_value(count_field, f"at most {settings.max_images} here, but got {num_images}")
        try:
            timesteps = tuple(time_grid(body.num_inference_steps, body.timesteps))
        except ValueError as error:
            raise invalid_value("timesteps", str(error)) from error
        num_steps = len(timesteps) - 1
        if num_steps > settings.max_steps:
            field = "num_inference_steps" if body.timesteps is None else "timesteps"
            raise invalid_value(field, f"at most {settings.max_steps} steps here, but got {num_steps}")
        if body.timesteps is not None and body.num_inference_steps not in (1, num_steps):
            raise invalid_value("timesteps", "set either timesteps or num_inference_steps")
        interval = body.guidance_interval
        if interval is not None and interval[0] > interval[1]:
            raise invalid_value("guidance_interval", f"must be [start, end] with start <= end, but got {interval}")
        if body.seed_end is not None and num_images < 2:
            message = f"requires at least 2 images, but {count_field} is {num_images}"
            raise invalid_value("seed_end", message)
        return GenerationRequest(
            class_=class_,
            num_partial=min(num_partial, num_steps - 1),  # none after the last step
            num_images=num_images,
            seed=secrets.randbelow(2**32) if body.seed is None else body.seed,
            seed_end=body.seed_end,
            timesteps=timesteps,
            guidance_scale=body.guidance_scale,
            guidance_interval=None if interval is None else (interval[0], interval[1]),
            is_preview=body.preview,
            model=model,
            size=size,
            timeout_seconds=settings.deadline_seconds,
        )

    async def generate(self, request: GenerationRequest, log: dict[str, object], class_field: str) -> GenerationResult:
        """The generator's images. Raises ApiError for a refusal.

        log: details for the access log. class_field: the body's field for the class, named in error messages.
        """
        self._log_request(request, log)
        answer = self._refusal_cache.find(request) or await self._call_generator(request)
        if isinstance(answer, Refusal):
            raise api_error(answer, class_field)
        log["model"] = answer.model
        return answer

    async def stream(
        self, request: GenerationRequest, log: dict[str, object], class_field: str
    ) -> AsyncGenerator[GenerationPart]:
        """Yields the generator's images as soon as they are made. Arguments and errors: as for `generate`."""
        self._log_request(request, log)
        refusal = self._refusal_cache.find(request)
        if refusal is not None:
            raise api_error(refusal, class_field)
        deadline = asyncio.get_running_loop().time() + request.timeout_seconds + GRACE_SECONDS
        async with contextlib.aclosing(self.generator.stream(request)) as parts:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        part = await anext(parts, None)
                except TimeoutError as error:
                    raise deadline_exceeded(request) from error
                if part is None:
                    return
                if isinstance(part, Refusal):
                    if part.code == "overloaded":
                        self._refusal_cache.store(request, part)
                    raise api_error(part, class_field)
                log["model"] = part.result.model
                yield part

    def _log_request(self, request: GenerationRequest, log: dict[str, object]) -> None:
        log["images"] = request.num_images
        if self.settings.log_prompts:
            log["class"] = request.class_

    async def _call_generator(self, request: GenerationRequest) -> GenerationResult | Refusal:
        """The generator's answer. Raises ApiError 504 if it does not answer in time."""
        try:
            async with asyncio.timeout(request.timeout_seconds + GRACE_SECONDS):
                answer = await self.generator.generate(request)
        except TimeoutError as error:
            raise deadline_exceeded(request) from error
        if isinstance(answer, Refusal) and answer.code == "overloaded":
            self._refusal_cache.store(request, answer)
        return answer

    async def encode(self, encoder: Callable[[], T]) -> Encoded[T]:
        """Runs an encoder in a thread, because compression would block the event loop."""
        started = time.perf_counter()
        content = await asyncio.to_thread(encoder)
        seconds = time.perf_counter() - started
        self.recorder.record("meanflow_encode_seconds", seconds)
        return Encoded(content, seconds)


def api_error(refusal: Refusal, class_field: str) -> ApiError:
    """The response to a refusal. class_field: the body's field for the class, named in error messages."""
    param = class_field if refusal.param == "class" else refusal.param
    message = refusal.message if param is None else f"{param}: {refusal.message}"
    return ApiError(refusal.status, message, refusal.code, param, refusal.retry_after_seconds)


def deadline_exceeded(request: GenerationRequest) -> ApiError:
    """A 504 if the generator does not answer at all; usually it refuses the request earlier."""
    return ApiError(504, f"not done within {request.timeout_seconds:g} s", "deadline_exceeded")


def not_ready() -> ApiError:
    """A 503 while no model serves."""
    return ApiError(503, "no replica of the generator is ready yet", "not_ready", retry_after_seconds=5.0)
