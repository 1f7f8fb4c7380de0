"""What the endpoint is told, asked and answers: the application's arguments, requests and responses."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import limits
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from deploy.encoding import ImageFormat

# Seeds of one request run from `seed` upwards and stay below 2^63.
MAX_SEED = 2**62
MAX_TIMES = 1000
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
    max_steps: int = Field(default=128, ge=1, le=MAX_TIMES)
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


class Source(BaseModel):
    """Where a model came from."""

    model: str
    """As it was asked for, an alias resolved: a folder, models:/name/version, runs:/id/name."""
    name: str
    """Registered name, or the folder's."""
    version: str | None = None
    """Version of the registered model."""
    run_id: str | None = None
    """MLflow run that trained it, where known."""
    tracking_uri: str | None = None


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


@dataclass(frozen=True, kw_only=True)
class Order:
    """Images that a request asks the generator for."""

    class_: int | str
    """Class id, wnid, or name."""
    num_images: int
    seed: int
    """Image i is that of seed + i, or lies between the seeds."""
    seed_end: int | None
    timesteps: tuple[float, ...]
    """From 1.0 down to 0.0."""
    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    is_preview: bool
    model: str | None
    """Served name that was asked for."""
    size: str
    """"64x64", or "auto"."""
    timeout_seconds: float


@dataclass(frozen=True, kw_only=True)
class Made:
    """Images that a generator made, and where the time went."""

    images: np.ndarray
    """uint8 (N, H, W, 3)."""
    class_id: int
    class_name: str
    wnid: str | None
    model: str
    weights: list[float] | None
    """Of the way between the seeds, one per image."""
    queue_seconds: float
    model_seconds: float
    decode_seconds: float


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why there is no answer, in OpenAI's shape. A value and no exception: it crosses from process to process."""

    status: int
    message: str
    """Without the field's name."""
    code: str | None = None
    param: str | None = None
    retry_after_seconds: float | None = None


class Strict(BaseModel):
    """A body whose every field is known and of its own type."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)


Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Time = Annotated[float, Field(ge=0.0, le=1.0)]


class Sampling(Strict):
    """How an image is made; the same in both endpoints."""

    seed: Seed | None = Field(default=None, description="Image i is that of seed + i; random if absent.")
    seed_end: Seed | None = Field(
        default=None, description="Image i lies i / (n - 1) of the way from `seed` to this one; at least 2 images."
    )
    num_inference_steps: int = Field(default=1, ge=1, le=MAX_TIMES, description="Network calls per image.")
    timesteps: list[Time] | None = Field(
        default=None,
        min_length=2,
        max_length=MAX_TIMES + 1,
        description="Times from 1.0 down to 0.0 in place of equal steps; one call for each but the last.",
    )
    guidance_scale: float | None = Field(
        default=None, ge=1.0, le=1000.0, description="1 is no guidance; for models that are told their guidance."
    )
    guidance_interval: list[Time] | None = Field(
        default=None, min_length=2, max_length=2, description="[start, end] of the times that are guided."
    )
    preview: bool = Field(default=False, description="Decode by the small decoder: quicker, and a little off.")


class GenerateRequest(Sampling):
    """The body of POST /generate."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"class": "star", "seed": 7, "num_images": 4, "num_inference_steps": 1}]},
    )

    class_: int | Annotated[str, Field(min_length=1, max_length=200)] = Field(
        alias="class", description="Class id, wnid, or a name as GET /classes lists them."
    )
    num_images: int = Field(default=1, ge=1, description="Images of this class.")
    response_format: Literal["png", "zip"] = Field(
        default="png", description="One PNG, several images as a grid; or a ZIP of PNGs."
    )


class ImagesRequest(Sampling):
    """The body of POST /v1/images/generations: OpenAI's, and what one-step generators have beyond it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "star", "n": 1, "seed": 7}]})

    prompt: str = Field(min_length=1, max_length=200, description='Class name, wnid, or "class:207".')
    model: str | None = Field(default=None, max_length=500, description="As GET /v1/models lists it; there is one.")
    n: int | None = Field(default=1, ge=1, description="Images of this class.")
    size: str | None = Field(default="auto", max_length=20, description='"auto", or the size that the model has.')
    response_format: Literal["b64_json", "url"] | None = Field(
        default="b64_json", description="b64_json alone; images are not kept, so there is no URL."
    )
    output_format: ImageFormat | None = Field(default="png")
    output_compression: int | None = Field(default=None, ge=0, le=100, description="Quality of JPEG and WebP.")
    quality: Literal["auto", "standard"] | None = Field(default="auto", description="There is one quality.")
    background: Literal["auto", "opaque"] | None = Field(default="auto", description="Images are opaque.")
    stream: Literal[False] | None = Field(default=False, description="Images come whole.")
    user: str | None = Field(default=None, max_length=500, description="Not used.")


class ImageData(BaseModel):
    """One image of an answer."""

    b64_json: str
    """The file, in base64."""
    seed: int
    seed_end: int | None = None
    weight: float | None = None
    """How far from seed to seed_end."""


class Timing(BaseModel):
    """Where a request's time went, in milliseconds."""

    queue_ms: float
    """From the replica's receipt to the start of the first batch."""
    model_ms: float
    """Network calls of its batches."""
    decode_ms: float
    encode_ms: float
    total_ms: float
    """From the request's arrival to its answer."""


class ImagesResponse(BaseModel):
    """The answer of POST /v1/images/generations."""

    created: int
    """Unix time."""
    data: list[ImageData]
    model: str
    size: str
    output_format: ImageFormat
    background: Literal["opaque"] = "opaque"
    class_id: int
    class_name: str
    wnid: str | None
    seed: int
    num_inference_steps: int
    preview: bool
    """True where the small decoder made these."""
    timing: Timing


class ClassEntry(BaseModel):
    """A class that the generator knows."""

    id: int
    name: str
    wnid: str | None = None


class ModelHashes(BaseModel):
    """SHA-256 over names, types, shapes and bytes of the weights as stored."""

    transformer: str
    vae: str


class ModelCard(BaseModel):
    """The model that serves: OpenAI's fields, and what a caller may ask of it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time at which it was loaded."""
    owned_by: str = "meanflow-ray"
    image_size: int
    num_classes: int
    takes_guidance: bool
    guidance_scale: float
    guidance_interval: list[float]
    has_previews: bool
    max_images: int = 0
    max_steps: int = 0
    precision: str
    prediction: str
    source: Source
    hashes: ModelHashes


class ModelList(BaseModel):
    """The answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Version(BaseModel):
    """The answer of GET /version."""

    version: str
    torch: str
    ray: str
    model: ModelCard


class Health(BaseModel):
    """The answer of GET /healthz: this process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """The answer of GET /readyz."""

    status: Literal["ready", "not ready"]
    model: str | None
    """The model that serves."""
    problem: str | None
    """Why the model or a setting that was asked for is not in use, while an older one serves on."""


class ErrorBody(BaseModel):
    """What went wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The answer of every request that failed."""

    error: ErrorBody
