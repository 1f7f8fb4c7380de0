"""Arguments of the application, and which of them can change while it runs."""

import re
from typing import Annotated, Any, Literal

import limits
import tyro
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ORIGIN = re.compile(r"https?://[^/\s]+")
SHA256 = re.compile(r"[0-9a-f]{64}")
# Upper bound of `max_steps`, and thus of the steps of any request.
MAX_STEPS = 1000


class Arguments(BaseModel):
    """Arguments of `deploy.app:build_app`, on the command line or under `args:` in a Serve config.

    The names in GENERATOR_SETTINGS and API_SETTINGS are also valid under `user_config:` of the deployments
    ImageGenerator and Api, and all of them under that of Endpoint. Changes there take effect without a restart.
    """

    # Hides input, so that a plain-text key given in place of its hash never appears in an error.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)

    model: Annotated[str, tyro.conf.Positional]
    """A generator: its folder (or one that contains exactly one), a URI, models:/name@alias or runs:/id/name. An alias is
    resolved once, when the app is built."""
    tracking_uri: str | None = None
    """MLflow address for models:/ and runs:/. Default: MLFLOW_TRACKING_URI."""
    served_name: str | None = Field(default=None, min_length=1, max_length=200)
    """Name under /v1/models. Default: the name of the registered model or of the folder."""

    topology: Literal["one", "two"] = "one"
    """one: the deployment Endpoint, which is HTTP API and generator in one process. two: the deployments Api and
    ImageGenerator, which scale apart: for a GPU whose API needs more than one process."""
    num_replicas: int = Field(default=1, ge=1)
    """Replicas of the generator. An autoscaling_config under `deployments:` of a Serve config replaces this number."""
    num_api_replicas: int = Field(default=1, ge=1)
    """Replicas of the HTTP API, which validates requests and encodes images. More than one requires topology two."""
    num_gpus: float = Field(default=0.0, ge=0.0)
    """GPUs per generator replica; a fraction lets several replicas share one GPU."""
    cpu_threads: int = Field(default=1, ge=1)
    """Threads of a generator replica. Without a GPU, Ray reserves as many CPUs."""
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    """Precision of the network and the decoder."""
    compile: bool = False
    """Compile with torch.compile for each size in batch_sizes (default: powers of two up to max_batch_size)."""
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list, max_length=16)
    """Pad batches to the next of these sizes."""
    preview_vae: str | None = None
    """Hub id or folder of an AutoencoderTiny, which decodes requests with `preview`."""
    drain_seconds: float = Field(default=70.0, ge=0.0)
    """How long a stopping replica may take to finish its requests."""

    max_body_bytes: int = Field(default=65536, ge=1)
    """Maximum size of a request body; a larger one gets 413."""

    max_batch_size: int = Field(default=16, ge=1)
    """Maximum number of images per batch."""
    batch_wait_seconds: float = Field(default=0.005, ge=0.0, le=10.0)
    """How long the first image of a batch waits for others. A request that is alone does not wait."""
    max_queued_images: int = Field(default=256, ge=1)
    """Maximum number of images queued per replica; a request that exceeds it gets 429."""

    deadline_seconds: float = Field(default=60.0, gt=0.0)
    """Time limit of a request; one that exceeds it is removed from the queue and gets 504."""
    max_images: int = Field(default=64, ge=1)
    """Maximum number of images per request."""
    max_steps: int = Field(default=128, ge=1, le=MAX_STEPS)
    """Maximum number of sampling steps per request."""
    auth: Literal["keys", "none"] = "keys"
    """keys: without API keys, the endpoint only starts on loopback. none: it is open to everybody."""
    api_keys: dict[str, str] = Field(default_factory=dict)
    """{name: SHA-256 of the key}; `meanflow keys NAME` creates both. If any key is set, requests require one."""
    rate_limit: str | None = None
    """Images per key and replica of Api or Endpoint: "600/minute", "10/second;10000/day". Without keys, per address; behind
    HAProxy, all callers have the same one."""
    cors_origins: list[str] = Field(default_factory=list)
    """Origins whose pages may call the API from a browser, such as https://example.org; several are separated by
    spaces or commas. "*" allows all."""
    log_prompts: bool = False
    """Include the requested class in the access log."""

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f'expected an origin such as "https://example.org", without a path, but got {origin!r}'
                )
        return value

    @field_validator("batch_sizes", "cors_origins", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
            return value
        return [part.strip() for word in words for part in word.split(",") if part.strip()]

    @field_validator("api_keys")
    @classmethod
    def _check_hashes(cls, value: dict[str, str]) -> dict[str, str]:
        for name, digest in value.items():
            if not SHA256.fullmatch(digest):
                raise ValueError(
                    f"the key {name!r} must be given as its SHA-256, 64 hexadecimal digits in lower case; "
                    f"`meanflow keys {name}` makes one"
                )
        return value

    @field_validator("rate_limit")
    @classmethod
    def _check_rate(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                limits.parse_many(value)
            except ValueError as error:
                raise ValueError(f'expected a rate such as "600/minute", but got {value!r}') from error
        return value

    @model_validator(mode="after")
    def _check_topology(self) -> "Arguments":
        if self.topology == "one" and self.num_api_replicas > 1:
            raise ValueError(
                f"num_api_replicas {self.num_api_replicas} requires topology two; in topology one, every replica of "
                f"num_replicas has an HTTP API"
            )
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> "Arguments":
        if self.compile and not self.batch_sizes:
            size = 1
            while size < self.max_batch_size:
                self.batch_sizes.append(size)
                size *= 2
            self.batch_sizes.append(self.max_batch_size)
        if self.batch_sizes and max(self.batch_sizes) < self.max_batch_size:
            raise ValueError(
                f"batch_sizes must include a size of at least max_batch_size = {self.max_batch_size}, "
                f"but got {self.batch_sizes}"
            )
        return self


GENERATOR_SETTINGS = frozenset({"model", "max_batch_size", "batch_wait_seconds", "max_queued_images"})
API_SETTINGS = frozenset({"deadline_seconds", "max_images", "max_steps", "api_keys", "rate_limit", "log_prompts"})


def split_user_config(user_config: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the generator, and all others: those of the API and unknown ones, which it refuses.

    The halves apply independently: if one has an invalid value, the other still takes effect.
    """
    settings = user_config or {}
    of_generator = {name: value for name, value in settings.items() if name in GENERATOR_SETTINGS}
    return of_generator, {name: value for name, value in settings.items() if name not in GENERATOR_SETTINGS}


def apply_user_config(arguments: Arguments, user_config: dict[str, Any] | None, allowed: frozenset[str]) -> Arguments:
    """The arguments with the values of a deployment's user_config.

    Raises ValueError (pydantic's ValidationError is one) for an invalid value, or a name that is not in `allowed`.
    """
    user_config = user_config or {}
    unknown = sorted(str(name) for name in set(user_config) - allowed)  # YAML keys need not be strings
    if unknown:
        raise ValueError(
            f"user_config may only set {', '.join(sorted(allowed))}, but got {', '.join(unknown)}; "
            f"other settings belong under args"
        )
    return Arguments.model_validate({**arguments.model_dump(), **user_config})
