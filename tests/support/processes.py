"""Several processes of torch.distributed on this machine, over gloo, for tests."""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed


def join_group(rank: int, world_size: int, meeting: str, grace_seconds: float) -> None:
    """Makes the calling process, with one thread, one of a group that meets at a file.

    A collective that another process never joins fails after the grace.
    """
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=grace_seconds),
    )


def run_processes(work: Callable, arguments: tuple, num_processes: int, patience_seconds: float) -> None:
    """Runs work(rank, *arguments) in so many processes; none may fail or outlast its time."""
    context = torch.multiprocessing.start_processes(
        work, arguments, nprocs=num_processes, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + patience_seconds
    try:
        while not context.join(timeout=1.0):
            assert time.monotonic() < deadline, "the processes wait for ever: has one made a call less?"
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in context.processes] == [0] * num_processes
