"""Messages between the HTTP side and the generator's replicas."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel


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
