"""What a training takes on so many GPUs: memory, seconds, bytes, days, from counted operations and stated assumptions.

Arithmetic alone: nothing is measured here, and every result is an estimate. Bytes are bytes and GB 10^9 of them;
rates say their units. The text is `scale_report`'s.

    # W GPUs, G of them on a node, N nodes
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Literal

from meanflow_core.config import TrainingConfig
from meanflow_core.loss import draw_step_record
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


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training, wherever it runs."""

    config: TrainingConfig
    """The experiment."""
    num_images: int
    """In the training set."""
    latent_shape: tuple[int, int, int]
    """(C, H, W), square."""
    num_classes: int
    """Classes."""
    mirrored: bool
    """Whether nodes keep latents of mirror images too."""
    parallelism: Literal["ddp", "fsdp2"]
    """As `TrainJob.parallelism`."""
    rows_per_pass: int | None
    """Most rows that a GPU takes at once; None is as many as fit."""

    def __post_init__(self) -> None:
        _, height, width = self.latent_shape
        if height != width:
            raise ValueError(f"latents must be square, but got {height}x{width}")
        for name in ("num_images", "num_classes", "rows_per_pass"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but got {value}")

    @property
    def sizes(self) -> NetworkSizes:
        """What a network's size has from the data."""
        channels, size, _ = self.latent_shape
        return {"sample_size": size, "in_channels": channels, "num_classes": self.num_classes}

    @property
    def image_bytes(self) -> int:
        """Bytes of one image's moments, or of its mirror image's."""
        channels, height, width = self.latent_shape
        return MOMENT_BYTES * 2 * channels * height * width

    @property
    def latent_bytes(self) -> int:
        """Bytes of all moments; labels, names and Arrow's framing come on top: 0.3 % or so of ImageNet's."""
        return self.num_images * self.image_bytes * (1 + self.mirrored)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the whole gradient, and of the parameters: both in float32, whatever the precision."""
        return FLOAT32_BYTES * num_parameters(self.config.network, **self.sizes)

    def num_shards(self, num_gpus: int) -> int:
        """Devices that share parameters, gradients, optimiser and averages."""
        return num_gpus if self.parallelism == "fsdp2" else 1


@dataclass(frozen=True, kw_only=True)
class Communication:
    """What a step sends, and how long it takes if nothing else is done; latencies are not counted."""

    payload_bytes: float
    """What travels round all GPUs: twice the gradient under DDP."""
    gpu_bytes: float
    """Out of each GPU, in a ring: (W - 1) / W of it."""
    node_bytes: float
    """Out of each node, in a ring; 0 on one node."""
    least_node_bytes: float
    """The same where GPUs of a node add up between themselves first: (N - 1) / N of it."""
    seconds: float
    """Of the ring, at its slowest link."""
    hierarchical_seconds: float
    """Within nodes, then between them."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training on W GPUs. Ranges go from communication that hides behind compute to none that does."""

    num_gpus: int
    """W."""
    num_nodes: int
    """N."""
    rows_at_once: int
    """Most rows that a GPU takes in a pass."""
    compute_seconds: float
    """Of a step."""
    communication: Communication
    """Of a step."""
    step_seconds: tuple[float, float]
    """The longer of the two; their sum."""
    images_per_second: tuple[float, float]
    """At least, at most."""
    seconds: tuple[float, float]
    """Of all steps; pictures, checkpoints and restarts are not counted."""
    gpu_hours: tuple[float, float]
    """Likewise."""
    cost: tuple[float, float] | None
    """Where there is a price."""
    efficiency: tuple[float, float]
    """At least, at most: one GPU's time for a step over W times this one's."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A training on the GPUs that were asked for, and on other numbers of them."""

    workload: Workload
    """What."""
    cluster: Cluster
    """On what."""
    flops: float
    """`step_flops` of a step."""
    executed: ExecutedFlops
    """What a step really runs."""
    asked: Training
    """On as many GPUs as asked for."""
    memory: MemoryEstimate
    """Of each of these."""
    fits: bool
    """Whether that is no more than is usable."""
    largest_rows: int
    """Most rows of a GPU's share that fit its memory at once."""
    others: tuple[Training, ...]
    """On others, and on these, by their number."""
    left_out: tuple[int, ...]
    """Numbers of GPUs that are more than a batch has images, or on which not one row fits."""
    node_images_per_second: float
    """Images that a node's copy of the latents is to give, at most."""
    copy_seconds: float
    """To copy the latents to a node."""
    checkpoint_bytes: int
    """Of one checkpoint."""
    checkpoint_seconds: tuple[float, float]
    """Between two checkpoints."""
    upload_seconds: float
    """Of one, every node uploading its part."""
    hiding_gbit: float
    """Gbit/s of a node's network at which the ring takes as long as the compute; 0 on one node."""


def largest_pass(batch: int, num_workers: int, rows_per_pass: int) -> int:
    """Rows of the largest pass of the worker that has most of them."""
    return ceil(ceil(batch / num_workers) / num_passes(batch, num_workers, rows_per_pass))


def seconds_of_flops(flops: float, batch: int, num_workers: int, teraflops: float) -> float:
    """Seconds of a step's operations: those of the worker that has most rows, at its TFLOP/s."""
    return flops * ceil(batch / num_workers) / batch / (teraflops * 1e12)


def compute_seconds(workload: Workload, cluster: Cluster, num_gpus: int) -> float:
    """Seconds of a step without communication.

    At a measured rate, which is of `step_flops` and has in it whatever else runs; else `executed_flops` at assumed ones.
    """
    config = workload.config
    if cluster.teraflops is not None:
        flops = _step_flops(workload)
        return seconds_of_flops(flops, config.global_batch_size, num_gpus, cluster.teraflops)
    executed = _executed(workload)
    parts = ((executed.in_precision, config.precision), (executed.in_float32, "float32"))
    return sum(
        seconds_of_flops(flops, config.global_batch_size, num_gpus, cluster.sustained_teraflops(precision))
        for flops, precision in parts
    )


def payload_bytes(workload: Workload, passes: int) -> float:
    """Bytes that travel round all GPUs in a step: each of them sends (W - 1) / W of it.

    DDP scatters and gathers the gradient, once. FSDP2 in every pass gathers the parameters for each call of the network
    (velocities of its own, du/dt apart, the graded one) and for backward, and scatters the gradient.
    """
    if workload.parallelism == "ddp":
        return 2.0 * workload.gradient_bytes
    config = workload.config
    record = draw_step_record(config.loss, seed=config.seed, step=0, num_rows=passes, latent_shape=(1, 1, 1))
    calls = 1 + (len(record.rows_asked) > 0)
    calls += config.takes_derivative_apart and not config.loss.is_flow_matching
    return float(passes * (calls + 2) * workload.gradient_bytes)


def communication(payload: float, cluster: Cluster, num_gpus: int) -> Communication:
    """What a payload takes on these GPUs: `Communication`."""
    nodes = cluster.num_nodes(num_gpus)
    on_node = min(num_gpus, cluster.gpus_per_node)
    link, network = cluster.link_gbyte * 1e9, cluster.network_gbit * 1e9 / 8.0
    ring, between = payload * (num_gpus - 1) / num_gpus, payload * (nodes - 1) / nodes
    return Communication(
        payload_bytes=payload,
        gpu_bytes=ring,
        node_bytes=ring if nodes > 1 else 0.0,
        least_node_bytes=between,
        seconds=ring / (link if nodes == 1 else min(link, network)),
        hierarchical_seconds=payload * (on_node - 1) / on_node / link + between / network,
    )


def _memory(workload: Workload, rows: int, num_shards: int) -> MemoryEstimate:
    return memory_estimate(workload.config, **workload.sizes, rows_per_pass=rows, num_shards=num_shards)


@lru_cache(maxsize=16)
def _step_flops(workload: Workload) -> float:
    return step_flops(workload.config, **workload.sizes)


@lru_cache(maxsize=16)
def _executed(workload: Workload) -> ExecutedFlops:
    return executed_flops(workload.config, **workload.sizes)


def largest_rows(workload: Workload, num_gpus: int, usable_bytes: float) -> int:
    """Most rows of a GPU's share of a batch that fit in so many bytes at once; 0 where not one does.

    Memory is close to a line in the rows, so that a few traces find them.
    """
    shards, share = workload.num_shards(num_gpus), ceil(workload.config.global_batch_size / num_gpus)

    def total(rows: int) -> int:
        return _memory(workload, rows, shards).total

    fitting, least = 0, 0.0
    too_many, most = share, float(total(share))
    if most <= usable_bytes:
        return share
    tries = 0
    while too_many - fitting > 1:
        tries += 1
        line = fitting + (too_many - fitting) * (usable_bytes - least) / (most - least)
        if fitting == 0:
            line = 1.0
        elif tries % 3 == 0:  # few rows lie above the line, under the optimiser's own: halve
            line = (fitting + too_many) / 2
        rows = min(max(int(line), fitting + 1), too_many - 1)
        if total(rows) <= usable_bytes:
            fitting, least = rows, float(total(rows))
        else:
            too_many, most = rows, float(total(rows))
    return fitting


def train_on(workload: Workload, cluster: Cluster, num_gpus: int, rows: int) -> Training:
    """A training on W GPUs, each taking at most so many rows at once. Raises ValueError as `Cluster.num_nodes`."""
    batch, steps = workload.config.global_batch_size, workload.config.num_steps
    nodes, at_once = cluster.num_nodes(num_gpus), largest_pass(batch, num_gpus, rows)
    compute = compute_seconds(workload, cluster, num_gpus)
    sent = communication(payload_bytes(workload, num_passes(batch, num_gpus, rows)), cluster, num_gpus)
    step = (max(compute, sent.seconds), compute + sent.seconds)
    alone = compute_seconds(workload, cluster, 1)
    hours = (step[0] * steps * num_gpus / 3600.0, step[1] * steps * num_gpus / 3600.0)
    price = cluster.price_per_gpu_hour
    return Training(
        num_gpus=num_gpus,
        num_nodes=nodes,
        rows_at_once=at_once,
        compute_seconds=compute,
        communication=sent,
        step_seconds=step,
        images_per_second=(batch / step[1], batch / step[0]),
        seconds=(step[0] * steps, step[1] * steps),
        gpu_hours=hours,
        cost=None if price is None else (hours[0] * price, hours[1] * price),
        efficiency=(alone / num_gpus / step[1], alone / num_gpus / step[0]),
    )


def estimate(
    workload: Workload, cluster: Cluster, num_gpus: int, others: tuple[int, ...] = (1, 8, 16, 32, 64)
) -> Estimate:
    """Everything about a training on W GPUs, and its length on other numbers of them.

    Of the others those are left out that do not fill nodes, and `Estimate.left_out` names those that cannot train.
    Raises ValueError where W does not fill nodes, is more than a batch has images, or not one row fits.
    """
    nodes, batch = cluster.num_nodes(num_gpus), workload.config.global_batch_size
    if num_gpus > batch:
        raise ValueError(
            f"gpus must be at most global_batch_size = {batch}, an image each, but got {num_gpus}; "
            f"take fewer, or a larger --global-batch-size (another experiment)"
        )
    usable = cluster.gpu.usable_bytes
    fitting = largest_rows(workload, num_gpus, usable)
    if fitting == 0:
        needed = _memory(workload, 1, workload.num_shards(num_gpus)).total
        raise ValueError(
            f"one row at once takes {needed / 1e9:.1f} GB, but {cluster.gpu.name} has {usable / 1e9:.1f} GB for a "
            f"training; take {_ways_to_less_memory(workload)}"
        )
    rows = workload.rows_per_pass or fitting
    asked = train_on(workload, cluster, num_gpus, rows)
    memory = _memory(workload, asked.rows_at_once, workload.num_shards(num_gpus))
    trainings, left_out = {num_gpus: asked}, []
    for other in others:
        if other == num_gpus or (other > cluster.gpus_per_node and other % cluster.gpus_per_node):
            continue
        there = 0 if other > batch else largest_rows(workload, other, usable)
        if there == 0:
            left_out.append(other)
        else:
            trainings[other] = train_on(workload, cluster, other, min(workload.rows_per_pass or there, there))
    size = checkpoint_bytes(workload.config, **workload.sizes)
    interval = workload.config.checkpoint_interval_steps
    return Estimate(
        workload=workload,
        cluster=cluster,
        flops=_step_flops(workload),
        executed=_executed(workload),
        asked=asked,
        memory=memory,
        fits=memory.total <= usable,
        largest_rows=fitting,
        others=tuple(trainings[number] for number in sorted(trainings)),
        left_out=tuple(left_out),
        node_images_per_second=asked.images_per_second[1] / nodes,
        copy_seconds=workload.latent_bytes / (cluster.storage_gbyte * 1e9),
        checkpoint_bytes=size,
        checkpoint_seconds=(interval * asked.step_seconds[0], interval * asked.step_seconds[1]),
        upload_seconds=size / nodes / (cluster.storage_gbyte * 1e9),
        hiding_gbit=8e-9 * asked.communication.node_bytes / asked.compute_seconds,
    )


def _ways_to_less_memory(workload: Workload) -> str:
    ways = [] if workload.config.activation_checkpointing else ["--activation-checkpointing"]
    ways += [] if workload.parallelism == "fsdp2" else ["--parallelism fsdp2 on several GPUs"]
    return ", ".join([*ways, "a GPU with more memory, or a smaller network"])


def with_epochs(workload: Workload, epochs: float) -> Workload:
    """The same for so many epochs, which lie end to end: a batch may reach into the next."""
    steps = max(1, round(epochs * workload.num_images / workload.config.global_batch_size))
    return replace(workload, config=replace(workload.config, num_steps=steps))
