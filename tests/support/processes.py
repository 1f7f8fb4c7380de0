"""Runs several torch.distributed processes on this machine, connected by gloo."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed


def join_group(rank: int, world_size: int, rendezvous: str, timeout_seconds: float) -> None:
    """Limits this process to one thread and joins the process group; `rendezvous` is the path of a file.

    A collective that some process never joins fails after the timeout.
    """
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )


def run_processes(function: Callable, arguments: tuple, num_processes: int, timeout_seconds: float) -> None:
    """Runs function(rank, *arguments) in `num_processes` processes. Fails if one of them fails or exceeds the timeout."""
    # The fork server imports these once: importing them in every process would take seconds of CPU time.
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["meanflow_core.checkpoint", "meanflow_core.sharding", "torch.nn.parallel", "pytest"]
    )
    context = torch.multiprocessing.start_processes(
        function, arguments, nprocs=num_processes, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + timeout_seconds
    try:
        while not context.join(timeout=1.0):
            assert time.monotonic() < deadline, (
                "the processes did not finish; did one of them make fewer collective calls?"
            )
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in context.processes] == [0] * num_processes
