"""Baselines of the serving benchmark: an empty Serve application, plain FastAPI, and diffusers' DiTPipeline."""

import io
import os
import threading
from pathlib import Path
from typing import Annotated

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from fastapi import FastAPI, Response
from PIL import Image
from pydantic import BaseModel, Field
from ray import serve
from ray.serve import Application

from meanflow_core.generator import load_pipeline


class ImageRequest(BaseModel):
    """The fields of the request body that the load generator sends."""

    class_: Annotated[int, Field(alias="class")]
    seed: int


noop_api = FastAPI()


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
@serve.ingress(noop_api)
class Noop:
    """Handles a request like the endpoint in topology one: parses the body and returns bytes."""

    def __init__(self, num_bytes: int) -> None:
        self._answer = os.urandom(num_bytes)

    @noop_api.post("/generate")
    async def generate(self, request: ImageRequest) -> Response:
        """Returns as many random bytes as an image has."""
        return Response(self._answer, media_type="image/png")


class NoopArguments(BaseModel):
    """Arguments of the empty application."""

    num_bytes: int


def build_noop(arguments: NoopArguments) -> Application:
    """An application without a model."""
    return Noop.bind(arguments.num_bytes)  # type: ignore[attr-defined]


def build_plain() -> FastAPI:
    """A minimal FastAPI server that runs the pipeline in MEANFLOW_GENERATOR, one image at a time."""
    torch.set_num_threads(int(os.environ["MEANFLOW_THREADS"]))
    pipeline = load_pipeline(Path(os.environ["MEANFLOW_GENERATOR"]))
    lock = threading.Lock()
    plain = FastAPI()

    @plain.post("/generate")
    def generate(request: ImageRequest) -> Response:
        with lock:
            image = pipeline.images_from_seeds([request.class_], [request.seed])[0].numpy()
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    return plain


def build_dit_pipeline(vae: AutoencoderKL, num_classes: int = 1000) -> DiTPipeline:
    """diffusers' DiTPipeline with a randomly initialized DiT-S/2."""
    network = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12, patch_size=2,
        sample_size=32, num_embeds_ada_norm=num_classes,
    )  # fmt: skip
    pipeline = DiTPipeline(network.eval().requires_grad_(False), vae.eval().requires_grad_(False), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
