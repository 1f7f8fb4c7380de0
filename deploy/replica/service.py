"""Answers generation requests in batches with the current model.

Uses asyncio and threads; `deploy.app` wraps it in a Ray Serve deployment.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from deploy.messages import (
    ClassEntry,
    GenerationPart,
    GenerationRequest,
    GenerationResult,
    GeneratorStatus,
    Refusal,
)
from deploy.metrics import Recorder
from deploy.replica.batching import BatchedResults, Batcher, BatchLimits, DeadlineError, OverloadedError
from deploy.replica.engine import BatchOptions, BatchTiming, ImageSpec
from deploy.replica.loading import LoadedModel
from deploy.replica.model_swap import ModelSwapper
from deploy.settings import GENERATOR_SETTINGS, Arguments, apply_user_config
from meanflow_core.sampling import has_equal_steps

logger = logging.getLogger(__name__)

# Cost of decoding relative to one network forward, for XL/2 and Stable Diffusion's decoder. Only estimates queue times.
DECODER_COST = 2.6
MAX_CONSECUTIVE_FAILURES = 3


def image_cost(key: tuple[LoadedModel, BatchOptions]) -> float:
    """Cost of an image in network forwards, decoding included."""
    options = key[1]
    return len(options.timesteps) - 1 + DECODER_COST * (1 + len(options.partial_steps))


class GeneratorService:
    """A replica of the generator."""

    def __init__(self, arguments: Arguments, models: ModelSwapper, recorder: Recorder) -> None:
        self.models = models
        self.settings_problem: str | None = None
        """Why the last user_config was refused; None if it is in use."""
        self._arguments = arguments
        self._settings = arguments
        self._recorder = recorder
        self._consecutive_failures = 0
        # One thread runs the engine. Models load in other threads, so that the current one keeps serving.
        self._compute_thread = ThreadPoolExecutor(1, "generate", torch.set_num_threads, (arguments.cpu_threads,))
        self._batcher: Batcher[ImageSpec, np.ndarray] = Batcher(
            self._run_batch, self._limits(), cost=image_cost, on_batch=self._record_batch
        )

    def _limits(self) -> BatchLimits:
        settings = self._settings
        return BatchLimits(settings.max_batch_size, settings.batch_wait_seconds, settings.max_queued_images)

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Applies settings at once and swaps the model in the background. A refused user_config changes nothing.

        The first call loads the first model. Raises ValueError if no model can be loaded.
        """
        try:
            self._settings = apply_user_config(self._arguments, user_config, GENERATOR_SETTINGS)
            self.settings_problem = None
        except ValueError as error:
            self.settings_problem = f"settings of the generator refused; the previous ones remain in use: {error}"
            logger.error(self.settings_problem)
        self._recorder.record(
            "meanflow_settings_refused", float(self.settings_problem is not None), tags={"part": "generator"}
        )
        self._batcher.limits = self._limits()
        await self.models.request(self._settings)

    def check_health(self) -> None:
        """Raises RuntimeError if no model is serving, or if the last MAX_CONSECUTIVE_FAILURES batches failed.

        In both cases only a new process helps: after a device fault, for example, every batch fails.
        """
        if self.models.current is None:
            raise RuntimeError("no model is loaded")
        if self._consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            raise RuntimeError(f"the last {self._consecutive_failures} batches failed")

    async def describe(self) -> GeneratorStatus:
        """The serving model and any problem with the requested model or settings."""
        current = self.models.current
        problems = filter(None, (self.settings_problem, self.models.problem))
        return GeneratorStatus(model=None if current is None else current.info, problem="; ".join(problems) or None)

    async def list_classes(self) -> list[ClassEntry]:
        """The classes, by id; empty before the first model is loaded."""
        return [] if self.models.current is None else self.models.current.classes.entries

    async def generate(
        self, request: GenerationRequest, on_part: Callable[[GenerationPart], None] | None = None
    ) -> GenerationResult | Refusal:
        """Generates the images of a request. on_part: called with images as soon as they are made, as for `stream`."""
        result = await self._generate(request, on_part)
        if isinstance(result, Refusal):
            self._recorder.record("meanflow_refused_total", tags={"code": result.code or "none"})
        return result

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationPart | Refusal]:
        """Generates the images of a request, and yields them as soon as they are made. A refusal ends the stream."""
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[GenerationPart | None] = asyncio.Queue()
        task = loop.create_task(self.generate(request, parts.put_nowait))
        task.add_done_callback(lambda _: parts.put_nowait(None))
        try:
            while (part := await parts.get()) is not None:
                yield part
            answer = await task
            if isinstance(answer, Refusal):
                yield answer
        finally:
            task.cancel()

    async def _generate(
        self, request: GenerationRequest, on_part: Callable[[GenerationPart], None] | None
    ) -> GenerationResult | Refusal:
        loaded = self.models.current
        if loaded is None:
            return Refusal(status=503, code="not_ready", message="no model is loaded yet", retry_after_seconds=5.0)
        refusal = find_unsupported(request, loaded)
        if refusal is not None:
            return refusal
        try:
            label = loaded.classes.find(request.class_)
        except ValueError as error:
            return Refusal(status=400, code="unknown_class", param="class", message=str(error))
        key = (loaded, BatchOptions(request.timesteps, request.is_preview, request.num_partial))
        specs = image_specs(request, label)
        on_results = None
        if on_part is not None:
            stream = PartStream(request, label, loaded, on_part)
            on_results = stream.add_finished
            if request.num_partial:
                specs = stream.with_partial_images(specs)
        try:
            batched = await self._batcher.submit(key, specs, request.timeout_seconds, on_results)
        except OverloadedError as error:
            retry_after = error.retry_after_seconds
            return Refusal(status=429, code="overloaded", message=str(error), retry_after_seconds=retry_after)
        except DeadlineError as error:
            return Refusal(status=504, code="deadline_exceeded", message=str(error))
        except torch.OutOfMemoryError as error:
            logger.exception("a single image did not fit into device memory")
            message = f"out of device memory: {error}"
            return Refusal(status=503, code="out_of_memory", message=message, retry_after_seconds=5.0)
        return build_result(request, label, loaded, range(request.num_images), batched)

    async def _run_batch(
        self, key: tuple[LoadedModel, BatchOptions], specs: list[ImageSpec]
    ) -> tuple[list[np.ndarray], BatchTiming]:
        loaded, options = key
        engine = loaded.engine
        num_before = engine.num_out_of_memory
        try:
            # In a thread, so that the event loop keeps accepting requests.
            loop = asyncio.get_running_loop()
            batch = await loop.run_in_executor(self._compute_thread, engine.run, options, specs)
        except Exception:
            self._consecutive_failures += 1
            raise
        finally:
            self._recorder.record("meanflow_out_of_memory_total", engine.num_out_of_memory - num_before)
        self._consecutive_failures = 0
        self._recorder.record("meanflow_model_seconds", batch.timing.model_seconds)
        self._recorder.record("meanflow_decode_seconds", batch.timing.decode_seconds)
        return list(batch.images), batch.timing

    def _record_batch(self, queue_wait_seconds: list[float]) -> None:
        self._recorder.record("meanflow_batch_rows", len(queue_wait_seconds))
        self._recorder.record("meanflow_images_total", len(queue_wait_seconds))
        for seconds in queue_wait_seconds:
            self._recorder.record("meanflow_queue_wait_seconds", seconds)
        self._recorder.record("meanflow_queued_images", self._batcher.num_queued)


