"""Memory, time, traffic and cost of a training run, from counted operations and assumed rates.

Nothing is measured here. 1 GB is 10^9 bytes. A range spans two extremes: communication fully overlapped
with compute, and not overlapped at all.

    # W GPUs in all, G GPUs per node, N nodes
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from meanflow_core.config import TrainingConfig
from meanflow_core.draws import draw_step_record
from meanflow_core.training import num_passes
from pipelines.latents.manifest import NetworkSizes
from pipelines.plan.cost import (
    FLOAT32_BYTES,
    ExecutedFlops,
    MemoryEstimate,
    checkpoint_bytes,
    executed_flops,
    memory_estimate,
    num_parameters,
    step_flops,
)
from pipelines.plan.hardware import Cluster

MOMENT_BYTES = 2  # float16
OTHER_NUMBERS_OF_GPUS = (1, 8, 16, 32, 64)

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training run, independent of the machines it runs on.

    Raises ValueError for non-square latents and for counts below 1.
    """

    config: TrainingConfig
    num_images: int
    """Images of the training set."""
    latent_shape: tuple[int, int, int]
    """(C, H, W) with H = W."""
    num_classes: int
    mirrored: bool
    """Whether nodes also keep the latents of mirror images."""
    parallelism: Literal["ddp", "fsdp2"]
    samples_per_pass: int | None
    """Largest micro-batch of a GPU; None takes the largest that fits."""

    def __post_init__(self) -> None:
        _, height, width = self.latent_shape
        if height != width:
            raise ValueError(f"latents must be square, but got {height}x{width}")
        for name in ("num_images", "num_classes", "samples_per_pass"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but got {value}")

    @property
    def sizes(self) -> NetworkSizes:
        """The network's sizes that come from the data."""
        channels, size, _ = self.latent_shape
        return {"sample_size": size, "in_channels": channels, "num_classes": self.num_classes}

    @property
    def image_bytes(self) -> int:
        """Bytes of the moments of one image (or of its mirror image)."""
        channels, height, width = self.latent_shape
        return MOMENT_BYTES * 2 * channels * height * width

    @property
    def latent_bytes(self) -> int:
        """Bytes of all moments. Labels, ids and Arrow's framing add about 0.3 % for ImageNet."""
        return self.num_images * self.image_bytes * (1 + self.mirrored)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradient, and also of the parameters: both are float32 at any precision."""
        return FLOAT32_BYTES * num_parameters(self.config.network, **self.sizes)

    def num_shards(self, num_gpus: int) -> int:
        """Devices over which FSDP2 shards parameters, gradients, optimiser state and averages; 1 under DDP."""
        return num_gpus if self.parallelism == "fsdp2" else 1

    def with_epochs(self, epochs: float) -> "Workload":
        """The same workload for a number of epochs. A batch may span two epochs."""
        steps = max(1, round(epochs * self.num_images / self.config.global_batch_size))
        return replace(self, config=replace(self.config, num_steps=steps))


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """Time, traffic and cost of the training run on W GPUs."""

    num_gpus: int
    num_nodes: int
    micro_batch_size: int
    """Largest micro-batch of a GPU."""
    compute_seconds: float
    """Compute time of a step."""
    gpu_bytes: float
    """Bytes that each GPU sends in a step: (W - 1) / W of the payload. Each node of a ring sends as many to the next."""
    communication_seconds: float
    """Communication time of a step over the slowest link, without latencies."""
    step_seconds: Range
    """From the longer of compute and communication (full overlap) to their sum (no overlap)."""
    images_per_second: Range
    seconds: Range
    """Time of all steps, without sampling, checkpoints and restarts."""
    gpu_hours: Range
    cost: Range | None
    """In the currency of the price; None without a price."""
    efficiency: Range
    """Scaling efficiency: step time on one GPU / (W x step time on W GPUs); lowest first."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimates for the requested number of GPUs and for other numbers of GPUs."""

    workload: Workload
    cluster: Cluster
    flops: float
    """`step_flops`: model FLOPs of a step."""
    executed: ExecutedFlops
    """FLOPs that a step executes."""
    requested: TrainingEstimate
    memory: MemoryEstimate
    """Memory of each of the requested GPUs."""
    fits: bool
    largest_micro_batch: int
    """Largest micro-batch that fits the memory of a GPU."""
    trainings: tuple[TrainingEstimate, ...]
    """For the requested and the other numbers of GPUs, in ascending order."""
    left_out: tuple[int, ...]
    """Numbers of GPUs that exceed the batch size, or on which not even one sample fits in memory."""
    node_images_per_second: float
    """Highest rate at which a node reads from its copy of the latents, in images per second."""
    copy_seconds: float
    """Time to copy the latents to a node."""
    checkpoint_bytes: int
    checkpoint_seconds: Range
    """Time between two checkpoints."""
    upload_seconds: float
    """Time to upload a checkpoint; every node uploads its part."""
    hiding_gbit: float
    """Network rate in Gbit/s at which communication takes as long as compute; 0 on one node."""


def largest_pass(batch: int, num_workers: int, samples_per_pass: int) -> int:
    """Size of the largest micro-batch on the worker with the most samples."""
    return ceil(ceil(batch / num_workers) / num_passes(batch, num_workers, samples_per_pass))


def seconds_of_flops(flops: float, batch: int, num_workers: int, teraflops: float) -> float:
    """Seconds of a step. All workers wait for the one with the most samples."""
    return flops * ceil(batch / num_workers) / batch / (teraflops * 1e12)


def compute_seconds(workload: Workload, cluster: Cluster, num_gpus: int) -> float:
    """Seconds of a step without communication.

    A measured rate counts model FLOPs and includes everything else that runs; assumed rates apply to executed FLOPs.
    """
    config = workload.config
    if cluster.teraflops is not None:
        return seconds_of_flops(
            step_flops(config, **workload.sizes), config.global_batch_size, num_gpus, cluster.teraflops
        )
    executed = executed_flops(config, **workload.sizes)
    parts = ((executed.in_precision, config.precision), (executed.in_float32, "float32"))
    return sum(
        seconds_of_flops(flops, config.global_batch_size, num_gpus, cluster.sustained_teraflops(precision))
        for flops, precision in parts
    )


def payload_bytes(workload: Workload, passes: int) -> float:
    """Payload of all collectives of a step, in bytes; each GPU sends (W - 1) / W of it.

    DDP reduce-scatters and all-gathers the gradient once. In every pass, FSDP2 all-gathers the parameters for each network
    call (extra velocities, a separate du/dt, the training forward) and for backward, and reduce-scatters the gradient.
    """
    if workload.parallelism == "ddp":
        return 2.0 * workload.gradient_bytes
    config = workload.config
    record = draw_step_record(config.loss, seed=config.seed, step=0, num_rows=passes, latent_shape=(1, 1, 1))
    calls = 1 + (len(record.rows_velocity) > 0)
    calls += config.separate_derivative and not config.loss.is_flow_matching
    return float(passes * (calls + 2) * workload.gradient_bytes)


def ring_seconds(gpu_bytes: float, cluster: Cluster, num_gpus: int) -> float:
    """Seconds for each GPU to send these bytes to its neighbour in a ring, limited by the slowest link."""
    link, network = cluster.link_gbyte * 1e9, cluster.network_gbit * 1e9 / 8.0
    return gpu_bytes / (link if cluster.num_nodes(num_gpus) == 1 else min(link, network))


def _memory(workload: Workload, rows: int, num_shards: int) -> MemoryEstimate:
    return memory_estimate(workload.config, **workload.sizes, samples_per_pass=rows, num_shards=num_shards)


def largest_micro_batch(workload: Workload, num_gpus: int, usable_bytes: float) -> int:
    """Largest micro-batch that fits in memory, up to a GPU's share of the batch; 0 if not even one sample fits."""
    shards, share = workload.num_shards(num_gpus), ceil(workload.config.global_batch_size / num_gpus)

    def total(rows: int) -> int:
        return _memory(workload, rows, shards).total

    if total(share) <= usable_bytes:  # the usual case: the network is traced only once
        return share
    return bisect_right(range(1, share), usable_bytes, key=total)


def train_on(workload: Workload, cluster: Cluster, num_gpus: int, rows: int) -> TrainingEstimate:
    """Estimates the training run on W GPUs with micro-batches of up to `rows` samples.

    Raises ValueError if the GPUs do not fill whole nodes.
    """
    batch, steps = workload.config.global_batch_size, workload.config.num_steps
    compute = compute_seconds(workload, cluster, num_gpus)
    gpu_bytes = payload_bytes(workload, num_passes(batch, num_gpus, rows)) * (num_gpus - 1) / num_gpus
    sending = ring_seconds(gpu_bytes, cluster, num_gpus)
    step = (max(compute, sending), compute + sending)
    on_one_gpu = compute_seconds(workload, cluster, 1)
    hours = (step[0] * steps * num_gpus / 3600.0, step[1] * steps * num_gpus / 3600.0)
    price = cluster.price_per_gpu_hour
    return TrainingEstimate(
        num_gpus=num_gpus,
        num_nodes=cluster.num_nodes(num_gpus),
        micro_batch_size=largest_pass(batch, num_gpus, rows),
        compute_seconds=compute,
        gpu_bytes=gpu_bytes,
        communication_seconds=sending,
        step_seconds=step,
        images_per_second=(batch / step[1], batch / step[0]),
        seconds=(step[0] * steps, step[1] * steps),
        gpu_hours=hours,
        cost=None if price is None else (hours[0] * price, hours[1] * price),
        efficiency=(on_one_gpu / num_gpus / step[1], on_one_gpu / num_gpus / step[0]),
    )


def estimate(
    workload: Workload, cluster: Cluster, num_gpus: int, others: tuple[int, ...] = OTHER_NUMBERS_OF_GPUS
) -> Estimate:
    """Estimates the training run on W GPUs, and on each of the other numbers of GPUs that fills whole nodes.

    Raises ValueError if W does not fill whole nodes or exceeds the batch size, or if not even one sample fits on a GPU.
    """
    batch, usable = workload.config.global_batch_size, cluster.gpu.usable_bytes
    nodes = cluster.num_nodes(num_gpus)
    if num_gpus > batch:
        raise ValueError(
            f"gpus must be at most global_batch_size = {batch} (one image per GPU), but got {num_gpus}; "
            f"use fewer GPUs, or a larger --global-batch-size (a different experiment)"
        )
    fitting = largest_micro_batch(workload, num_gpus, usable)
    if fitting == 0:
        needed = _memory(workload, 1, workload.num_shards(num_gpus)).total
        raise ValueError(
            f"one sample needs {needed / 1e9:.1f} GB, but {cluster.gpu.name} has {usable / 1e9:.1f} GB available; "
            f"use {_ways_to_save_memory(workload)}"
        )
    requested = train_on(workload, cluster, num_gpus, workload.samples_per_pass or fitting)
    memory = _memory(workload, requested.micro_batch_size, workload.num_shards(num_gpus))
    trainings, left_out = {num_gpus: requested}, []
    for number in others:
        if number == num_gpus or (number > cluster.gpus_per_node and number % cluster.gpus_per_node):
            continue
        rows = 0 if number > batch else largest_micro_batch(workload, number, usable)
        if rows == 0:
            left_out.append(number)
        else:
            trainings[number] = train_on(workload, cluster, number, min(workload.samples_per_pass or rows, rows))
    size, interval = checkpoint_bytes(workload.config, **workload.sizes), workload.config.checkpoint_interval_steps
    node_bytes = requested.gpu_bytes if nodes > 1 else 0.0
    return Estimate(
        workload=workload,
        cluster=cluster,
        flops=step_flops(workload.config, **workload.sizes),
        executed=executed_flops(workload.config, **workload.sizes),
        requested=requested,
        memory=memory,
        fits=memory.total <= usable,
        largest_micro_batch=fitting,
        trainings=tuple(trainings[number] for number in sorted(trainings)),
        left_out=tuple(left_out),
        node_images_per_second=requested.images_per_second[1] / nodes,
        copy_seconds=workload.latent_bytes / (cluster.storage_gbyte * 1e9),
        checkpoint_bytes=size,
        checkpoint_seconds=(interval * requested.step_seconds[0], interval * requested.step_seconds[1]),
        upload_seconds=size / nodes / (cluster.storage_gbyte * 1e9),
        hiding_gbit=8e-9 * node_bytes / requested.compute_seconds,
    )


def _ways_to_save_memory(workload: Workload) -> str:
    options = [] if workload.config.activation_checkpointing else ["--activation-checkpointing"]
    options += [] if workload.parallelism == "fsdp2" else ["--parallelism fsdp2 on several GPUs"]
    return ", ".join([*options, "a GPU with more memory, or a smaller network"])
