"""One optimiser step on one device, and the moving averages. For several devices, pass the wrapped network."""

import copy
import inspect
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from meanflow_core.config import OptimizerConfig, RunConfig, TrainingConfig
from meanflow_core.latents import LatentNormalization, sample_latents
from meanflow_core.networks.building import build_network, require_same_architecture
from meanflow_core.networks.interface import Network, NetworkModel
from meanflow_core.objectives.interface import Loss, Objective, Record, build_objective
from meanflow_core.objectives.row_plan import VELOCITY_BATCH_PARTS
from meanflow_core.optimizers import build_optimizers


@dataclass
class TrainState:
    """Everything that training changes."""

    network: NetworkModel
    """The trained network."""
    ema_networks: dict[float, NetworkModel]
    """{decay: moving average of the parameters}; the first one is used for sampling."""
    optimizers: list[torch.optim.Optimizer]
    """The optimisers with their states."""
    step: int
    """Number of steps taken, including those without an update."""
    num_updates: int = 0
    """Number of these steps that updated the parameters."""
    num_skipped: int = 0
    """Number of these steps that were skipped because their gradient was not finite."""
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    """{name: tensor}: what a training changes besides the networks, the same on every worker."""

    @property
    def ema_network(self) -> NetworkModel:
        """The moving average for sampling."""
        return next(iter(self.ema_networks.values()))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of a step on one device: a worker's share of the global batch, or a part of it."""

    moments: torch.Tensor
    """(b, 2C, H, W): those of the mirror image where `record.mirrored` is set."""
    labels: torch.Tensor
    """(b,) int64."""
    record: Record
    """The step's draws for these rows."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Metrics of one step over this worker's rows, as tensors: reading them synchronises with the device."""

    sums: torch.Tensor
    """float32 (1 + 2 n,): the loss, already divided by the global number of samples; then for each of the objective's n
    `metric_names` the sum over samples and their number."""
    gradient_norm: torch.Tensor
    """Scalar: norm of the whole gradient before clipping, the same on every worker."""
    skipped: bool = False
    """Whether the step was skipped because the gradient was not finite."""


def read_means(names: Sequence[str], sums: torch.Tensor) -> dict[str, float]:
    """{metric name: mean} of `StepMetrics.sums`, possibly added up over steps; a mean of no samples is left out."""
    values = sums[1:].tolist()
    pairs = zip(names, values[::2], values[1::2], strict=True)
    return {name: total / count for name, total, count in pairs if count}


def contiguous_share(num_rows: int, part: int, num_parts: int) -> tuple[int, int]:
    """The contiguous rows [start, stop) of part k out of n: kB/n to (k + 1)B/n. Sizes differ by at most one row."""
    return part * num_rows // num_parts, (part + 1) * num_rows // num_parts


