"""The generator's side: holds a model, makes it anew when another is asked for, and answers orders in batches.

Plain asyncio and threads; `deploy.app` makes a Ray Serve deployment of it. Whatever a user_config asks for, the model
that serves goes on until its successor is loaded and warm; where that fails, it just goes on, and says so.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import ValidationError

from deploy.batching import Batcher, BatchLimits, BatchReport, DeadlineError, OverloadedError
from deploy.engine import BatchTimes, Engine, Group, Row
from deploy.metrics import Recorder
from deploy.models import announce, fetched_generator
from deploy.schema import (
    GENERATOR_SETTINGS,
    Arguments,
    ClassEntry,
    Made,
    ModelCard,
    ModelHashes,
    Order,
    Refusal,
    Source,
    with_settings,
)
from meanflow_core.autoencoder import load_preview_decoder, weight_hash
from meanflow_core.generator import load_pipeline

logger = logging.getLogger(__name__)

# What the decoder costs beside one network call, for XL/2 and Stable Diffusion's: how long a queue takes is an estimate.
DECODER_CALLS = 2.6
FAILURES_OF_THE_SICK = 3
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 15.0, 600.0
ASKING_SECONDS = 10.0


class Memory(Protocol):
    """Remembers, for replicas to come, which models served; `deploy.memory`."""

    def recall(self) -> str | None:
        """The model that was asked for last of those that served, or None."""

    def remember(self, model: str, asked_at: float) -> None:
        """Adds one. asked_at: when it was asked for, in seconds since 1970."""


@dataclass(frozen=True, eq=False)  # one of a kind, and a key of the batcher
class Loaded:
    """A model that is ready to serve."""

    model: str
    engine: Engine
    card: ModelCard
    classes: list[ClassEntry]
    names: dict[str, list[int]]
    """{name, synonym or wnid, in lower case: class ids}."""


def name_classes(class_names: dict[int, str], wnids: dict[str, str], num_classes: int) -> list[ClassEntry]:
    """An entry per class id; a class without a name is called by its id."""
    return [
        ClassEntry(id=label, name=class_names.get(label, str(label)), wnid=wnids.get(str(label)))
        for label in range(num_classes)
    ]


def index_names(classes: Sequence[ClassEntry]) -> dict[str, list[int]]:
    """{what may be typed, in lower case: the ids that it may mean}: whole names, each of their synonyms, wnids."""
    names: dict[str, list[int]] = {}
    for entry in classes:
        typed = {entry.name, *entry.name.split(",")} | ({entry.wnid} if entry.wnid else set())
        for word in {word.strip().lower() for word in typed}:
            names.setdefault(word, []).append(entry.id)
    return names


def find_class(wanted: int | str, classes: Sequence[ClassEntry], names: dict[str, list[int]]) -> int:
    """The id of a class given by id, "class:207", wnid or name.

    Raises ValueError for an unknown one, or a name that several share.
    """
    if isinstance(wanted, str) and wanted.strip().lower().startswith("class:"):
        digits = wanted.partition(":")[2].strip()
        if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
            raise ValueError(f'wanted "class:" and an id such as "class:0", but got {wanted!r}')
        wanted = int(digits)
    if isinstance(wanted, int):
        if not 0 <= wanted < len(classes):
            raise ValueError(f"class ids lie in [0, {len(classes) - 1}], but got {wanted}")
        return wanted
    found = names.get(wanted.strip().lower(), [])
    if len(found) == 1:
        return found[0]
    if found:
        which = ", ".join(f"class:{label} ({classes[label].name})" for label in found)
        raise ValueError(f"class name {wanted!r} means several classes: {which}; name the id")
    raise ValueError(f"unknown class {wanted!r}; GET /classes lists the {len(classes)} known ones")


def load_model(model: str, arguments: Arguments) -> Loaded:
    """Loads a model and warms it up. Raises ValueError (or what torch says) where it cannot serve."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with fetched_generator(model, arguments.tracking_uri) as (folder, source):
        pipeline = load_pipeline(folder, device)
        hashes = ModelHashes(transformer=weight_hash(pipeline.transformer), vae=weight_hash(pipeline.vae))
    tiny = None if arguments.preview_vae is None else load_preview_decoder(arguments.preview_vae)
    engine = Engine(
        pipeline,
        precision=arguments.precision,
        preview_decoder=tiny,
        compiled=arguments.compile,
        batch_sizes=arguments.batch_sizes,
        max_batch_size=arguments.max_batch_size,
    )
    engine.warm_up()
    config = pipeline.config
    classes = name_classes(pipeline.class_names, config.wnids or {}, pipeline.transformer.config.num_classes)
    card = ModelCard(
        id=arguments.served_name or source.name,
        created=int(time.time()),
        image_size=pipeline.image_size,
        num_classes=len(classes),
        takes_guidance=pipeline.takes_guidance,
        guidance_scale=config.guidance_scale,
        guidance_interval=[config.guidance_start, config.guidance_end],
        has_previews=tiny is not None,
        precision=arguments.precision,
        prediction=config.prediction,
        source=source,
        hashes=hashes,
    )
    return Loaded(model, engine, card, classes, index_names(classes))


