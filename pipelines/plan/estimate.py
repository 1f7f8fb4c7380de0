"""Memory, time and traffic of a training run, from counted operations and assumed rates. Nothing is measured here.

# W number of GPUs
"""

from bisect import bisect_right
from dataclasses import dataclass
from math import ceil

from meanflow_core.training import num_passes
from pipelines.plan.cost import (
    FLOAT32_BYTES,
    MemoryEstimate,
    executed_flops,
    memory_estimate,
    num_network_calls,
    num_parameters,
    step_flops,
)
from pipelines.plan.hardware import Cluster
from pipelines.plan.job import Workload


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A training run on W GPUs."""

    num_gpus: int
    num_nodes: int
    largest_micro_batch: int
    """Largest micro-batch that fits the memory of a GPU."""
    micro_batch_size: int
    """Largest micro-batch of the run; it may not fit if samples_per_pass was given."""
    compute_seconds: float
    """Compute time of a step."""
    gpu_bytes: float
    """Bytes that each GPU sends in a step: (W - 1) / W of the payload. Each node of a ring sends as many to the next."""
    communication_seconds: float
    """Communication time of a step over the slowest link, without latencies."""

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Time of a step: with communication fully overlapped by compute, and without overlap."""
        return max(self.compute_seconds, self.communication_seconds), self.compute_seconds + self.communication_seconds

    @property
    def hiding_gbit(self) -> float:
        """Network rate in Gbit/s at which communication takes as long as compute."""
        return 8e-9 * self.gpu_bytes / self.compute_seconds


def gradient_bytes(workload: Workload) -> int:
    """Bytes of the gradient, and also of the parameters: both are float32 at any precision."""
    return FLOAT32_BYTES * num_parameters(workload.config.network, **workload.sizes)


def largest_pass(batch: int, num_workers: int, samples_per_pass: int) -> int:
    """Size of the largest micro-batch on the worker with the most samples."""
    return ceil(ceil(batch / num_workers) / num_passes(batch, num_workers, samples_per_pass))


def seconds_of_flops(flops: float, batch: int, num_workers: int, teraflops: float) -> float:
    """Seconds of a step. All workers wait for the one with the most samples."""
    return flops * ceil(batch / num_workers) / batch / (teraflops * 1e12)


def compute_seconds(workload: Workload, cluster: Cluster, num_gpus: int) -> float:
    """Seconds of a step without communication.

    A measured rate counts model FLOPs and so includes all other work; assumed rates apply to executed FLOPs.
    """
    config, batch = workload.config, workload.config.global_batch_size
    if cluster.teraflops is not None:
        return seconds_of_flops(step_flops(config, **workload.sizes), batch, num_gpus, cluster.teraflops)
    executed = executed_flops(config, **workload.sizes)
    return sum(
        seconds_of_flops(flops, batch, num_gpus, cluster.sustained_teraflops(precision))
        for flops, precision in (
            (executed.in_precision, config.precision),
            (executed.of_derivative, config.derivative_precision),
        )
    )


def payload_bytes(workload: Workload, passes: int) -> float:
    """Payload of all collectives of a step, in bytes; each GPU sends (W - 1) / W of it.

    DDP reduce-scatters and all-gathers the gradient once. In every pass, FSDP2 all-gathers the parameters for each network
    call (extra velocities, a separate du/dt, the training forward) and for backward, and reduce-scatters the gradient.
    """
    if workload.parallelism == "ddp":
        return 2.0 * gradient_bytes(workload)
    calls = num_network_calls(workload.config, **workload.sizes)
    return float(passes * (calls + 2) * gradient_bytes(workload))


def ring_seconds(gpu_bytes: float, cluster: Cluster, num_gpus: int) -> float:
    """Seconds for each GPU to send these bytes to its neighbour in a ring, limited by the slowest link."""
    link, network = cluster.sustained_link_gbyte * 1e9, cluster.network_gbit * 1e9 / 8.0
    return gpu_bytes / (link if cluster.num_nodes(num_gpus) == 1 else min(link, network))


def memory_of(workload: Workload, rows: int, num_gpus: int) -> MemoryEstimate:
    """Memory of each of W GPUs with micro-batches of this many samples."""
    return memory_estimate(
        workload.config, **workload.sizes, samples_per_pass=rows, num_shards=workload.num_shards(num_gpus)
    )


def largest_micro_batch(workload: Workload, num_gpus: int, usable_bytes: float) -> int:
    """Largest micro-batch that fits in memory, up to a GPU's share of the batch; 0 if not even one sample fits."""
    share = ceil(workload.config.global_batch_size / num_gpus)

    def total(rows: int) -> int:
        return memory_of(workload, rows, num_gpus).total

    if total(share) <= usable_bytes:  # the usual case: the network is traced only once
        return share
    return bisect_right(range(1, share), usable_bytes, key=total)


def estimate(workload: Workload, cluster: Cluster, num_gpus: int) -> Estimate:
    """Estimates the training run on W GPUs.

    Raises ValueError if W does not fill whole nodes or exceeds the batch size, or if not even one sample fits on a GPU.
    """
    config, batch, usable = workload.config, workload.config.global_batch_size, cluster.data_sheet.usable_bytes
    num_nodes = cluster.num_nodes(num_gpus)
    if num_gpus > batch:
        raise ValueError(
            f"gpus must be at most global_batch_size = {batch} (one image per GPU), but got {num_gpus}; "
            f"use fewer GPUs, or a larger --global-batch-size (a different experiment)"
        )
    fitting = largest_micro_batch(workload, num_gpus, usable)
    if fitting == 0:
        remedies = [] if config.activation_checkpointing else ["--activation-checkpointing"]
        remedies += [] if workload.parallelism == "fsdp2" else ["--parallelism fsdp2 on several GPUs"]
        raise ValueError(
            f"one sample needs {memory_of(workload, 1, num_gpus).total / 1e9:.1f} GB, but {cluster.data_sheet.name} has "
            f"{usable / 1e9:.1f} GB available; use {', '.join([*remedies, 'a GPU with more memory, or a smaller network'])}"
        )
    rows = workload.samples_per_pass or fitting
    gpu_bytes = payload_bytes(workload, num_passes(batch, num_gpus, rows)) * (num_gpus - 1) / num_gpus
    return Estimate(
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        largest_micro_batch=fitting,
        micro_batch_size=largest_pass(batch, num_gpus, rows),
        compute_seconds=compute_seconds(workload, cluster, num_gpus),
        gpu_bytes=gpu_bytes,
        communication_seconds=ring_seconds(gpu_bytes, cluster, num_gpus),
    )
