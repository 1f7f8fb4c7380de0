"""What all workers of a training must learn at the same step: that it shall stop, or that a machine will go away.

The driver is told to stop by a signal (`ray job stop` sends SIGTERM), and tells an actor; the first worker asks that
actor once a second. Machines that will be taken away are known to Ray, and Ray's answer is collective. Workers must
act on either after the same step, or wait for each other for ever: so each step begins a reduction of two numbers on
the side, whose result the next step reads. Nothing waits for it.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import distributed

from pipelines.errors import InputError

logger = logging.getLogger(__name__)

NAMESPACE = "meanflow-ray"
ASK_SECONDS = 1.0  # between two questions whether to stop
PREEMPTION_SECONDS = 5.0  # between two questions about machines; Ray itself looks every five
UNSEEN_SECONDS = 10.0  # a request to stop that no worker has seen by then: there are none to wait for
# How long a killed driver's actor may be seen after it.
GONE_SECONDS = 30.0


class StopRequest:
    """Whether a training shall stop, asked for by its driver. It goes with the driver's job."""

    def __init__(self) -> None:
        self._is_asked = self._is_seen = False

    def ask(self) -> None:
        """Asks the training to stop after a checkpoint."""
        self._is_asked = True

    def is_asked(self) -> bool:
        """For the first worker."""
        self._is_seen = self._is_asked
        return self._is_asked

    def is_seen(self) -> bool:
        """Whether the first worker knows."""
        return self._is_seen


def claim_run(run: str) -> ActorHandle:
    """The run's stop request, by which a cluster also knows that the run is being trained.

    It lives on the driver's machine, and so as long as the driver. Raises InputError where another job of this cluster
    trains the run: two would write each other's checkpoints.
    """
    deadline = time.monotonic() + GONE_SECONDS
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(StopRequest)
    says = True
    while True:
        try:
            return actor.options(name=f"training {run}", namespace=NAMESPACE).remote()
        except ValueError as error:
            if says:
                logger.info("waiting: %s is held by another job of this cluster, or was until now", run)
                says = False
            if time.monotonic() > deadline:
                raise InputError(
                    f"{run} is being trained by another job of this cluster; wait for it, or stop it (`ray job stop`)"
                ) from error
            time.sleep(0.5)  # a driver that was killed: its actors are a little later


@contextlib.contextmanager
def stop_on_sigterm(request: ActorHandle) -> Iterator[None]:
    """Inside, SIGTERM asks for a stop; a second one, or one that no worker is there to see, ends the process.

    Ctrl-C is Ray's inside: it ends the workers, and is a KeyboardInterrupt outside.
    """
    asked, done = threading.Event(), threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        if asked.is_set():
            raise SystemExit(128 + signal.SIGTERM)
        asked.set()

    def tell() -> None:
        asked.wait()
        if done.is_set():
            return
        logger.warning("asked to stop: a checkpoint comes first")
        deadline = time.monotonic() + UNSEEN_SECONDS
        while time.monotonic() < deadline and not done.wait(0.2):
            with contextlib.suppress(RayError):  # a call may be lost, and the next one arrive
                ray.get(request.ask.remote())
                if ray.get(request.is_seen.remote()):
                    return
        if done.is_set():
            return
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell, daemon=True)
    before, before_interrupt = signal.signal(signal.SIGTERM, on_signal), signal.getsignal(signal.SIGINT)
    teller.start()
    try:
        yield
    except SystemExit as error:
        if error.code == 0:  # Ray's answer to an interrupt
            raise KeyboardInterrupt from error
        raise
    finally:
        done.set()
        asked.set()
        teller.join()
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, before_interrupt)


def _name_interface() -> None:
    """Has gloo talk where Ray does, and not at whatever the host's name resolves to, on Debian the loopback."""
    own = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return


class Notices:
    """A worker's end: call `look` once a step, on every worker."""

    def __init__(self, request: ActorHandle | None, rank: int) -> None:
        _name_interface()
        self._group = distributed.new_group(backend="gloo")
        self._votes = torch.zeros(2, dtype=torch.int32)  # stop; ask about machines
        self._work: distributed.Work | None = None
        self._known: object = None
        self._stop_asked = threading.Event()
        self._closed = threading.Event()
        self._next_question = time.monotonic() + PREEMPTION_SECONDS
        self._is_first = rank == 0
        if self._is_first and request is not None:
            threading.Thread(target=self._listen, args=(request,), daemon=True).start()

    def _listen(self, request: ActorHandle) -> None:
        while not self._closed.wait(ASK_SECONDS):
            with contextlib.suppress(RayError):  # a call may be lost, and the next one arrive
                if ray.get(request.is_asked.remote()):
                    self._stop_asked.set()
                    return

    def look(self) -> tuple[bool, bool]:
        """(the run shall stop, a machine is newly to be taken away), the same on every worker after the same step."""
        shall_stop, asks = False, False
        if self._work is not None:
            self._work.wait()
            shall_stop, asks = bool(self._votes[0]), bool(self._votes[1])
        self._votes.zero_()
        if self._is_first:
            self._votes[0] = int(self._stop_asked.is_set())
            if time.monotonic() >= self._next_question:
                self._votes[1] = 1
                self._next_question = time.monotonic() + PREEMPTION_SECONDS
        self._work = distributed.all_reduce(self._votes, op=distributed.ReduceOp.MAX, group=self._group, async_op=True)
        return shall_stop, asks and self._is_news()

    def _is_news(self) -> bool:
        info = ray.train.get_preemption_info()
        is_news = info is not None and info != self._known
        self._known = info
        return is_news

    def close(self) -> None:
        """Ends the last reduction; every worker must call it."""
        self._closed.set()
        if self._work is not None:
            self._work.wait()
