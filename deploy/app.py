"""Stage 4: the application that serves a one-step generator over HTTP with Ray Serve. `deploy.serve` starts it.

It consists of the HTTP API, which also encodes images (`deploy.api`), and of the generator, which holds the model and batches
the images of concurrent requests (`deploy.replica`). The setting `topology` decides where they run:

    one    Endpoint: both in each replica. A request crosses no second process.
    two    Api -> ImageGenerator: two deployments, whose numbers of replicas are independent.
"""

import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from deploy import private_interfaces
from deploy.api.routes import build_http_app
from deploy.api.service import ApiService
from deploy.messages import (
    ClassEntry,
    GenerationPart,
    GenerationRequest,
    GenerationResult,
    GeneratorStatus,
    Refusal,
)
from deploy.metrics import RayRecorder
from deploy.models import resolve_model, tracking_address
from deploy.replica.model_swap import ModelSwapper
from deploy.replica.service import GeneratorService
from deploy.settings import Arguments, split_user_config

logger = logging.getLogger(__name__)

# Effectively no limit. The generator limits its queue by images, and refuses requests above that limit at once.
# Serve's limits count requests: status calls would wait behind image requests, and errors would have another format.
UNLIMITED_REQUESTS = 10_000


@serve.deployment
class ImageGenerator:
    """The generator on one device."""

    def __init__(self, arguments: Arguments) -> None:
        log_to_serve("deploy")
        recorder = RayRecorder()
        self._service = GeneratorService(arguments, ModelSwapper(arguments.model, recorder), recorder)

    async def reconfigure(self, user_config: dict[str, Any] | None, rank: object = None) -> None:
        """Applies settings and swaps the model in place. The first call loads the first model.

        rank: Unused. With an empty `user_config`, Serve calls this method only if it takes a rank.
        """
        await self._service.reconfigure(user_config)

    def check_health(self) -> None:
        """Raises if Serve should replace this replica."""
        self._service.check_health()

    async def generate(self, request: GenerationRequest) -> GenerationResult | Refusal:
        """Generates the images of a request."""
        return await self._service.generate(request)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationPart | Refusal]:
        """Generates the images of a request, and yields them as soon as they are made."""
        async with contextlib.aclosing(self._service.stream(request)) as parts:
            async for part in parts:
                yield part

    async def describe(self) -> GeneratorStatus:
        """The serving model and any problem."""
        return await self._service.describe()

    async def list_classes(self) -> list[ClassEntry]:
        """The classes, by id."""
        return await self._service.list_classes()


