"""Which model a replica of the generator serves, and how another takes its place.

Whatever a user_config asks for, the model that serves goes on until its successor is loaded and warm; where that fails, it
just goes on, and says so. All replicas come to serve the same model: the wanted one where it loads, else the last good one,
which they find in a memory that they share.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from pydantic import ValidationError

from deploy.messages import ModelInfo, ModelSource
from deploy.metrics import Recorder
from deploy.models import announce
from deploy.replica.loading import Loaded, load_model
from deploy.settings import GENERATOR_SETTINGS, Arguments, apply_user_config

logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 15.0, 600.0
ASKING_SECONDS = 10.0


class Memory(Protocol):
    """Remembers, for replicas to come, which models served; `deploy.memory`."""

    def recall(self) -> str | None:
        """The model that was asked for last of those that served, or None."""

    def remember(self, model: str, asked_at: float) -> None:
        """Adds one. asked_at: when it was asked for, in seconds since 1970."""


class ServingModel:
    """The model that serves, the settings in use, and what is wrong with what was asked for."""

    def __init__(
        self,
        arguments: Arguments,
        memory: Memory,
        recorder: Recorder,
        load: Callable[[str, Arguments], Loaded] = load_model,
        first_retry_seconds: float = FIRST_RETRY_SECONDS,
        announce: Callable[[ModelSource, str], None] = announce,
        is_asked_for: Callable[[dict[str, Any] | None], bool] = lambda user_config: True,
    ) -> None:
        """is_asked_for: whether a user_config is what the cluster asks for by now. It may block, and raise."""
        self.settings = arguments
        self.loaded: Loaded | None = None
        self._arguments = arguments
        self._memory = memory
        self._recorder = recorder
        self._load = load
        self._announce = announce
        self._is_asked_for = is_asked_for
        self._first_retry_seconds = first_retry_seconds
        self._user_config: dict[str, Any] | None = None
        self._asked_at = 0.0  # when the model of the settings was last asked for, as far as is known
        self._asking: asyncio.Task | None = None
        # What the memory has not taken yet, being slow or away, and the task that tells it again.
        self._not_remembered: tuple[str, float] | None = None
        self._reminder: asyncio.Task | None = None
        self._setting_problem: str | None = None
        self._model_problem: str | None = None
        self._change: asyncio.Task | None = None
        self._changing_to: str | None = None

    @property
    def problem(self) -> str | None:
        """Why something that was asked for is not in use; None where everything is."""
        return "; ".join(filter(None, (self._setting_problem, self._model_problem))) or None

    def _pauses(self) -> Iterator[float]:
        """Seconds before each next try, without end: twice as many every time, up to a limit."""
        pause = self._first_retry_seconds
        while True:
            yield pause
            pause = min(2.0 * pause, LAST_RETRY_SECONDS)

    def take_settings(self, user_config: dict[str, Any] | None) -> None:
        """Takes the settings, or keeps the earlier ones and says what is wrong. `change` comes next."""
        asked_at = time.time()
        if self._asking is not None:
            self._asking.cancel()  # what is told now is the newest
        self._user_config = user_config
        try:
            self.settings = apply_user_config(self._arguments, user_config, GENERATOR_SETTINGS)
            self._setting_problem = None
            self._asked_at = asked_at
        except (ValidationError, ValueError) as error:
            self._setting_problem = f"settings refused, the earlier ones stay: {error}"
            logger.error(self._setting_problem)
        self._report_problem()

    async def change(self) -> None:
        """Begins to load the model of the settings beside the one that serves, whose place it takes when it is warm.

        Only where no model serves yet is the loading awaited: the wanted one, else the last that served here, else that
        of the application's arguments. Raises ValueError where none of them can be had. Nothing else raises: Serve would
        stop the replica, whose successor would fail alike.
        """
        if self._change is not None and self._changing_to == self.settings.model:
            return  # other settings; what is being loaded goes on
        if self._change is not None:
            self._change.cancel()
            self._change = None
            self._model_problem = None  # of a model that is not asked for any more
        if self.loaded is None:
            is_newest = await self._is_newest()
            if not is_newest:
                logger.info("the user_config that this replica starts with is not known to be the newest")
                self._asked_at = 0.0
            await self._begin()
            if is_newest is None and self._setting_problem is None:
                self._asking = asyncio.create_task(self._ask_again())
        assert self.loaded is not None
        if self.loaded.model != self.settings.model:
            self._changing_to = self.settings.model
            self._change = asyncio.create_task(self._change_model(self.settings.model))
        elif self._setting_problem is not None:
            self._changing_to = None
            self._change = asyncio.create_task(self._keep_up())
        else:  # also where another model is taken back, which others may have remembered
            await self._remember(self.loaded.model, self._asked_at)
        self._report_problem()

    async def _is_newest(self) -> bool | None:
        """Whether what a starting replica was given is what is asked for by now; None where that cannot be learnt.

        Serve tells a replica that starts nothing of a change until it has started: what it was given may be minutes old.
        """
        try:
            # `wait_for` would lose a cancellation that comes together with the answer.
            async with asyncio.timeout(ASKING_SECONDS):
                return await asyncio.to_thread(self._is_asked_for, self._user_config)
        except Exception:
            logger.exception("cannot learn which user_config is asked for by now")
            return None

    async def _ask_again(self) -> None:
        """Learns later, and until another is told, whether what this replica started with is what is asked for."""
        assert self.loaded is not None
        for pause in self._pauses():
            await asyncio.sleep(pause)
            asked_at = time.time()
            is_newest = await self._is_newest()
            if is_newest is not None:
                break
        if is_newest:
            self._asked_at = asked_at
            if self.loaded.model == self.settings.model:
                await self._remember(self.loaded.model, asked_at)

    async def _begin(self) -> None:
        """The first model of this replica."""
        last = await self._recall()
        # Where settings are refused, what is wanted is not known, and the replicas beside this one serve the last good model.
        wanted = self.settings.model if self._setting_problem is None else last
        problems = []
        for model in dict.fromkeys((wanted, last, self._arguments.model)):
            if model is None:
                continue
            try:
                self._take(await self._load_in_thread(model))
                break
            except Exception as error:
                problems.append(f"cannot serve {model}: {error}")
                logger.exception("cannot serve %s", model)
        if self.loaded is None:
            raise ValueError("; ".join(problems))
        if self._setting_problem is not None:
            self.settings = self.settings.model_copy(update={"model": self.loaded.model})
        elif self.loaded.model != wanted:
            self._model_problem = f"{problems[0]}; {self.loaded.model} serves in its place"

    async def _change_model(self, wanted: str) -> None:
        """Loads another model, as often as it takes: what failed for a while (a tracking server) comes by itself."""
        assert self.loaded is not None
        for pause in self._pauses():
            try:
                loaded = await self._load_in_thread(wanted)
                break
            except Exception as error:
                logger.exception("cannot serve %s; trying again in %.0f s", wanted, pause)
                refused = f"cannot serve {wanted}: {error}"
            # Behind the handler: the error's traceback keeps alive what was loaded, and the device's memory with it.
            self._model_problem = f"{refused}; {self.loaded.model} serves on"
            self._report_problem()
            await self._follow_the_others(wanted)
            self._model_problem = f"{refused}; {self.loaded.model} serves on"
            self._report_problem()
            # What did not fit beside the model that was being loaded may fit again.
            self.loaded.engine.largest_that_fits = None
            await asyncio.sleep(pause)
        self._take(loaded)
        self._change = None
        if self._setting_problem is not None:  # since this one began to load
            self._changing_to = None
            self._change = asyncio.create_task(self._keep_up())
        self._model_problem = None
        self._report_problem()
        await self._remember(wanted, self._asked_at)

    async def _keep_up(self) -> None:
        """Serves the last good model for as long as settings are refused: which one is wanted is not known.

        Others may have been told of a model that this replica was not.
        """
        assert self.loaded is not None
        for pause in self._pauses():
            await self._follow_the_others()
            self.settings = self.settings.model_copy(update={"model": self.loaded.model})
            await asyncio.sleep(pause)

    async def _follow_the_others(self, wanted: str | None = None) -> None:
        """Loads the last good model where it is not the one that serves here. wanted: one that cannot be loaded.

        Told of a bad model while it still loaded the good one before it, a replica would serve an even older one for
        ever, beside others that are further.
        """
        assert self.loaded is not None
        if self._not_remembered is not None:
            await self._remember(*self._not_remembered)
            if self._not_remembered is not None:  # what the memory has may be older than what serves here
                return
        last = await self._recall()
        if last is None or last in (wanted, self.loaded.model):
            return
        try:
            self._take(await self._load_in_thread(last))
        except Exception:
            logger.exception("cannot serve %s, the last good model, either", last)

    def _take(self, loaded: Loaded) -> None:
        """Another model serves from now on."""
        if self.loaded is not None:
            # Two models were there while this one warmed up; from now on it has the device to itself.
            loaded.engine.largest_that_fits = None
        self.loaded = loaded
        logger.info("%s serves now", loaded.model)
        # A thread that nobody waits for: a tracking server that is away holds up neither requests nor the next model.
        threading.Thread(target=self._tell, args=(loaded.card,), daemon=True).start()

    def _tell(self, card: ModelInfo) -> None:
        try:
            self._announce(card.source, card.id)
        except Exception:
            logger.exception("the tracking server was not told that %s serves", card.source.model)

    async def _recall(self) -> str | None:
        # In a thread, like `_remember`: the cluster's store may be slow, or away, and requests go on.
        try:
            return await asyncio.to_thread(self._memory.recall)
        except Exception:
            logger.exception("cannot recall which model served last")
            return None

    async def _remember(self, model: str, asked_at: float) -> None:
        """Tells the memory that a model serves, and again later where it is away."""
        # Before it is told: until it has answered, what it has may be older than what serves here.
        self._not_remembered = entry = (model, asked_at)
        try:
            await asyncio.to_thread(self._memory.remember, model, asked_at)
        except Exception:
            logger.exception("cannot remember that %s serves", model)
            if self._reminder is None or self._reminder.done():
                self._reminder = asyncio.create_task(self._remind())
            return
        if self._not_remembered == entry:  # and not a newer one, which was told meanwhile
            self._not_remembered = None

    async def _remind(self) -> None:
        for pause in self._pauses():
            await asyncio.sleep(pause)
            if self._not_remembered is not None:
                await self._remember(*self._not_remembered)
            if self._not_remembered is None:
                return

    async def _load_in_thread(self, model: str) -> Loaded:
        settings = self.settings

        def load() -> Loaded:
            torch.set_num_threads(settings.cpu_threads)
            return self._load(model, settings)

        # A thread of its own: one that hangs at a server that does not answer must not stand in the way of the next.
        thread = ThreadPoolExecutor(1, "load")
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, load)
        finally:
            thread.shutdown(wait=False)

    def _report_problem(self) -> None:
        self._recorder.record("meanflow_model_refused", float(self.problem is not None))
