"""Runs a function in several torch.distributed processes on this machine, connected by gloo."""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def run_group(function: Callable, arguments: tuple, world_size: int, *, timeout_seconds: float) -> Any:
    """Runs function(rank, *arguments) in a group of processes with one thread each. Returns the results of rank 0.

    Fails if a process fails or all of them together exceed the timeout.
    """
    # The fork server imports these once: importing them in every process would take seconds of CPU time.
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["meanflow_core.checkpoint", "meanflow_core.sharding", "torch.nn.parallel", "pytest"]
    )
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.start_processes(
            _run, (function, arguments, world_size, folder), nprocs=world_size, join=False, start_method="forkserver"
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
        assert [process.exitcode for process in context.processes] == [0] * world_size
        return torch.load(Path(folder) / "results.pt")


def _run(rank: int, function: Callable, arguments: tuple, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),  # fails a collective call that some process never makes
    )
    results = function(rank, *arguments)
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    distributed.barrier()
    distributed.destroy_process_group()
