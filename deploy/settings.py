"""The application's arguments, and which of them may change while it runs."""

import re
from typing import Annotated, Any, Literal

import limits
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Most steps that any endpoint accepts, whatever its `max_steps`.
MAX_STEPS = 1000
SHA256 = re.compile(r"[0-9a-f]{64}")


class Arguments(BaseModel):
    """Arguments of `deploy.app:build_app`, on the command line or under `args:` in a Serve config.

    Those that GENERATOR_SETTINGS and API_SETTINGS name may also stand under `user_config:` of the deployments
    ImageGenerator and Api; changed there, they take effect without a restart.
    """

    # A key that stands in plain text where its hash belongs appears in no error.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    model: str
    """A generator: folder, models:/name@alias, or runs:/id/name. An alias is resolved once, when the app is built."""
    tracking_uri: str | None = None
    """MLflow address for the last two; MLFLOW_TRACKING_URI unless given."""
    served_name: str | None = Field(default=None, min_length=1, max_length=200)
    """Name under /v1/models; the registered name, or the folder's, unless given."""

    num_replicas: int = Field(default=1, ge=1)
    """Replicas of the generator; under `deployments:` of a Serve config, autoscaling_config takes its place."""
    num_api_replicas: int = Field(default=1, ge=1)
    """Replicas of the HTTP side, which check requests and encode images."""
    num_gpus: float = Field(default=0.0, ge=0.0)
    """GPUs per replica of the generator; a fraction puts several on one."""
    cpu_threads: int = Field(default=1, ge=1)
    """Threads, and CPUs in Ray's books, of a generator's replica without a GPU."""
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    """What network and decoder compute in."""
    compile: bool = False
    """torch.compile, for the sizes in batch_sizes (powers of two up to max_batch_size unless given)."""
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list, max_length=16)
    """Batches are filled up to the next of these sizes; "1,4,16" on the command line."""
    preview_vae: str | None = None
    """An AutoencoderTiny, by hub id or folder, for requests that say `preview`."""
    drain_seconds: float = Field(default=70.0, ge=0.0)
    """How long a replica that is told to stop may finish what it holds."""

    max_body_bytes: int = Field(default=65536, ge=1)
    """Longest body of a request; beyond it, 413."""

    max_batch_size: int = Field(default=16, ge=1)
    """Most images that one call of the network makes."""
    batch_wait_seconds: float = Field(default=0.005, ge=0.0, le=10.0)
    """Longest time that the first image of a batch waits for others."""
    max_queued_images: int = Field(default=256, ge=1)
    """Images that may wait at a replica; beyond them, 429."""

    deadline_seconds: float = Field(default=60.0, gt=0.0)
    """What is not done by then gets 504, and leaves the queue."""
    max_images: int = Field(default=64, ge=1)
    """Most images that one request may ask for."""
    max_steps: int = Field(default=128, ge=1, le=MAX_STEPS)
    """Most steps that one request may ask for."""
    auth: Literal["keys", "none"] | None = None
    """"none": open to everybody who reaches it. Unless said, an endpoint without keys only starts on loopback."""
    api_keys: dict[str, str] = Field(default_factory=dict)
    """{name: SHA-256 of the key}; `python -m deploy.keys NAME` makes both. With any, every request needs one."""
    rate_limit: str | None = None
    """Images per key (or address, without keys) and replica of the HTTP side: "600/minute", "10/second;10000/day"."""
    log_prompts: bool = False
    """Whether the access log says which class was asked for."""

    @field_validator("batch_sizes", mode="before")
    @classmethod
    def _split_sizes(cls, value: Any) -> Any:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @field_validator("api_keys")
    @classmethod
    def _check_hashes(cls, value: dict[str, str]) -> dict[str, str]:
        for name, digest in value.items():
            if not SHA256.fullmatch(digest):
                raise ValueError(
                    f"the key {name!r} must be given as its SHA-256, 64 hexadecimal digits in lower case; "
                    f"`python -m deploy.keys {name}` makes one"
                )
        return value

    @field_validator("rate_limit")
    @classmethod
    def _check_rate(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                limits.parse_many(value)
            except ValueError as error:
                raise ValueError(f'wanted a rate such as "600/minute", but got {value!r}') from error
        return value

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
                f"batch_sizes must reach max_batch_size, {self.max_batch_size}, but got {self.batch_sizes}"
            )
        return self


GENERATOR_SETTINGS = frozenset({"model", "max_batch_size", "batch_wait_seconds", "max_queued_images"})
API_SETTINGS = frozenset({"deadline_seconds", "max_images", "max_steps", "api_keys", "rate_limit", "log_prompts"})


def with_settings(arguments: Arguments, changed: dict[str, Any] | None, allowed: frozenset[str]) -> Arguments:
    """The arguments with those of a user_config in place.

    Raises ValueError for a setting that may not be changed in place, or a value that does not fit.
    """
    changed = changed or {}
    wrong = sorted(str(name) for name in set(changed) - allowed)  # YAML has names that are no words
    if wrong:
        raise ValueError(
            f"user_config may have {', '.join(sorted(allowed))}, but got {', '.join(wrong)} too; "
            f"other settings belong under args"
        )
    return Arguments.model_validate({**arguments.model_dump(), **changed})
