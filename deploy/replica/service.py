"""The generator's side: answers orders in batches, by whichever model serves.

Plain asyncio and threads; `deploy.app` makes a Ray Serve deployment of it.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from deploy.messages import ClassEntry, GenerationRequest, GenerationResult, GeneratorStatus, Refusal
from deploy.metrics import Recorder
from deploy.replica.batching import Batcher, BatchLimits, BatchReport, DeadlineError, OverloadedError
from deploy.replica.engine import BatchTimes, Group, Row
from deploy.replica.loading import Loaded, find_class
from deploy.replica.serving_model import ServingModel

logger = logging.getLogger(__name__)

# What the decoder costs beside one network call, for XL/2 and Stable Diffusion's: how long a queue takes is an estimate.
DECODER_CALLS = 2.6
FAILURES_OF_THE_SICK = 3


def row_cost(key: tuple[Loaded, Group]) -> float:
    """Network calls that an image of a group takes, the decoder counted in."""
    return len(key[1].timesteps) - 1 + DECODER_CALLS


class GeneratorService:
    """What a replica of the generator does."""

    def __init__(self, model: ServingModel, recorder: Recorder) -> None:
        self._model = model
        self._recorder = recorder
        self._failed_in_a_row = 0
        # One thread, which computes; loading has others, so that the old model serves meanwhile.
        self._computing = ThreadPoolExecutor(1, "generate", torch.set_num_threads, (model.settings.cpu_threads,))
        self._batcher: Batcher[Row, np.ndarray] = Batcher(
            self._run, self._limits(), cost=row_cost, on_batch=self._on_batch
        )

    def _limits(self) -> BatchLimits:
        settings = self._model.settings
        return BatchLimits(settings.max_batch_size, settings.batch_wait_seconds, settings.max_queued_images)

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Takes the settings at once, and another model when it is loaded. Raises ValueError where none can be had."""
        self._model.take_settings(user_config)
        self._batcher.limits = self._limits()
        await self._model.change()

    def check_health(self) -> None:
        """Raises RuntimeError where no model serves, or batch after batch fails, as after a fault of the device.

        Only a new process heals either.
        """
        if self._model.loaded is None:
            raise RuntimeError("no model is loaded")
        if self._failed_in_a_row >= FAILURES_OF_THE_SICK:
            raise RuntimeError(f"the last {self._failed_in_a_row} batches failed")

    async def _run(self, key: tuple[Loaded, Group], rows: list[Row]) -> tuple[list[np.ndarray], BatchTimes]:
        loaded, group = key
        engine = loaded.engine
        before = engine.num_out_of_memory
        try:
            # Off the event loop, which gathers the next batch meanwhile.
            images, times = await asyncio.get_running_loop().run_in_executor(self._computing, engine.run, group, rows)
        except Exception:
            self._failed_in_a_row += 1
            raise
        finally:
            self._recorder.record("meanflow_out_of_memory_total", engine.num_out_of_memory - before)
        self._failed_in_a_row = 0
        self._recorder.record("meanflow_model_seconds", times.model_seconds)
        self._recorder.record("meanflow_decode_seconds", times.decode_seconds)
        return list(images), times

    def _on_batch(self, report: BatchReport) -> None:
        self._recorder.record("meanflow_batch_rows", report.rows)
        self._recorder.record("meanflow_images_total", report.rows)
        for seconds in report.queue_wait_seconds:
            self._recorder.record("meanflow_queue_wait_seconds", seconds)
        self._recorder.record("meanflow_queued_images", self._batcher.num_queued)

    def _check(self, order: GenerationRequest, loaded: Loaded) -> int | Refusal:
        """The class id, or what is wrong with an order for this model."""
        card = loaded.card
        if order.model is not None and order.model not in (card.id, card.source.model):
            return Refusal(
                status=404, code="model_not_found", param="model",
                message=f"unknown model {order.model!r}; {card.id!r} serves here",
            )  # fmt: skip
        own_size = f"{card.image_size}x{card.image_size}"
        if order.size not in ("auto", own_size):
            return Refusal(
                status=400, code="unsupported_size", param="size",
                message=f"this model makes images of {own_size} alone, but got {order.size!r}",
            )  # fmt: skip
        if not card.takes_guidance and (order.guidance_scale not in (None, 1.0) or order.guidance_interval is not None):
            return Refusal(
                status=400, code="no_guidance",
                param="guidance_scale" if order.guidance_interval is None else "guidance_interval",
                message="this model's guidance is built into its weights; leave them out",
            )  # fmt: skip
        if order.is_preview and not card.has_previews:
            return Refusal(status=400, code="no_previews", param="preview", message="there is no preview decoder here")
        try:
            return find_class(order.class_, loaded.classes, loaded.names)
        except ValueError as error:
            return Refusal(status=400, code="unknown_class", param="class", message=str(error))

    async def generate(self, order: GenerationRequest) -> GenerationResult | Refusal:
        """The images of an order, or why there are none."""
        loaded = self._model.loaded
        if loaded is None:
            return Refusal(status=503, code="not_ready", message="no model is loaded yet", retry_after_seconds=5.0)
        label = self._check(order, loaded)
        if isinstance(label, Refusal):
            return self._refuse(label)
        weights = None
        if order.seed_end is not None:
            weights = [index / (order.num_images - 1) for index in range(order.num_images)]
        rows = [
            Row(
                label,
                order.seed + (0 if weights else index),
                order.seed_end,
                weights[index] if weights else 0.0,
                order.guidance_scale,
                order.guidance_interval,
            )
            for index in range(order.num_images)
        ]
        key = (loaded, Group(order.timesteps, order.is_preview))
        try:
            finished = await self._batcher.submit(key, rows, order.timeout_seconds)
        except OverloadedError as error:
            return self._refuse(
                Refusal(
                    status=429, code="overloaded", message=str(error), retry_after_seconds=error.retry_after_seconds
                )
            )
        except DeadlineError as error:
            return self._refuse(Refusal(status=504, code="deadline_exceeded", message=str(error)))
        except torch.OutOfMemoryError as error:
            logger.exception("a single image did not fit")
            return self._refuse(
                Refusal(
                    status=503, code="out_of_memory", message=f"the device's memory is full: {error}",
                    retry_after_seconds=5.0,
                )
            )  # fmt: skip
        return GenerationResult(
            images=np.stack(finished.results),
            class_id=label,
            class_name=loaded.classes[label].name,
            wnid=loaded.classes[label].wnid,
            model=loaded.card.id,
            weights=weights,
            queue_seconds=finished.queue_wait_seconds,
            model_seconds=sum(part.model_seconds for part in finished.parts),
            decode_seconds=sum(part.decode_seconds for part in finished.parts),
        )

    def _refuse(self, refusal: Refusal) -> Refusal:
        self._recorder.record("meanflow_refused_total", tags={"code": refusal.code or "none"})
        return refusal

    async def describe(self) -> GeneratorStatus:
        """The model that serves, and what is wrong."""
        model = None if self._model.loaded is None else self._model.loaded.card
        return GeneratorStatus(model=model, problem=self._model.problem)

    async def list_classes(self) -> list[ClassEntry]:
        """The classes, by id."""
        return [] if self._model.loaded is None else self._model.loaded.classes
