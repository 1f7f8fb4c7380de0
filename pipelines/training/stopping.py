"""Stop requests and preemption notices, delivered to all workers after the same step.

SIGTERM (`ray job stop`) or Ctrl-C reaches the driver, which forwards it to an actor; rank 0 polls that actor once a second.
Preemption notices come from Ray through a collective call. All workers must react after the same step, or they deadlock.
Therefore rank 0 broadcasts the signals about five times a second. The broadcast is asynchronous: it starts after one step
and is read after a later one, the same on every worker, so that it overlaps with computation.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import distributed

from pipelines.cluster import WAITING_SECONDS
from pipelines.errors import InputError

logger = logging.getLogger(__name__)

NAMESPACE = "meanflow-ray"  # Ray namespace of the actors
STOP_POLL_SECONDS = 1.0
BROADCAST_SECONDS = 0.2  # approximate time between two broadcasts of the signals
MAX_STEPS_PER_BROADCAST = 20  # bounds the delay when steps become slower
PREEMPTION_POLL_SECONDS = 5.0  # Ray's own interval
ACKNOWLEDGE_SECONDS = 10.0  # if no worker acknowledges a request within this time, none is running
ACTOR_EXIT_SECONDS = 30.0  # time within which Ray ends the actor of a killed driver


class StopRequest:
    """Actor that holds the driver's request to stop. It ends with the driver's job."""

    def __init__(self) -> None:
        self._is_requested = self._is_acknowledged = self._has_worker = False

    def request(self) -> None:
        """Requests that the workers save a checkpoint and stop."""
        self._is_requested = True

    def poll(self) -> bool:
        """Returns whether to stop. Only rank 0 calls this; the call acknowledges a request."""
        self._has_worker = True
        self._is_acknowledged = self._is_requested
        return self._is_requested

    def is_acknowledged(self) -> bool:
        """Whether rank 0 has seen the request."""
        return self._is_acknowledged

    def has_worker(self) -> bool:
        """Whether rank 0 has started."""
        return self._has_worker


def claim_run(run_location: str) -> ActorHandle:
    """Creates the run's stop-request actor. Its unique name is also a lock: a second job cannot train the run.

    The actor is pinned to the driver's node, so it lives as long as the driver. Raises InputError if another job of
    this cluster trains the run, because both would write the same checkpoints.
    """
    deadline = time.monotonic() + ACTOR_EXIT_SECONDS
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=this_node)(StopRequest)
    has_logged = False
    while True:
        try:
            return actor.options(name=_actor_name(run_location), namespace=NAMESPACE).remote()
        except ValueError as error:
            if not has_logged:
                logger.info("waiting for another job of this cluster to release %s", run_location)
                has_logged = True
            if time.monotonic() > deadline:
                raise InputError(
                    f"another job of this cluster is training {run_location}; wait for its end, or stop it with "
                    f"`ray job stop`"
                ) from error
            time.sleep(0.5)


def request_stop(run_location: str) -> None:
    """Requests that the workers of a run save a checkpoint and stop. Does nothing if no job of this cluster trains it."""
    with contextlib.suppress(ValueError, RayError):
        ray.get(ray.get_actor(_actor_name(run_location), namespace=NAMESPACE).request.remote())


def _actor_name(run_location: str) -> str:
    return f"training {run_location}"


@contextlib.contextmanager
def stop_on_signals(stop_request: ActorHandle) -> Iterator[list[int]]:
    """Turns SIGTERM, or Ctrl-C, into a stop request. Yields the signals received.

    A second signal, or a request that no worker acknowledges, ends the process: with SystemExit, or KeyboardInterrupt.
    """
    signals: list[int] = []
    received, finished = threading.Event(), threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        signals.append(number)
        if received.is_set():
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        received.set()

    def forward_request() -> None:
        received.wait()
        if finished.is_set():
            return
        logger.warning(
            "stop requested: saving a checkpoint first (a second Ctrl-C or signal ends at once, without one)"
        )
        deadline = time.monotonic() + ACKNOWLEDGE_SECONDS
        while time.monotonic() < deadline and not finished.wait(0.2):
            with contextlib.suppress(RayError):  # a failed call is retried
                ray.get(stop_request.request.remote())
                if ray.get(stop_request.is_acknowledged.remote()):
                    return
        if not finished.is_set():
            logger.warning("no worker was running: stopped without a new checkpoint")
            os.kill(os.getpid(), signals[0])

    forwarder = threading.Thread(target=forward_request, daemon=True)
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    forwarder.start()
    try:
        yield signals
    finally:
        finished.set()
        received.set()
        forwarder.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def fit_in_thread(
    trainer: TorchTrainer, stop_request: ActorHandle, describe_waiting: Callable[[], str]
) -> ray.train.Result:
    """`trainer.fit()` in another thread. In the main thread, Ray would handle Ctrl-C itself: by ending all workers.

    Until rank 0 has started, logs `describe_waiting()` every WAITING_SECONDS.
    """
    result: Future[ray.train.Result] = Future()

    def fit() -> None:
        try:
            result.set_result(trainer.fit())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    has_worker = False
    while not wait([result], timeout=None if has_worker else WAITING_SECONDS).done:
        with contextlib.suppress(RayError):
            has_worker = ray.get(stop_request.has_worker.remote())
            if not has_worker:
                logger.warning(describe_waiting())
    return result.result()


@dataclass(frozen=True)
class Signals:
    """Signals after a step, the same on all workers."""

    stop_requested: bool = False
    """The driver requested a stop."""
    preemption_announced: bool = False
    """Ray announced a new preemption of a node."""


class SignalMonitor:
    """Delivers stop requests and preemption notices to all workers after the same step. Call `poll` once per step."""

    def __init__(self, stop_request: ActorHandle, rank: int) -> None:
        _choose_gloo_interface()
        self._group = distributed.new_group(backend="gloo")
        # [stop requested, query Ray for preemptions, number of steps between the next two broadcasts]
        self._message = torch.zeros(3, dtype=torch.int32)
        self._broadcast: distributed.Work | None = None
        self._num_steps = self._num_steps_left = 1  # from the last broadcast to the next; how many of them are left
        self._last_broadcast = time.monotonic()
        self._known_preemption: object = None
        self._stop_requested = threading.Event()
        self._closed = threading.Event()
        self._next_preemption_poll = time.monotonic() + PREEMPTION_POLL_SECONDS
        self._is_rank_0 = rank == 0
        if self._is_rank_0:
            threading.Thread(target=self._poll_stop_request, args=(stop_request,), daemon=True).start()

    def poll(self) -> Signals:
        """Returns new signals, after the same step on every worker."""
        self._num_steps_left -= 1
        if self._num_steps_left > 0:
            return Signals()
        stop_requested, polls_preemption, num_steps = False, False, 1
        if self._broadcast is not None:
            self._broadcast.wait()
            stop_requested, polls_preemption, num_steps = (
                bool(self._message[0]),
                bool(self._message[1]),
                int(self._message[2]),
            )
        if self._is_rank_0:
            self._write_message()
        self._num_steps = self._num_steps_left = num_steps
        self._broadcast = distributed.broadcast(self._message, src=0, group=self._group, async_op=True)
        return Signals(stop_requested, polls_preemption and self._has_new_preemption())

    def _write_message(self) -> None:
        now = time.monotonic()
        step_seconds = max(now - self._last_broadcast, 1e-3) / self._num_steps
        self._last_broadcast = now
        polls_preemption = now >= self._next_preemption_poll
        if polls_preemption:
            self._next_preemption_poll = now + PREEMPTION_POLL_SECONDS
        num_steps = min(max(1, int(BROADCAST_SECONDS / step_seconds)), MAX_STEPS_PER_BROADCAST)
        self._message.copy_(torch.tensor([self._stop_requested.is_set(), polls_preemption, num_steps]))

    def close(self) -> None:
        """Waits for the last broadcast; every worker must call it."""
        self._closed.set()
        if self._broadcast is not None:
            self._broadcast.wait()

    def _poll_stop_request(self, stop_request: ActorHandle) -> None:
        while True:  # first at once: the request may have come while the workers started
            with contextlib.suppress(RayError):  # a failed call is retried
                if ray.get(stop_request.poll.remote()):
                    self._stop_requested.set()
                    return
            if self._closed.wait(STOP_POLL_SECONDS):
                return

    def _has_new_preemption(self) -> bool:
        preemption = ray.train.get_preemption_info()  # collective
        is_new = preemption is not None and preemption != self._known_preemption
        self._known_preemption = preemption
        return is_new


def _choose_gloo_interface() -> None:
    """Makes Gloo use Ray's network interface. Its default is the host name's address, which on Debian is the loopback."""
    own_address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own_address for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return