def row_cost(key: tuple[Loaded, Group]) -> float:
    """Network calls that an image of a group takes, the decoder counted in."""
    return len(key[1].timesteps) - 1 + DECODER_CALLS


class GeneratorService:
    """What a replica of the generator does."""

    def __init__(
        self,
        arguments: Arguments,
        memory: Memory,
        recorder: Recorder,
        load: Callable[[str, Arguments], Loaded] = load_model,
        first_retry_seconds: float = FIRST_RETRY_SECONDS,
        announce: Callable[[Source, str], None] = announce,
        is_asked_for: Callable[[dict[str, Any] | None], bool] = lambda user_config: True,
    ) -> None:
        """is_asked_for: whether a user_config is what the cluster asks for by now. It may block, and raise."""
        self._arguments = arguments
        self._settings = arguments
        self._memory = memory
        self._recorder = recorder
        self._load = load
        self._announce = announce
        self._is_asked_for = is_asked_for
        self._first_retry_seconds = first_retry_seconds
        self._loaded: Loaded | None = None
        self._asked_at = 0.0  # when the model of the settings was last asked for, as far as is known
        self._asking: asyncio.Task | None = None
        # What the memory has not taken yet, being slow or away, and the task that tells it again.
        self._not_remembered: tuple[str, float] | None = None
        self._reminder: asyncio.Task | None = None
        self._setting_problem: str | None = None
        self._model_problem: str | None = None
        self._change: asyncio.Task | None = None
        self._changing_to: str | None = None
        self._failed_in_a_row = 0
        # One thread, which computes; loading has others, so that the old model serves meanwhile.
        self._computing = ThreadPoolExecutor(1, "generate", torch.set_num_threads, (arguments.cpu_threads,))
        self._batcher: Batcher[Row, np.ndarray] = Batcher(
            self._run, self._limits(), cost=row_cost, on_batch=self._on_batch
        )

    def _limits(self) -> BatchLimits:
        settings = self._settings
        return BatchLimits(settings.max_batch_size, settings.batch_wait_seconds, settings.max_queued_images)

    @property
    def problem(self) -> str | None:
        """Why something that was asked for is not in use; None where everything is."""
        return "; ".join(filter(None, (self._setting_problem, self._model_problem))) or None

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Takes the settings at once; another model is loaded beside the one that serves, and takes its place when warm.

        Only where no model serves yet is the loading awaited: the wanted one, else the last that served here, else that
        of the application's arguments. Raises ValueError where none of them can be had. Nothing else raises: Serve would
        stop the replica, whose successor would fail alike.
        """
        asked_at = time.time()
        if self._asking is not None:
            self._asking.cancel()  # what is told now is the newest
        try:
            self._settings = with_settings(self._arguments, user_config, GENERATOR_SETTINGS)
            self._setting_problem = None
            self._asked_at = asked_at
        except (ValidationError, ValueError) as error:
            self._setting_problem = f"settings refused, the earlier ones stay: {error}"
            logger.error(self._setting_problem)
        self._batcher.limits = self._limits()
        self._report_problem()
        if self._change is not None and self._changing_to == self._settings.model:
            return  # other settings; what is being loaded goes on
        if self._change is not None:
            self._change.cancel()
            self._change = None
            self._model_problem = None  # of a model that is not asked for any more
        if self._loaded is None:
            is_newest = await self._is_newest(user_config)
            if not is_newest:
                logger.info("the user_config that this replica starts with is not known to be the newest")
                self._asked_at = 0.0
            await self._begin()
            if is_newest is None and self._setting_problem is None:
                self._asking = asyncio.create_task(self._ask_again(user_config))
        assert self._loaded is not None
        if self._loaded.model != self._settings.model:
            self._changing_to = self._settings.model
            self._change = asyncio.create_task(self._change_model(self._settings.model))
        elif self._setting_problem is not None:
            self._changing_to = None
            self._change = asyncio.create_task(self._keep_up())
        else:  # also where another model is taken back, which others may have remembered
            await self._remember(self._loaded.model, self._asked_at)
        self._report_problem()

    async def _is_newest(self, user_config: dict[str, Any] | None) -> bool | None:
        """Whether what a starting replica was given is what is asked for by now; None where that cannot be learnt.

        Serve tells a replica that starts nothing of a change until it has started: what it was given may be minutes old.
        """
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._is_asked_for, user_config), ASKING_SECONDS)
        except Exception:
            logger.exception("cannot learn which user_config is asked for by now")
            return None

    async def _ask_again(self, user_config: dict[str, Any] | None) -> None:
        """Learns later, and until another is told, whether what this replica started with is what is asked for."""
        assert self._loaded is not None
        is_newest, pause = None, self._first_retry_seconds
        while is_newest is None:
            await asyncio.sleep(pause)
            pause = min(2.0 * pause, LAST_RETRY_SECONDS)
            asked_at = time.time()
            is_newest = await self._is_newest(user_config)
        if is_newest:
            self._asked_at = asked_at
            if self._loaded.model == self._settings.model:
                await self._remember(self._loaded.model, asked_at)

    async def _begin(self) -> None:
        """The first model of this replica."""
        last = await self._recall()
        # Where settings are refused, what is wanted is not known, and the replicas beside this one serve the last good model.
        wanted = self._settings.model if self._setting_problem is None else last
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
        if self._loaded is None:
            raise ValueError("; ".join(problems))
        if self._setting_problem is not None:
            self._settings = self._settings.model_copy(update={"model": self._loaded.model})
        elif self._loaded.model != wanted:
            self._model_problem = f"{problems[0]}; {self._loaded.model} serves in its place"

    async def _change_model(self, wanted: str) -> None:
        """Loads another model, as often as it takes: what failed for a while (a tracking server) comes by itself."""
        assert self._loaded is not None
        pause = self._first_retry_seconds
        while True:
            try:
                loaded = await self._load_in_thread(wanted)
                break
            except Exception as error:
                logger.exception("cannot serve %s; trying again in %.0f s", wanted, pause)
                refused = f"cannot serve {wanted}: {error}"
            # Behind the handler: the error's traceback keeps alive what was loaded, and the device's memory with it.
            self._model_problem = f"{refused}; {self._loaded.model} serves on"
            self._report_problem()
            await self._follow_the_others(wanted)
            self._model_problem = f"{refused}; {self._loaded.model} serves on"
            self._report_problem()
            await asyncio.sleep(pause)
            pause = min(2.0 * pause, LAST_RETRY_SECONDS)
        self._take(loaded)
        self._change = None
        self._model_problem = None
        self._report_problem()
        await self._remember(wanted, self._asked_at)

    async def _keep_up(self) -> None:
        """Serves the last good model for as long as settings are refused: which one is wanted is not known.

        Others may have been told of a model that this replica was not.
        """
        assert self._loaded is not None
        pause = self._first_retry_seconds
        while True:
            await self._follow_the_others()
            self._settings = self._settings.model_copy(update={"model": self._loaded.model})
            await asyncio.sleep(pause)
            pause = min(2.0 * pause, LAST_RETRY_SECONDS)

    async def _follow_the_others(self, wanted: str | None = None) -> None:
        """Loads the last good model where it is not the one that serves here. wanted: one that cannot be loaded.

        Told of a bad model while it still loaded the good one before it, a replica would serve an even older one for
        ever, beside others that are further.
        """
        assert self._loaded is not None
        if self._not_remembered is not None:
            await self._remember(*self._not_remembered)
            if self._not_remembered is not None:  # what the memory has may be older than what serves here
                return
        last = await self._recall()
        if last is None or last in (wanted, self._loaded.model):
            return
        try:
            self._take(await self._load_in_thread(last))
        except Exception:
            logger.exception("cannot serve %s, the last good model, either", last)

    def _take(self, loaded: Loaded) -> None:
        """Another model serves from now on."""
        if self._loaded is not None:
            # Two models were there while this one warmed up; from now on it has the device to itself.
            loaded.engine.largest_that_fits = None
        self._loaded = loaded
        logger.info("%s serves now", loaded.model)
        # A thread that nobody waits for: a tracking server that is away holds up neither requests nor the next model.
        threading.Thread(target=self._tell, args=(loaded.card,), daemon=True).start()

    def _tell(self, card: ModelCard) -> None:
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
        pause = self._first_retry_seconds
        while self._not_remembered is not None:
            await asyncio.sleep(pause)
            pause = min(2.0 * pause, LAST_RETRY_SECONDS)
            if self._not_remembered is not None:
                await self._remember(*self._not_remembered)

    async def _load_in_thread(self, model: str) -> Loaded:
        settings = self._settings

        def load() -> Loaded:
            torch.set_num_threads(settings.cpu_threads)
            return self._load(model, settings)

        # A thread of its own: one that hangs at a server that does not answer must not stand in the way of the next.
        thread = ThreadPoolExecutor(1, "load")
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, load)
        finally:
            thread.shutdown(wait=False)

    def check_health(self) -> None:
        """Raises RuntimeError where no model serves, or batch after batch fails, as after a fault of the device.

        Only a new process heals either.
        """
        if self._loaded is None:
            raise RuntimeError("no model is loaded")
        if self._failed_in_a_row >= FAILURES_OF_THE_SICK:
            raise RuntimeError(f"the last {self._failed_in_a_row} batches failed")

    def _report_problem(self) -> None:
        self._recorder.record("meanflow_model_refused", float(self.problem is not None))

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
        self._failed_in_a_row = 0
        self._recorder.record("meanflow_out_of_memory_total", engine.num_out_of_memory - before)
        self._recorder.record("meanflow_model_seconds", times.model_seconds)
        self._recorder.record("meanflow_decode_seconds", times.decode_seconds)
        return list(images), times

    def _on_batch(self, report: BatchReport) -> None:
        self._recorder.record("meanflow_batch_rows", report.rows)
        self._recorder.record("meanflow_images_total", report.rows)
        for seconds in report.queue_wait_seconds:
            self._recorder.record("meanflow_queue_wait_seconds", seconds)
        self._recorder.record("meanflow_queued_images", self._batcher.num_queued)

    def _check(self, order: Order, loaded: Loaded) -> int | Refusal:
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

    async def generate(self, order: Order) -> Made | Refusal:
        """The images of an order, or why there are none."""
        loaded = self._loaded
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
        return Made(
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

    async def describe(self) -> tuple[ModelCard | None, str | None]:
        """The model that serves, and what is wrong."""
        return (None if self._loaded is None else self._loaded.card), self.problem

    async def list_classes(self) -> list[ClassEntry]:
        """The classes, by id."""
        return [] if self._loaded is None else self._loaded.classes
