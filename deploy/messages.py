"""Messages between the HTTP API and the replicas of the generator."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel

ImageMode = Literal["L", "RGB"]  # Pillow's modes: grey, colour


class ModelSource(BaseModel):
    """Where a model came from."""

    model: str
    """The requested model with its alias resolved: a folder, models:/name/version or runs:/id/name."""
    name: str
    """Name of the registered model, or of the folder."""
    version: str | None = None
    """Version of the registered model."""
    run_id: str | None = None
    """MLflow run that trained the model, if known."""
    tracking_uri: str | None = None


class ModelHashes(BaseModel):
    """SHA-256 over names, dtypes, shapes and bytes of the stored weights."""

    transformer: str
    vae: str


class ModelInfo(BaseModel):
    """The serving model: OpenAI's fields, and the limits and options of a request."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time of loading."""
    owned_by: str = "meanflow-ray"
    image_size: int
    image_mode: ImageMode
    num_classes: int
    supports_guidance: bool
    guidance_scale: float
    guidance_interval: list[float]
    has_previews: bool
    max_images: int = 0
    max_steps: int = 0
    precision: str
    prediction: str
    source: ModelSource
    hashes: ModelHashes


class ClassEntry(BaseModel):
    """A class of the generator."""

    id: int
    name: str
    wnid: str | None = None


@dataclass(frozen=True, kw_only=True)
class GeneratorStatus:
    """State of a generator replica."""

    model: ModelInfo | None
    """The serving model; None before the first one is loaded."""
    problem: str | None
    """Why the requested model or settings are not in use; None if they are."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """The images of one HTTP request."""

    class_: int | str
    """Class id, wnid or name."""
    num_images: int
    seed: int
    """Image i has seed + i, unless `seed_end` is set."""
    seed_end: int | None
    """If set, the images interpolate from the noise of `seed` to that of `seed_end`."""
    timesteps: tuple[float, ...]
    """From 1.0 down to 0.0."""
    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    is_preview: bool
    model: str | None
    """Requested served name; None accepts any."""
    size: str
    """"64x64", or "auto"."""
    timeout_seconds: float
    num_partial: int = 0
    """For streams: partial images to decode on the way. Fewer than the steps."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """Generated images and timings."""

    images: np.ndarray
    """uint8 (N, H, W, 3)."""
    image_mode: ImageMode
    """L if the generator is grey."""
    class_id: int
    class_name: str
    wnid: str | None
    model: str
    weights: list[float] | None
    """Interpolation weight of each image between the two seeds, in [0, 1]."""
    queue_seconds: float
    model_seconds: float
    decode_seconds: float


@dataclass(frozen=True, kw_only=True)
class GenerationPart:
    """Some images of a streamed request, as soon as they are made."""

    indices: list[int]
    """Indices of the images in the request."""
    partial_index: int | None
    """0-based number of a partial image, of which better ones follow; None for finished images."""
    result: GenerationResult
    """These images. Its timings are those of the batches that have finished."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A failed request, with the fields of OpenAI's errors. A value rather than an exception: it crosses processes."""

    status: int
    message: str
    """Does not include the field's name."""
    code: str | None = None
    param: str | None = None
    retry_after_seconds: float | None = None
