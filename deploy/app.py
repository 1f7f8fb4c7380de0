"""Stage 4: the one-step generator over HTTP, on Ray Serve.

    serve run deploy.app:build_app model=runs/demo/generator        # http://127.0.0.1:8000, with a page to try it
    curl 127.0.0.1:8000/generate -H 'content-type: application/json' -d '{"class": "star", "seed": 7}' -o star.png

Two deployments: Api answers HTTP and encodes images (`deploy.http`); ImageGenerator holds the model and makes the images
of all requests that arrive together in one network call (`deploy.generator`).
"""

import logging
import os
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.experimental import internal_kv
from ray.serve import Application
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from deploy.api.routes import build_http_app
from deploy.api.service import ApiService
from deploy.memory import ModelMemory
from deploy.messages import ClassEntry, GenerationRequest, GenerationResult, GeneratorStatus, Refusal
from deploy.metrics import RayRecorder
from deploy.models import resolve_model
from deploy.replica.service import GeneratorService
from deploy.replica.serving_model import ServingModel
from deploy.settings import Arguments

logger = logging.getLogger(__name__)

KV_NAMESPACE = "meanflow"
# The replica bounds its own queue, by images, and answers at once beyond it. Serve's bounds, by requests, would keep the
# questions of probes waiting behind images, and answer in a shape of their own; they lie far above.
MANY_REQUESTS = 10_000


class ClusterStore:
    """Names in the cluster's own store, which outlives replicas."""

    def list_names(self, prefix: str) -> list[str]:
        """The names that begin with a prefix."""
        return [name.decode() for name in internal_kv._internal_kv_list(prefix, namespace=KV_NAMESPACE)]

    def add(self, name: str) -> None:
        """Adds a name, unless it is there."""
        internal_kv._internal_kv_put(name, b"", overwrite=True, namespace=KV_NAMESPACE)

    def remove(self, name: str) -> None:
        """Removes a name, if it is there."""
        internal_kv._internal_kv_del(name, namespace=KV_NAMESPACE)


def is_asked_for(user_config: dict[str, Any] | None) -> bool:
    """Whether Serve asks this replica's deployment for a user_config by now. For use in a replica; blocks."""
    context = serve.get_replica_context()
    client = _get_global_client()
    assert client is not None  # it raises where there is no controller
    info, _ = client.get_deployment_info(context.deployment, context.app_name)
    return info.deployment_config.user_config == user_config


@serve.deployment
class ImageGenerator:
    """A generator on one device."""

    def __init__(self, arguments: Arguments) -> None:
        log_to_serve("deploy")
        memory = ModelMemory(ClusterStore(), serve.get_replica_context().app_name, arguments.model)
        recorder = RayRecorder()
        self._service = GeneratorService(ServingModel(arguments, memory, recorder, is_asked_for=is_asked_for), recorder)

    async def reconfigure(self, user_config: dict[str, Any] | None, rank: object = None) -> None:
        """Settings and model, changed in place; before the first request, the model is loaded here.

        rank: not used. Where a config has an empty `user_config:`, Serve calls this only because it takes one.
        """
        await self._service.reconfigure(user_config)

    def check_health(self) -> None:
        """Serve replaces the replica where this raises."""
        self._service.check_health()

    async def generate(self, order: GenerationRequest) -> GenerationResult | Refusal:
        """The images of an order, or why there are none."""
        return await self._service.generate(order)

    async def describe(self) -> GeneratorStatus:
        """The model that serves, and what is wrong."""
        return await self._service.describe()

    async def list_classes(self) -> list[ClassEntry]:
        """The classes, by id."""
        return await self._service.list_classes()


class RemoteGenerator:
    """The generator's replicas, with what may befall them told as refusals."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def generate(self, order: GenerationRequest) -> GenerationResult | Refusal:
        """The images of an order, or why there are none."""
        try:
            return await self._handle.generate.remote(order)
        except BackPressureError as error:
            return Refusal(
                status=429, code="overloaded", message=f"too many requests wait: {error}", retry_after_seconds=1.0
            )
        except DeploymentUnavailableError as error:
            return Refusal(status=503, code="not_ready", message=str(error), retry_after_seconds=5.0)
        except (RayTaskError, TaskCancelledError):  # a fault of ours, and a caller who left
            raise
        except RayError:
            logger.exception("a replica died with a request, or what it answered is lost")
            return Refusal(
                status=503, code="replica_died", message="the replica that held this request died; send it again",
                retry_after_seconds=1.0,
            )  # fmt: skip

    async def describe(self) -> GeneratorStatus:
        """The model that serves, and what is wrong."""
        try:
            return await self._handle.describe.remote()
        except (RayError, RayServeException) as error:
            return GeneratorStatus(model=None, problem=f"no replica answers: {type(error).__name__}")

    async def list_classes(self) -> list[ClassEntry]:
        """The classes, by id; none where no model serves."""
        try:
            return await self._handle.list_classes.remote()
        except (RayError, RayServeException):
            logger.exception("no replica tells its classes")
            return []


@serve.deployment
@serve.ingress()
class Api:
    """The HTTP side."""

    def __init__(self, generator: DeploymentHandle, arguments: Arguments) -> None:
        log_to_serve("deploy", "meanflow.access")
        client = _get_global_client()  # where else Serve tells its own HTTP host is its config file
        http_host = "unknown" if client is None else client.http_config.host
        self._service = ApiService(RemoteGenerator(generator), arguments, RayRecorder(), http_host)

    def reconfigure(self, user_config: dict[str, Any] | None, rank: object = None) -> None:
        """Settings, changed in place. Raises ValueError at the start where the endpoint would be open to everybody.

        rank: not used, as in ImageGenerator.
        """
        self._service.reconfigure(user_config)

    def __serve_build_asgi_app__(self) -> FastAPI:  # Serve's name for it
        return build_http_app(self._service)


def log_to_serve(*names: str) -> None:
    """Sends these loggers' lines where Serve writes its own: the replica's log file, with request and replica named."""
    serve_logger = logging.getLogger("ray.serve")
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = list(serve_logger.handlers), False
        logger.setLevel(logging.INFO)


def build_app(arguments: Arguments) -> Application:
    """The application, for `serve run deploy.app:build_app model=...` and for `import_path` in a Serve config.

    Raises ValueError where the model cannot be had.
    """
    tracking_uri = arguments.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    # Once and here: replicas start at different times, in other working directories, perhaps in other environments.
    model = resolve_model(arguments.model, tracking_uri)
    arguments = arguments.model_copy(update={"model": model, "tracking_uri": tracking_uri})
    on_device = arguments.num_gpus > 0
    generator = ImageGenerator.options(  # type: ignore[attr-defined]  # the decorator is untyped
        num_replicas=arguments.num_replicas,
        user_config={},  # so that `reconfigure`, which loads the model, is called where a config has none
        ray_actor_options={
            "num_gpus": arguments.num_gpus,
            "num_cpus": 0 if on_device else arguments.cpu_threads,
        },
        max_ongoing_requests=MANY_REQUESTS,
        max_queued_requests=MANY_REQUESTS,
        graceful_shutdown_timeout_s=arguments.drain_seconds,
    ).bind(arguments)
    ingress = Api.options(  # type: ignore[attr-defined]
        num_replicas=arguments.num_api_replicas,
        user_config={},
        max_ongoing_requests=MANY_REQUESTS,
        max_queued_requests=MANY_REQUESTS,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=arguments.drain_seconds,
        logging_config={"encoding": "JSON", "enable_access_log": False},  # its own access log names key and images
    )
    return ingress.bind(generator, arguments)
