"""What the endpoint is told and what it answers: the application's arguments, requests and responses."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

# Seeds of one request run from `seed` upwards and stay below 2^63.
MAX_SEED = 2**62


class Arguments(BaseModel):
    """Arguments of `deploy.app:build_app`, on the command line or under `args:` in a Serve config."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """A generator: folder, models:/name@alias, or runs:/id/name."""
    tracking_uri: str | None = None
    """MLflow address for the last two; MLFLOW_TRACKING_URI unless given."""
    num_gpus: float = Field(default=0.0, ge=0.0)
    """GPUs per replica of the generator; a fraction puts several on one."""
    max_batch_size: int = Field(default=16, ge=1)
    """Most images that one call of the network makes."""
    batch_wait_seconds: float = Field(default=0.005, ge=0.0)
    """Longest time that the first image of a batch waits for others."""
    max_images: int = Field(default=64, ge=1)
    """Most images that one request may ask for."""
    max_steps: int = Field(default=128, ge=1)
    """Most steps that one request may ask for."""


class GenerateRequest(BaseModel):
    """The body of POST /generate."""

    model_config = ConfigDict(
        extra="forbid",
        populate_by_name=True,
        json_schema_extra={"examples": [{"class": "star", "seed": 7, "num_images": 4, "num_inference_steps": 1}]},
    )

    class_: int | str = Field(alias="class", description="Class id, or class name as GET /classes lists them.")
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="Image i is that of seed + i; random if absent."
    )
    num_images: int = Field(default=1, ge=1, description="Images of this class.")
    num_inference_steps: int = Field(default=1, ge=1, description="Network calls per image.")
    response_format: Literal["png", "json"] = Field(
        default="png", description="One PNG (several images side by side), or JSON with a base64 PNG per image."
    )


class GeneratedImage(BaseModel):
    """One image of a JSON answer."""

    seed: int
    png_base64: str


class GenerateResponse(BaseModel):
    """The JSON answer of POST /generate."""

    class_id: int
    class_name: str
    num_inference_steps: int
    milliseconds: float
    """From the request's arrival to the last image."""
    images: list[GeneratedImage]


class ClassEntry(BaseModel):
    """A class that the generator knows."""

    id: int
    name: str


class Health(BaseModel):
    """The answer of GET /healthz."""

    status: Literal["ok"]
    model: str
    num_classes: int
