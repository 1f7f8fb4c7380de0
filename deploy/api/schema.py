"""Bodies of requests and responses. Class docstrings and descriptions are part of the OpenAPI document."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from deploy.api.encoding import ImageFormat
from deploy.messages import ModelInfo
from deploy.settings import MAX_STEPS

# The images of a request have consecutive seeds, which must stay below 2^63.
MAX_SEED = 2**62


MAX_PARTIAL_IMAGES = 3  # as in OpenAI's API


class Strict(BaseModel):
    """Base class: unknown fields and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)


Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Time = Annotated[float, Field(ge=0.0, le=1.0)]


class Sampling(Strict):
    """Sampling options, shared by both image routes."""

    seed: Seed | None = Field(default=None, description="Image i uses seed + i. Default: random.")
    seed_end: Seed | None = Field(
        default=None,
        description="Interpolate from `seed` to this seed: image i has weight i / (n - 1). Requires at least 2 images.",
    )
    num_inference_steps: int = Field(
        default=1, ge=1, le=MAX_STEPS, description="Sampling steps; each calls the network once."
    )
    timesteps: list[Time] | None = Field(
        default=None,
        min_length=2,
        max_length=MAX_STEPS + 1,
        description="Decreasing times from 1.0 to 0.0 instead of equal steps; N + 1 times for N steps.",
    )
    guidance_scale: float | None = Field(
        default=None,
        ge=1.0,
        le=1000.0,
        description="1 disables guidance. Only for models that take guidance as an input.",
    )
    guidance_interval: list[Time] | None = Field(
        default=None, min_length=2, max_length=2, description="[start, end]: the times at which guidance applies."
    )
    preview: bool = Field(
        default=False, description="Decode with the small preview decoder: faster and slightly less accurate."
    )
    image_mode: Literal["auto", "L", "RGB"] = Field(
        default="auto", description="Mode of the image files: L is grey. auto: L if the model is grey, otherwise RGB."
    )


class GenerateRequest(Sampling):
    """The body of POST /generate."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"class": 0, "seed": 7, "num_images": 4, "num_inference_steps": 1}]},
    )

    class_: int | Annotated[str, Field(min_length=1, max_length=200)] = Field(
        alias="class", description="Class id, wnid or name, as listed by GET /classes."
    )
    num_images: int = Field(default=1, ge=1, description="Number of images.")
    response_format: Literal["png", "zip"] = Field(
        default="png", description="png: one file, several images in a grid. zip: one PNG per image."
    )


class ImagesRequest(Sampling):
    """The body of POST /v1/images/generations: OpenAI's fields and sampling options."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "class:0", "n": 1, "seed": 7}]})

    prompt: str = Field(min_length=1, max_length=200, description='Class name, wnid, or "class:207".')
    model: str | None = Field(default=None, max_length=500, description="Id from GET /v1/models. There is one model.")
    n: int | None = Field(default=1, ge=1, description="Number of images.")
    size: str | None = Field(default="auto", max_length=20, description='"auto" or the size of the model\'s images.')
    response_format: Literal["b64_json", "url"] | None = Field(
        default="b64_json", description="Only b64_json: images are not stored, so there is no URL."
    )
    output_format: ImageFormat | None = Field(default="png")
    output_compression: int | None = Field(default=None, ge=0, le=100, description="Quality of JPEG and WebP.")
    quality: Literal["auto", "standard"] | None = Field(default="auto", description="Ignored: there is one quality.")
    background: Literal["auto", "opaque"] | None = Field(default="auto", description="Ignored: images are opaque.")
    stream: bool | None = Field(
        default=False, description="Send each image as a server-sent event as soon as it is made, like OpenAI."
    )
    partial_images: int | None = Field(
        default=0,
        ge=0,
        le=MAX_PARTIAL_IMAGES,
        description="With `stream` and several steps: unfinished images to send on the way.",
    )
    user: str | None = Field(default=None, max_length=500, description="Ignored.")


class ImageData(BaseModel):
    """One image of a response."""

    b64_json: str
    """The image file in base64."""
    seed: int
    seed_end: int | None = None
    weight: float | None = None
    """Interpolation weight, from 0 (seed) to 1 (seed_end)."""


class Timing(BaseModel):
    """Durations of the parts of a request, in milliseconds."""

    queue_ms: float
    """From arrival at the generator replica to the start of the first batch."""
    model_ms: float
    """Network calls of the request's batches."""
    decode_ms: float
    encode_ms: float
    total_ms: float
    """From arrival of the request to its response."""


class ImagesResponse(BaseModel):
    """The response of POST /v1/images/generations."""

    created: int
    """Unix time of the response."""
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
    """True if the preview decoder made the images."""
    timing: Timing


class ImageEvent(BaseModel):
    """An event of a stream: OpenAI's fields, and what `ImagesResponse` tells of an image."""

    type: Literal["image_generation.partial_image", "image_generation.completed"]
    b64_json: str
    """The image file in base64."""
    index: int
    """Which of the n images this is. They come in any order."""
    partial_image_index: int | None = None
    """Number of an unfinished image, from 0; absent for finished images."""
    created_at: int
    """Unix time of the event."""
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    size: str
    output_format: ImageFormat
    model: str
    class_id: int
    class_name: str
    wnid: str | None
    seed: int
    seed_end: int | None = None
    weight: float | None = None
    """Interpolation weight, from 0 (seed) to 1 (seed_end)."""
    num_inference_steps: int
    preview: bool
    timing: Timing
    """Of the request's finished batches, and `total_ms` since its arrival."""


class ModelList(BaseModel):
    """The response of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class Version(BaseModel):
    """The response of GET /version."""

    version: str
    torch: str
    ray: str
    model: ModelInfo


class Health(BaseModel):
    """The response of GET /healthz."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """The response of GET /readyz."""

    status: Literal["ready", "not ready"]
    model: str | None
    """Id of the serving model."""
    problem: str | None
    """Why the requested model or settings are not in use; the previous ones remain in use."""


class ErrorBody(BaseModel):
    """An error in OpenAI's format."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The response to a failed request."""

    error: ErrorBody
