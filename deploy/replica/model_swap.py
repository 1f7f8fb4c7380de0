"""Replaces a replica's model in place: the next model loads in the background while the current one serves.

Replicas do not coordinate: Ray Serve gives each of them the same user_config.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from deploy.messages import ModelInfo, ModelSource
from deploy.metrics import Recorder
from deploy.models import tag_as_serving
from deploy.replica.loading import LoadedModel, load_model
from deploy.settings import Arguments

logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 15.0, 600.0


class ModelSwapper:
    """Holds the serving model and replaces it on request. Its methods run on one event loop; models load in threads.

    If a model fails to load, the current one keeps serving, `problem` says why, and the load is retried with growing
    pauses until it succeeds or another model is requested.
    """

    def __init__(
        self,
        deployed_model: str,
        recorder: Recorder,
        *,
        load: Callable[[str, Arguments], LoadedModel] = load_model,
        tag_as_serving: Callable[[ModelSource, str], None] = tag_as_serving,
        first_retry_seconds: float = FIRST_RETRY_SECONDS,
    ) -> None:
        """deployed_model: served by a new replica if the requested model fails to load."""
        self.current: LoadedModel | None = None
        self.problem: str | None = None
        """Why the requested model does not serve; None if it does, or is loading for the first time."""
        self._deployed_model = deployed_model
        self._recorder = recorder
        self._load = load
        self._tag_as_serving = tag_as_serving
        self._first_retry_seconds = first_retry_seconds
        self._requested: str | None = None
        self._swap_task: asyncio.Task | None = None

    async def request(self, settings: Arguments) -> None:
        """Makes `settings.model` the serving model as soon as it is loaded and warm. The latest request wins.

        Returns at once, because Serve sends no requests to a replica that is reconfiguring. Only a replica without a
        model loads one before it returns: the requested model or, if that fails, the deployed one. Raises ValueError
        if both fail.
        """
        if settings.model == self._requested:  # serving, loading, or waiting for the next attempt
            return
        self._requested = settings.model
        if self._swap_task is not None:
            self._swap_task.cancel()  # discards a load in flight
            self._swap_task = None
        self._report(None)
        if self.current is None:
            await self._start(settings)
        elif self.current.model != settings.model:
            self._swap_task = asyncio.create_task(self._swap(settings))

    async def _start(self, settings: Arguments) -> None:
        """Loads a new replica's first model."""
        problem = await self._try_to_serve(settings.model, settings)
        if problem is None:
            return
        if settings.model == self._deployed_model:
            raise ValueError(problem)
        deployed_problem = await self._try_to_serve(self._deployed_model, settings)
        if deployed_problem is not None:
            raise ValueError(f"{problem}; {deployed_problem}")
        self._report(problem)
        self._swap_task = asyncio.create_task(self._swap(settings, self._first_retry_seconds))

    async def _swap(self, settings: Arguments, pause_seconds: float = 0.0) -> None:
        """Tries to load and serve the requested model until that succeeds."""
        while True:
            await asyncio.sleep(pause_seconds)
            problem = await self._try_to_serve(settings.model, settings)
            self._report(problem)
            if problem is None:
                return
            pause_seconds = min(max(2.0 * pause_seconds, self._first_retry_seconds), MAX_RETRY_SECONDS)
            logger.info("next attempt to load %s in %.0f s", settings.model, pause_seconds)

    async def _try_to_serve(self, model: str, settings: Arguments) -> str | None:
        """Loads a model and makes it the current one. Returns what went wrong, or None."""
        loaded, problem = None, None
        try:
            loaded = await self._load_in_thread(model, settings)
        except Exception as error:
            logger.exception("cannot load %s", model)
            problem = f"cannot load {model}: {error}"
        # Batches may have run out of memory while two models shared the device; from now on there is one.
        remaining = loaded or self.current
        if remaining is not None:
            remaining.engine.max_size_that_fits = None
        if loaded is not None:
            self.current = loaded
            logger.info("serving %s", loaded.model)
            # In a thread: an unreachable tracking server must not delay requests, the next model or the exit.
            threading.Thread(target=self._tag_model, args=(loaded.info,), daemon=True).start()
        return problem

    async def _load_in_thread(self, model: str, settings: Arguments) -> LoadedModel:
        # A thread per load, so that a load that hangs does not block the next one.
        thread = ThreadPoolExecutor(1, "load", torch.set_num_threads, (settings.cpu_threads,))
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, self._load, model, settings)
        finally:
            thread.shutdown(wait=False)

    def _tag_model(self, info: ModelInfo) -> None:
        try:
            self._tag_as_serving(info.source, info.id)
        except Exception:
            logger.exception("could not record in MLflow that %s is serving", info.source.model)

    def _report(self, problem: str | None) -> None:
        if problem is not None and self.current is not None:
            problem = f"{problem}; serving {self.current.model} instead"
        self.problem = problem
        self._recorder.record("meanflow_model_refused", float(problem is not None))