def find_unsupported(request: GenerationRequest, loaded: LoadedModel) -> Refusal | None:
    """The first option of a request that this model does not support."""
    info = loaded.info
    if request.model is not None and request.model not in (info.id, info.source.model):
        message = f"unknown model {request.model!r}; this endpoint serves {info.id!r}"
        return Refusal(status=404, code="model_not_found", param="model", message=message)
    model_size = f"{info.image_size}x{info.image_size}"
    if request.size not in ("auto", model_size):
        message = f"this model only generates {model_size} images, but got {request.size!r}"
        return Refusal(status=400, code="unsupported_size", param="size", message=message)
    has_guidance = request.guidance_scale not in (None, 1.0) or request.guidance_interval is not None
    if has_guidance and not info.supports_guidance:
        param = "guidance_scale" if request.guidance_interval is None else "guidance_interval"
        message = "this model's guidance is built into its weights; omit the guidance options"
        return Refusal(status=400, code="no_guidance", param=param, message=message)
    if info.prediction == "epsilon" and not has_equal_steps(request.timesteps):
        message = "this diffusion model takes equal steps only; give num_inference_steps instead of timesteps"
        return Refusal(status=400, code="unequal_timesteps", param="timesteps", message=message)
    if request.is_preview and not info.has_previews:
        message = "this endpoint has no preview decoder"
        return Refusal(status=400, code="no_previews", param="preview", message=message)
    return None


