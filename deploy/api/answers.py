"""Builds the fields of responses with images: files, names, seeds, sizes and times."""

import base64
import time
from collections.abc import Sequence
from typing import Any

from deploy.api.encoding import encode_image
from deploy.api.schema import ImageData, ImagesRequest, Sampling, Timing
from deploy.api.service import ApiService, Encoded
from deploy.messages import GenerationRequest, GenerationResult, ImageMode


async def encode_files(service: ApiService, body: ImagesRequest, result: GenerationResult) -> Encoded[list[str]]:
    """The image files that a request wants, in base64."""
    output_format, mode = body.output_format or "png", file_mode(body, result)
    return await service.encode(
        lambda: [
            base64.b64encode(encode_image(image, output_format, body.output_compression, mode=mode)).decode()
            for image in result.images
        ]
    )


def image_data(
    generation: GenerationRequest, indices: Sequence[int], result: GenerationResult, files: list[str]
) -> list[ImageData]:
    """Images of a response, each with its seed or its interpolation weight between two seeds.

    indices: those of these images in the request, one for each image of `result` and each of `files`.
    """
    return [
        ImageData(
            b64_json=file,
            seed=generation.seed if result.weights else generation.seed + index,
            seed_end=generation.seed_end,
            weight=result.weights[position] if result.weights else None,
        )
        for position, (index, file) in enumerate(zip(indices, files, strict=True))
    ]


def common_fields(body: ImagesRequest, generation: GenerationRequest, result: GenerationResult) -> dict[str, Any]:
    """The fields that `ImagesResponse` and `ImageEvent` share, except the timing."""
    return {
        "model": result.model,
        "size": f"{result.images.shape[2]}x{result.images.shape[1]}",
        "output_format": body.output_format or "png",
        "class_id": result.class_id,
        "class_name": result.class_name,
        "wnid": result.wnid,
        "num_inference_steps": len(generation.timesteps) - 1,
        "preview": generation.is_preview,
    }


def timing_of(result: GenerationResult, encode_seconds: float, started: float) -> Timing:
    """The timing of a request that arrived at `started` (time.perf_counter)."""
    return Timing(
        queue_ms=1000.0 * result.queue_seconds,
        model_ms=1000.0 * result.model_seconds,
        decode_ms=1000.0 * result.decode_seconds,
        encode_ms=1000.0 * encode_seconds,
        total_ms=1000.0 * (time.perf_counter() - started),
    )


def server_timing(timing: Timing) -> str:
    """The Server-Timing header, which browsers show beside a request. Source: W3C Server Timing."""
    return ", ".join(f"{name.removesuffix('_ms')};dur={value:.1f}" for name, value in timing)


def file_mode(body: Sampling, result: GenerationResult) -> ImageMode:
    """Pillow's mode of the image files of a response."""
    return result.image_mode if body.image_mode == "auto" else body.image_mode


def file_names(generation: GenerationRequest, result: GenerationResult) -> list[str]:
    """Names of the images in a ZIP: class and seed, or class and interpolation weight between two seeds."""
    if result.weights:
        return [f"class{result.class_id}-{weight:.3f}.png" for weight in result.weights]
    return [f"class{result.class_id}-seed{generation.seed + index}.png" for index in range(generation.num_images)]
