"""Joining or starting a Ray cluster, and choosing its devices."""

import logging
import os
from typing import Literal

from pipelines.errors import InputError

Device = Literal["auto", "gpu", "cpu"]
# By default glibc returns large temporaries to the system and faults them in again at every step: CPU training is then
# 3 to 10 times slower.
FAST_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",  # the thresholds hold in the first arena alone; Ray calls workers' code from other threads
}


def _quieten_worker() -> None:
    # Without a dashboard, Ray Train's placement group cleaner cannot ask about its controller, and says so every second.
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)


def start_ray(needed_cpus: int) -> None:
    """Joins the cluster that a job runs in, else starts one on this machine with at least `needed_cpus` logical CPUs.

    Logical CPUs may exceed the cores of a laptop: they schedule, they do not compute.
    """
    import ray  # not at the top: --help must be quick

    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=True)
    else:
        # "local" and not the nearest cluster that happens to run: a laptop's job must not land in somebody's session.
        cpus = max(os.cpu_count() or 1, needed_cpus)
        environment = {"worker_process_setup_hook": _quieten_worker, "env_vars": FAST_MALLOC}
        ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=True, runtime_env=environment)


def choose_gpus(device: Device, num_processes: int = 1) -> bool:
    """Whether to compute on GPUs. "auto" takes GPUs where the cluster in use has some now.

    Raises InputError where a machine's own GPUs are fewer than the processes that want one each. A cluster may grow:
    there Ray waits for the machines.
    """
    available = num_gpus()
    use_gpus = available > 0 if device == "auto" else device == "gpu"
    if use_gpus and "RAY_ADDRESS" not in os.environ and num_processes > available:
        raise InputError(
            f"{num_processes} processes want a GPU each, but this machine has {available} that torch can use"
        )
    return use_gpus


def num_gpus() -> int:
    """GPUs of the cluster in use; of this machine, only those that its torch can use."""
    import ray
    import torch  # not at the top: tasks that need no torch start in 1 s instead of 10 s

    available = int(ray.cluster_resources().get("GPU", 0))
    return available if "RAY_ADDRESS" in os.environ else min(available, torch.cuda.device_count())
