"""Compares `pipelines.plan` with steps measured on this machine.

    python tests/benchmarks/plan.py --json plan.json

The planner gets the measured rate of one preset's steps as --teraflops and predicts the step times of other presets, which
are measured in turns. For two processes over gloo, it gets the measured rates of one process alone and of an all-reduce.
A DDP step must take at least the longer of compute and communication, and at most their sum.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from _harness import interleaved_medians, main
from step import CHANNELS, CLASSES, IDENTITY, SIZE, fresh_state, make_batch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from meanflow_core.config import TrainingConfig
from meanflow_core.presets import PRESETS
from meanflow_core.training import train_step
from pipelines.plan.cost import step_flops
from pipelines.plan.estimate import compute_seconds, gradient_bytes, payload_bytes, ring_seconds
from pipelines.plan.hardware import Cluster
from pipelines.plan.job import Workload

CALIBRATION = ("s4", 32)
# (preset, images per step): a larger network, more tokens, a step without du/dt, and another architecture.
PREDICTED = (("b4", 8), ("s2", 8), ("fm_b4", 8), ("imf_b2", 2))
OF_TWO = ("s4", 8)


def workload(preset: str, rows: int) -> Workload:
    """A preset at another batch size, on latents of ImageNet's shape."""
    return Workload(
        config=replace(PRESETS[preset](), global_batch_size=rows),
        latent_shape=(CHANNELS, SIZE, SIZE),
        classes=CLASSES,
    )


def cluster(teraflops: float, link_gbyte: float = 1.0, processes: int = 1) -> Cluster:
    """This machine as a node; with a measured rate, the GPU's data sheet is unused."""
    return Cluster(gpus_per_node=processes, teraflops=teraflops, link_gbyte=link_gbyte)


def stepper(config: TrainingConfig, rows: int, *, in_group: bool = False) -> Callable[[], object]:
    """A function that takes one step with new draws; in a group, of this process's samples, with averaged gradients."""
    state = fresh_state(config, "cpu")
    training_network = state.network
    if in_group:
        training_network = DistributedDataParallel(
            state.network, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    batches = [make_batch(config.loss, rows, "cpu", step) for step in range(8)]

    def step() -> None:
        train_step(state, training_network, [batches[state.step % len(batches)]], IDENTITY, config)

    return step


def measure_steps(rounds: int) -> dict[str, float]:
    """Predicted over measured seconds per step, in one process with all threads."""
    steps = {name: stepper(workload(name, rows).config, rows) for name, rows in (CALIBRATION, *PREDICTED)}
    seconds = interleaved_medians(steps, rounds, warmup=1)
    known = workload(*CALIBRATION)
    rate = step_flops(known.config, **known.sizes) / seconds[CALIBRATION[0]] / 1e12
    figures = {f"{CALIBRATION[0]}_gigaflops_per_second": 1e3 * rate}
    for name, rows in PREDICTED:
        predicted = compute_seconds(workload(name, rows), cluster(rate), 1)
        figures[f"{name}_step_seconds"] = seconds[name]
        figures[f"{name}_predicted_over_measured"] = predicted / seconds[name]
    return figures


def work_in_group(rank: int, folder: str, rounds: int) -> None:
    """Runs one of two processes: times its share of a step alone, an all-reduce, and the whole step."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    name, rows = OF_TWO
    whole = workload(name, rows)
    gradient = torch.zeros(gradient_bytes(whole) // 4)
    functions = {
        "alone": stepper(whole.config, rows // 2),
        "all_reduce": lambda: distributed.all_reduce(gradient),
        "together": stepper(whole.config, rows // 2, in_group=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(2 + rounds):
        for key, function in functions.items():
            distributed.barrier()
            began = time.perf_counter()
            function()
            distributed.barrier()  # a step ends when both processes have finished
            if number >= 2:  # DDP rebuilds its buckets after the first step
                seconds[key].append(time.perf_counter() - began)
    if rank == 0:
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        Path(folder, "seconds.json").write_text(json.dumps(medians))
    distributed.barrier()
    distributed.destroy_process_group()


def measure_group(rounds: int) -> dict[str, float]:
    """Measured DDP step of two processes over the planner's lower and upper bound."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work_in_group, (folder, rounds), nprocs=2)
        seconds = json.loads(Path(folder, "seconds.json").read_text())
    name, rows = OF_TWO
    whole = workload(name, rows)
    flops_of_each = step_flops(replace(whole.config, global_batch_size=rows // 2), **whole.sizes)
    payload = payload_bytes(whole, 1)
    pair = cluster(flops_of_each / seconds["alone"] / 1e12, payload / 2 / seconds["all_reduce"] / 1e9, 2)
    compute, sent = compute_seconds(whole, pair, 2), ring_seconds(payload / 2, pair, 2)
    return {
        "two_processes_compute_seconds": compute,
        "two_processes_communication_seconds": sent,
        "two_processes_step_seconds": seconds["together"],
        "two_processes_step_over_longer": seconds["together"] / max(compute, sent),
        "two_processes_step_over_sum": seconds["together"] / (compute + sent),
    }


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """All figures."""
    return measure_steps(arguments.rounds) | measure_group(arguments.rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each kind, interleaved")
    main(
        measure,
        {
            **{f"{name}_predicted_over_measured": (">=", 0.6) for name, _ in PREDICTED},
            "two_processes_step_over_longer": (">=", 0.9),
            "two_processes_step_over_sum": ("<=", 1.1),
        },
        parser,
    )
