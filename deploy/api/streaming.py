"""Streams a request's images as server-sent events, as OpenAI's Images API does."""

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator

from fastapi.responses import StreamingResponse

from deploy.api.answers import common_fields, encode_files, image_data, timing_of
from deploy.api.errors import INTERNAL_ERROR, ApiError, error_body
from deploy.api.schema import ImageEvent, ImagesRequest
from deploy.api.service import ApiService
from deploy.messages import GenerationPart, GenerationRequest

logger = logging.getLogger(__name__)


async def image_events(
    service: ApiService,
    body: ImagesRequest,
    generation: GenerationRequest,
    parts: AsyncGenerator[GenerationPart],
    started: float,
) -> AsyncGenerator[ImageEvent]:
    """An event for each image of a stream."""
    encode_seconds = 0.0
    async with contextlib.aclosing(parts):
        async for part in parts:
            result = part.result
            files = await encode_files(service, body, result)
            encode_seconds += files.seconds
            images = image_data(generation, part.indices, result, files.content)
            for index, image in zip(part.indices, images, strict=True):
                is_partial = part.partial_index is not None
                yield ImageEvent(
                    type="image_generation.partial_image" if is_partial else "image_generation.completed",
                    index=index,
                    partial_image_index=part.partial_index,
                    created_at=int(time.time()),
                    timing=timing_of(result, encode_seconds, started),
                    **image.model_dump(),
                    **common_fields(body, generation, result),
                )


async def event_stream(events: AsyncGenerator[ImageEvent], log: dict[str, object]) -> StreamingResponse:
    """Server-sent events. An error before the first event is raised, and has its own status; a later one is an event.

    log: details for the access log, whose status is then 200.
    """
    first = await anext(events)

    async def lines() -> AsyncIterator[str]:
        async with contextlib.aclosing(events):
            try:
                yield _event(first.type, first.model_dump_json(exclude_none=True))
                async for event in events:
                    yield _event(event.type, event.model_dump_json(exclude_none=True))
            except ApiError as error:
                log["stream_error"] = error.code
                yield _event("error", error_body(error).model_dump_json())
            except Exception:
                logger.exception("a stream failed")
                log["stream_error"] = "internal"
                yield _event("error", error_body(ApiError(500, INTERNAL_ERROR)).model_dump_json())

    # nginx would collect the events otherwise.
    return StreamingResponse(lines(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"
