"""Connects to a Ray cluster or starts one, chooses the device, and finds why a training failed."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipelines.errors import InputError
from pipelines.private_interfaces import CLEANER_LOGGER, CLEANER_THREAD, TOKEN_LOGGER, original_error

if TYPE_CHECKING:
    from ray.train import TrainingFailedError

logger = logging.getLogger(__name__)

WAITING_SECONDS = 30.0  # workers usually start within this time

Device = Literal["auto", "gpu", "cpu"]
# By default, glibc returns the memory of large temporary tensors to the system. The page faults of allocating it again at
# every step make CPU training 3 to 10 times slower.
FAST_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",  # the thresholds apply to the first arena only, and Ray runs tasks in other threads
}


def start_ray(needed_cpus: int) -> None:
    """Connects to the cluster of the submitted job, or starts one on this machine.

    needed_cpus: Minimum number of Ray's logical CPUs. They only limit scheduling, and may exceed this machine's cores.
    """
    import ray  # imported here to keep --help fast

    if ray.is_initialized():
        return
    options = {"log_to_driver": True, "logging_level": logging.WARNING}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**options)
    else:
        # "local" ignores other clusters that happen to run on this machine.
        cpus = max(os.cpu_count() or 1, needed_cpus)
        logger.info("starting a local Ray cluster with %d CPU slots", cpus)
        logging.getLogger(TOKEN_LOGGER).setLevel(logging.ERROR)
        # A copy, because ray.init adds the hook to env_vars and refuses variables that already contain it.
        environment = {"worker_process_setup_hook": _prepare_worker, "env_vars": dict(FAST_MALLOC)}
        ray.init("local", num_cpus=cpus, include_dashboard=False, runtime_env=environment, **options)


def _prepare_worker() -> None:
    """Runs first in every worker of a local cluster.

    Afterwards Ray puts the driver's current folder first on the path. A folder of the user there cannot hide what is imported
    now: this package and the core.
    """
    import meanflow_core  # noqa: F401

    # Ray Train's placement group cleaner needs a dashboard. Without one it warns every second, and if other clusters run on
    # this machine, its thread ends with a traceback. Both are harmless: a local cluster ends with its driver.
    logging.getLogger(CLEANER_LOGGER).setLevel(logging.ERROR)
    report = threading.excepthook

    def report_others(error: threading.ExceptHookArgs) -> None:
        if error.thread is None or error.thread.name != CLEANER_THREAD:
            report(error)

    threading.excepthook = report_others


def describe_waiting(num_workers: int, *, use_gpu: bool) -> str:
    """What workers that have not started need, and what the cluster has of it."""
    import ray

    kind = "GPU" if use_gpu else "CPU"
    free, total = ray.available_resources().get(kind, 0), ray.cluster_resources().get(kind, 0)
    if "RAY_ADDRESS" not in os.environ and total >= num_workers:  # this job has the cluster to itself
        return f"{num_workers} workers are starting"
    return (
        f"{num_workers} workers have not started yet. They need {num_workers} {kind}s; the cluster has {total:g}, of which "
        f"{free:g} are free"
    )


def map_on_cluster(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Like the builtin `map`, with one task per item on the cluster. Raises the exception of a failed task."""
    import ray

    # Half a CPU, since tasks that read images wait for storage half of the time.
    task = ray.remote(num_cpus=0.5)(lambda item: function(item))
    references = deque([task.remote(item) for item in items])
    while references:
        try:
            yield ray.get(references.popleft())  # not kept: its result is deleted
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


def choose_gpus(device: Device, num_processes: int = 1) -> bool:
    """Whether to compute on GPUs. "auto" uses GPUs if the cluster has any now.

    Raises InputError if this machine has fewer GPUs than `num_processes`. On a cluster, Ray waits for more machines
    instead.
    """
    available = num_gpus()
    use_gpus = available > 0 if device == "auto" else device == "gpu"
    if use_gpus and "RAY_ADDRESS" not in os.environ and num_processes > available:
        raise InputError(
            f"{num_processes} processes need one GPU each, but torch can use {available} on this machine; "
            f"reduce --num-workers, or use --device cpu"
        )
    return use_gpus


def num_gpus() -> int:
    """The number of GPUs in the cluster. Without a cluster, those of this machine that torch can use."""
    import ray
    import torch  # imported here: tasks without torch start in 1 s instead of 10 s

    available = int(ray.cluster_resources().get("GPU", 0))
    return available if "RAY_ADDRESS" in os.environ else min(available, torch.cuda.device_count())


@dataclass(frozen=True)
class Cause:
    """Why training failed."""

    error: BaseException
    """The original error."""
    rank: int | None
    """The worker that raised it; None for Ray's controller."""


def first_cause(error: "TrainingFailedError") -> Cause:
    """Finds the error that made training fail, ignoring the connection errors that it caused on other workers."""
    from ray.exceptions import RayError  # imported here to keep --help fast

    failures = getattr(error, "worker_failures", None)
    if not failures:
        return Cause(getattr(error, "controller_failure", error), None)
    causes = [Cause(original_error(failure), rank) for rank, failure in failures.items()]
    consequences = ("connection", "nccl", "gloo", "timed out")
    original = [
        cause
        for cause in causes
        if isinstance(cause.error, RayError) or not any(word in str(cause.error).lower() for word in consequences)
    ]
    return (original or causes)[0]