def num_passes(global_num_rows: int, num_workers: int, samples_per_pass: int | None) -> int:
    """The number of passes each worker makes over its share so that a pass has at most `samples_per_pass` rows.

    The number is the same on every worker and at most the size of the smallest share, so that no pass is empty. (If
    shares differ in size and samples_per_pass is 1, one pass has two rows.) Raises ValueError for fewer rows than workers.
    """
    if global_num_rows < num_workers:
        raise ValueError(
            f"global_batch_size must be at least the number of workers {num_workers}, but got {global_num_rows}"
        )
    largest, smallest = -(-global_num_rows // num_workers), global_num_rows // num_workers
    return min(-(-largest // (samples_per_pass or largest)), smallest)


def build_train_state(
    config: TrainingConfig,
    *,
    sample_size: int,
    in_channels: int,
    num_classes: int,
    device: torch.device,
    initial: NetworkModel | None = None,
    shard: Callable[[NetworkModel], None] | None = None,
) -> TrainState:
    """Builds a state before its first step. Its parameters are those of `initial`, or drawn from config.seed.

    initial: a network of the same class and size, for example one trained with flow matching. shard: shards a network
    in place (`sharding.shard_network`). Raises ValueError, with every difference, if `initial` has another class or size,
    and for an invalid optimiser.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_network(
            config.network, sample_size=sample_size, in_channels=in_channels, num_classes=num_classes
        )
    if initial is not None:
        require_same_architecture(initial, network)
        network.load_state_dict(initial.state_dict())
    return new_train_state(network, config, device=device, shard=shard)


def new_train_state(
    network: NetworkModel,
    config: RunConfig,
    *,
    device: torch.device,
    shard: Callable[[NetworkModel], None] | None = None,
) -> TrainState:
    """Builds a state before its first step that trains `network`. shard: as in `build_train_state`.

    Raises ValueError for an invalid optimiser.
    """
    network = network.to(device).train()
    ema_networks = {decay: copy.deepcopy(network).eval().requires_grad_(False) for decay in config.ema_decays}
    if config.activation_checkpointing:
        network.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(network)
    if shard is not None:
        for module in (network, *ema_networks.values()):
            shard(module)
    optimizers = build_optimizers(network, config.optimizer)
    return TrainState(network=network, ema_networks=ema_networks, optimizers=optimizers, step=0)


def compile_blocks(network: NetworkModel, backend: str = "inductor") -> None:
    """Compiles a network block by block, in place. Blocks of a class share their code; hooks between blocks still run."""
    # A long run meets every size of the no-grad forward, in addition to the training forward's: more than dynamo's
    # limit of 8, above which it silently runs uncompiled. torch 2.11 has no such option per module.
    has_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    limit = {"recompile_limit": 4 * VELOCITY_BATCH_PARTS} if has_limit else {}
    network.compile_repeated_blocks(dynamic=False, backend=backend, **limit)


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The learning rate of 0-based step `step`: linear warm-up, constant, linear cool-down to 0 after the last step."""
    warmup = (step + 1) / max(config.warmup_steps, 1)
    cooldown = (num_steps - step) / config.cooldown_steps if config.cooldown_steps else 1.0
    return config.learning_rate * max(0.0, min(1.0, warmup, cooldown))


@torch.no_grad()
def update_emas(state: TrainState) -> None:
    """ema = decay ema + (1 - decay) parameters, from the first step on: no warm-up of the decay, as in the papers."""
    parameters = list(state.network.parameters())
    for decay, ema_network in state.ema_networks.items():
        torch._foreach_lerp_(list(ema_network.parameters()), parameters, 1.0 - decay)


@torch.no_grad()
def relative_ema_distance(state: TrainState) -> dict[float, float]:
    """{decay: ||average - parameters|| / ||parameters||} of each moving average."""
    parameters = list(state.network.parameters())
    squared_norm = _squared_norm(parameters)
    distances = {}
    for decay, ema_network in state.ema_networks.items():
        differences = torch._foreach_sub(list(ema_network.parameters()), parameters)
        distances[decay] = float((_squared_norm(differences) / squared_norm).sqrt())
    return distances


def _squared_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return _full(torch.stack(torch._foreach_norm(list(tensors))).square().sum())


def _full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def train_step(
    state: TrainState,
    training_network: Network,
    batches: Sequence[Batch],
    normalization: LatentNormalization,
    config: TrainingConfig,
    *,
    gradient_scale: float = 1.0,
    accumulating: Callable[[], AbstractContextManager[None]] = nullcontext,
    may_skip: bool = False,
) -> StepMetrics:
    """Takes one step on this worker's rows of the global batch, in one pass per batch.

    Args:
        training_network: state.network, or a wrapper whose backward reduces gradients.
        gradient_scale: number of workers W if the wrapper averages over them, because the loss is already divided by
            the global number of rows.
        accumulating: context manager for every pass but the last, for example DDP's `no_sync`.
        may_skip: skip the update if the gradient is not finite. This synchronises with the device in every step.

    Raises ValueError as the loss does.
    """
    state.network.zero_grad(set_to_none=True)
    sums: list[torch.Tensor] = []
    for number, batch in enumerate(batches, start=1):
        with accumulating() if number < len(batches) else nullcontext():
            sums.append(_forward_and_backward(state, training_network, batch, normalization, config, gradient_scale))
    gradient_norm, skipped = apply_gradients(state, config, may_skip=may_skip)
    return StepMetrics(sums=torch.stack(sums).sum(dim=0), gradient_norm=gradient_norm, skipped=skipped)


def apply_gradients(state: TrainState, config: RunConfig, *, may_skip: bool = False) -> tuple[torch.Tensor, bool]:
    """Updates parameters and averages by the parameters' gradients, and counts the step.

    may_skip: as in `train_step`. Returns the norm of the gradient before clipping, and whether the update was skipped.
    """
    gradient_norm = _full(
        torch.nn.utils.clip_grad_norm_(state.network.parameters(), config.optimizer.max_gradient_norm or float("inf"))
    )
    rate = learning_rate(config.optimizer, state.step, config.num_steps)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("learning_rate_factor", 1.0)
    skipped = may_skip and not bool(torch.isfinite(gradient_norm))
    if skipped:
        state.num_skipped += 1
    else:
        for optimizer in state.optimizers:
            optimizer.step()
        update_emas(state)
        state.num_updates += 1
    state.step += 1
    return gradient_norm, skipped


def warm_up_ddp_buckets(state: TrainState, training_network: Network, batch: Batch, config: TrainingConfig) -> None:
    """Runs one backward through a new DistributedDataParallel and discards the gradient.

    DDP rearranges its buckets after its first backward, and a sum over more than two workers depends on the position
    in a bucket. Without this, the first step after a resume would round differently than in an uninterrupted run.
    """
    latents = torch.zeros_like(batch.record.posterior_noise)
    objective = build_objective(config.loss_at(state.step))
    _loss(objective, state, training_network, latents, batch, config).loss.backward()
    state.network.zero_grad(set_to_none=True)


def _loss(
    objective: Objective[Any, Any, Any],
    state: TrainState,
    training_network: Network,
    latents: torch.Tensor,
    batch: Batch,
    config: TrainingConfig,
) -> Loss:
    """The objective of these rows, at the configured precision."""
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        return objective.loss(
            training_network,
            state.network,
            latents,
            batch.labels,
            batch.record,
            null_label=state.network.config.num_classes,
            global_num_rows=config.global_batch_size,
            separate_derivative=config.separate_derivative,
        )


def _forward_and_backward(
    state: TrainState,
    training_network: Network,
    batch: Batch,
    normalization: LatentNormalization,
    config: TrainingConfig,
    gradient_scale: float,
) -> torch.Tensor:
    """Adds the gradient of these rows to the parameters' and returns their `StepMetrics.sums`."""
    latents = sample_latents(batch.moments, batch.record.posterior_noise, normalization)
    objective = build_objective(config.loss_at(state.step))
    output = _loss(objective, state, training_network, latents, batch, config)
    (output.loss * gradient_scale).backward()
    loss = output.loss.detach()
    # new_full fills on the device; copying a number to it would wait for the device.
    pairs = [
        (mean.total, n if isinstance(n := mean.num_samples, torch.Tensor) else loss.new_full((), n))
        for mean in (output.metrics[name] for name in objective.metric_names)
    ]
    return torch.stack([loss, *itertools.chain.from_iterable(pairs)]).float()