class RemoteGenerator:
    """Calls the generator's replicas and maps Ray errors to refusals."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def generate(self, request: GenerationRequest) -> GenerationResult | Refusal:
        """Generates the images of a request."""
        try:
            return await self._handle.generate.remote(request)
        except (RayError, RayServeException) as error:
            return _refusal(error)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationPart | Refusal]:
        """Generates the images of a request, and yields them as soon as they are made."""
        response = self._handle.options(stream=True).stream.remote(request)
        try:
            async for part in response:
                yield part
        except (RayError, RayServeException) as error:
            yield _refusal(error)
        finally:
            response.cancel()

    async def describe(self) -> GeneratorStatus:
        """The serving model and any problem."""
        try:
            return await self._handle.describe.remote()
        except (RayError, RayServeException) as error:
            return GeneratorStatus(model=None, problem=f"no replica of the generator responds: {type(error).__name__}")

    async def list_classes(self) -> list[ClassEntry]:
        """The classes, by id; empty if no replica of the generator responds."""
        try:
            return await self._handle.list_classes.remote()
        except (RayError, RayServeException):
            logger.exception("no replica of the generator responds to list_classes")
            return []


def _refusal(error: RayError | RayServeException) -> Refusal:
    """The refusal for an error of Ray. Raises the error if it is a bug in deploy.replica, or if the client disconnected."""
    if isinstance(error, BackPressureError):
        message = f"too many requests are queued: {error}"
        return Refusal(status=429, code="overloaded", message=message, retry_after_seconds=1.0)
    if isinstance(error, DeploymentUnavailableError):
        return Refusal(status=503, code="not_ready", message=str(error), retry_after_seconds=5.0)
    if isinstance(error, RayTaskError | TaskCancelledError | RayServeException):
        raise error
    logger.error("a generator replica died during a request, or its response was lost", exc_info=error)
    message = "the generator replica died while it processed the request; send the request again"
    return Refusal(status=503, code="replica_died", message=message, retry_after_seconds=1.0)


@serve.deployment
@serve.ingress()
class Endpoint:
    """The HTTP API and the generator on one device, in one process."""

    def __init__(self, arguments: Arguments) -> None:
        log_to_serve("deploy", "meanflow.access")
        recorder = RayRecorder()
        self._generator = GeneratorService(arguments, ModelSwapper(arguments.model, recorder), recorder)
        self._service = ApiService(self._generator, arguments, recorder, private_interfaces.http_host() or "unknown")

    async def reconfigure(self, user_config: dict[str, Any] | None, rank: object = None) -> None:
        """Applies settings and swaps the model in place, as Api and ImageGenerator do.

        rank: Unused, as in ImageGenerator.
        """
        of_generator, of_api = split_user_config(user_config)
        self._service.reconfigure(of_api)
        await self._generator.reconfigure(of_generator)

    def check_health(self) -> None:
        """Raises if Serve should replace this replica."""
        self._generator.check_health()

    def __serve_build_asgi_app__(self) -> FastAPI:  # the name that Serve looks for
        return build_http_app(self._service)


@serve.deployment
@serve.ingress()
class Api:
    """The HTTP API, which calls the deployment ImageGenerator."""

    def __init__(self, generator: DeploymentHandle, arguments: Arguments) -> None:
        log_to_serve("deploy", "meanflow.access")
        http_host = private_interfaces.http_host() or "unknown"
        self._service = ApiService(RemoteGenerator(generator), arguments, RayRecorder(), http_host)

    def reconfigure(self, user_config: dict[str, Any] | None, rank: object = None) -> None:
        """Applies settings in place. At startup, raises ValueError if other machines could use the endpoint without keys.

        rank: Unused, as in ImageGenerator.
        """
        self._service.reconfigure(user_config)

    def __serve_build_asgi_app__(self) -> FastAPI:  # the name that Serve looks for
        return build_http_app(self._service)


def log_to_serve(*names: str) -> None:
    """Sends the output of these loggers to the replica's log file, tagged with request and replica like Serve's own."""
    serve_logger = logging.getLogger("ray.serve")
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = list(serve_logger.handlers), False
        logger.setLevel(logging.INFO)


def build_app(arguments: Arguments) -> Application:
    """The application, for `import_path` in a Serve config and for `serve run deploy.app:build_app model=FOLDER`.

    Raises ValueError if the model does not exist.
    """
    tracking_uri = tracking_address(arguments.tracking_uri)
    # Resolve the alias once: replicas start later, when it may already refer to another version.
    model = resolve_model(arguments.model, tracking_uri)
    arguments = arguments.model_copy(update={"model": model, "tracking_uri": tracking_uri})
    common = {
        "user_config": {},  # without one in the config, Serve would not call `reconfigure`, which loads the model
        "max_ongoing_requests": UNLIMITED_REQUESTS,
        "max_queued_requests": UNLIMITED_REQUESTS,
        "graceful_shutdown_timeout_s": arguments.drain_seconds,
    }
    on_device = {
        "num_replicas": arguments.num_replicas,
        "ray_actor_options": {
            "num_gpus": arguments.num_gpus,
            "num_cpus": 0 if arguments.num_gpus > 0 else arguments.cpu_threads,
        },
    }
    over_http = {
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "logging_config": {"encoding": "JSON", "enable_access_log": False},  # `deploy.api` writes its own access log
    }
    if arguments.topology == "one":
        return Endpoint.options(**common, **on_device, **over_http).bind(arguments)  # type: ignore[attr-defined]
    generator = ImageGenerator.options(**common, **on_device).bind(arguments)  # type: ignore[attr-defined]
    api = Api.options(**common, **over_http, num_replicas=arguments.num_api_replicas)  # type: ignore[attr-defined]
    return api.bind(generator, arguments)