def interpolation_weights(request: GenerationRequest) -> list[float] | None:
    """Weight of `seed_end` for each image; None without a `seed_end`."""
    if request.seed_end is None:
        return None
    return [index / (request.num_images - 1) for index in range(request.num_images)]


def image_specs(request: GenerationRequest, label: int) -> list[ImageSpec]:
    """The images of a request."""
    weights = interpolation_weights(request)
    return [
        ImageSpec(
            label=label,
            seed=request.seed if weights else request.seed + index,
            seed_end=request.seed_end,
            weight=weights[index] if weights else 0.0,
            guidance_scale=request.guidance_scale,
            guidance_interval=request.guidance_interval,
        )
        for index in range(request.num_images)
    ]


def build_result(
    request: GenerationRequest,
    label: int,
    loaded: LoadedModel,
    indices: Sequence[int],
    batched: BatchedResults[np.ndarray],
) -> GenerationResult:
    """Images of a request with their class, model and timings. indices: those of these images in the request."""
    entry = loaded.classes.entries[label]
    weights = interpolation_weights(request)
    return GenerationResult(
        images=np.stack(batched.results),
        image_mode=loaded.info.image_mode,
        class_id=label,
        class_name=entry.name,
        wnid=entry.wnid,
        model=loaded.info.id,
        weights=None if weights is None else [weights[index] for index in indices],
        queue_seconds=batched.queue_wait_seconds,
        model_seconds=sum(timing.model_seconds for timing in batched.batch_infos),
        decode_seconds=sum(timing.decode_seconds for timing in batched.batch_infos),
    )


class PartStream:
    """Hands out the images of a streamed request. Use it on the event loop."""

    def __init__(
        self, request: GenerationRequest, label: int, loaded: LoadedModel, on_part: Callable[[GenerationPart], None]
    ) -> None:
        self._request, self._label, self._loaded, self._on_part = request, label, loaded, on_part
        self._loop = asyncio.get_running_loop()
        self._latest: BatchedResults[np.ndarray] = BatchedResults([], [], 0.0)
        self._sent: set[tuple[int, int]] = set()

    def add_finished(self, indices: list[int], batched: BatchedResults[np.ndarray]) -> None:
        """Hands out the finished images of a batch."""
        self._latest = batched
        self._add(indices, batched, None)

    def with_partial_images(self, specs: list[ImageSpec]) -> list[ImageSpec]:
        """Copies of the specs with a callback for partial images."""

        def on_partial(index: int, partial_index: int, image: np.ndarray) -> None:  # in the engine's thread
            self._loop.call_soon_threadsafe(self._add_partial, index, partial_index, image)

        return [replace(spec, on_partial=partial(on_partial, index)) for index, spec in enumerate(specs)]

    def _add_partial(self, index: int, partial_index: int, image: np.ndarray) -> None:
        """Hands out a partial image, but not again when its batch is repeated in halves, after it ran out of memory."""
        if (index, partial_index) not in self._sent:
            self._sent.add((index, partial_index))
            self._add([index], replace(self._latest, results=[image]), partial_index)

    def _add(self, indices: list[int], batched: BatchedResults[np.ndarray], partial_index: int | None) -> None:
        result = build_result(self._request, self._label, self._loaded, indices, batched)
        self._on_part(GenerationPart(indices=indices, partial_index=partial_index, result=result))
