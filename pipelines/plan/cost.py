"""What a training costs, known before it starts: parameters, floating-point operations and memory.

Nothing is computed: the objective itself runs on tensors that have shapes and no data, and what it would multiply and
keep is counted. The blocks of a network are alike, so two or three shallow networks tell what a deep one costs.

    # B batch, C channels, H W latent size
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, finalize

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from meanflow_core.config import LossConfig, NetworkConfig, TrainingConfig
from meanflow_core.draws import StepRecord, draw_step_record
from meanflow_core.imf_transformer import ImprovedMeanFlowDiT
from meanflow_core.loss import meanflow_loss, total_derivative
from meanflow_core.networks import AnyNetwork, build_network, without_velocity_head
from meanflow_core.transformer import Conditioning

FLOAT32_BYTES = 4
# Rows over which the shares of rows that need velocities are averaged: 0.2 % of a step's operations at most.
ROWS_OF_SHARES = 8192
# Under FSDP2: a block and the one that is fetched ahead, each with its parameters and its gradient.
GATHERED_BLOCKS = 2


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one device in a training step.

    Counted: what training keeps from step to step, and the tensors of one pass through the objective. Not counted:
    the CUDA context and the libraries' workspaces (about 1 GB), fragmentation and rounding of the allocator, what
    torch.compile adds or spares, communication buffers, and the autoencoder and sampling of the worker that draws
    pictures.
    """

    parameters: int
    """In float32, this device's share."""
    gradients: int
    """Likewise."""
    optimizer: int
    """Adam's two moments, likewise."""
    averages: int
    """The moving averages, likewise."""
    activations: int
    """What a pass has kept when its backward begins; under bfloat16 with the parameters in it, which shards do not
    divide."""
    temporaries: int
    """What comes on top at the worst moment: of the pass, or of the optimiser, which holds a copy of the parameters
    when the activations are gone. With shards, an allowance for the blocks that are gathered."""

    @property
    def total(self) -> int:
        """The sum."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class ExecutedFlops:
    """Floating-point operations that a step really runs, over the global batch."""

    in_precision: float
    """At the configured precision."""
    in_float32: float
    """In the float32 pass of its own that du/dt takes under bfloat16; else 0."""


def num_parameters(config: NetworkConfig, *, sample_size: int, in_channels: int, num_classes: int) -> int:
    """Parameters of the network as it is trained; improved MeanFlow's with its v head.

    Raises ValueError where the sizes do not fit.
    """
    with torch.device("meta"):
        network = build_network(config, sample_size=sample_size, in_channels=in_channels, num_classes=num_classes)
    return _count(network)


def checkpoint_bytes(config: TrainingConfig, *, sample_size: int, in_channels: int, num_classes: int) -> int:
    """Bytes of the tensors of one checkpoint: parameters, averages, Adam's moments; float32. Headers come on top."""
    sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}
    return FLOAT32_BYTES * num_parameters(config.network, **sizes) * (3 + len(config.ema_decays))


def forward_flops(config: NetworkConfig, *, sample_size: int, in_channels: int, num_classes: int) -> float:
    """Floating-point operations of one network call on one image, as in sampling (without improved MeanFlow's v head).

    A multiplication and its addition are two: twice what papers on image generators call GFLOPs. Products of matrices
    and convolutions alone are counted, attention's among them.
    """
    sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}

    def count(config: NetworkConfig) -> np.ndarray:
        with torch.device("meta"):
            network = build_network(config, **sizes)
        if isinstance(network, ImprovedMeanFlowDiT):
            network = without_velocity_head(network)
        z = torch.empty(1, in_channels, sample_size, sample_size, device="meta")
        of_row = torch.empty(1, device="meta")
        guidance = (
            {"omega": of_row, "guidance_interval_start": of_row, "guidance_interval_end": of_row}
            if network.takes_guidance
            else {}
        )
        conditioning = Conditioning(t=of_row, r=of_row, labels=of_row.long(), **guidance)
        with torch.no_grad():
            return _count_flops(lambda: network(z, conditioning))

    return float(_at_full_depth(config, count, shallow=1)[0])


@lru_cache(maxsize=64)
def step_flops(
    config: TrainingConfig, *, sample_size: int, in_channels: int, num_classes: int, rows: int | None = None
) -> float:
    """Floating-point operations of one optimiser step over the global batch: the objective and its backward.

    "Model FLOPs", as the share of a device's peak (MFU) is reckoned with: what the mathematics needs, whatever the
    precision, sharding and compilation. So du/dt is counted beside the graded pass, without the second forward of a
    pass of its own; what activation checkpointing computes again, and the rows that pad calls to a few sizes, are not
    counted. A multiplication and its addition are two; products of matrices and convolutions alone are counted,
    attention's among them, which are all but a percent of the work.

    The shares of rows with r < t and of guided rows are those of `rows` rows as training draws them (8,192 unless
    given): within 0.2 % of the mean over many steps. A single step of 256 rows differs by 1 % or so.
    Raises ValueError where the sizes do not fit.
    """
    sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}
    rows = rows or ROWS_OF_SHARES
    record = _mean_record(config, rows)

    def count(network_config: NetworkConfig) -> np.ndarray:
        with torch.device("meta"):
            network = build_network(network_config, **sizes)
            return _count_flops(lambda: _loss(network, config.loss, record).backward())

    return float(_at_full_depth(config.network, count, shallow=1)[0]) * config.global_batch_size / rows


@lru_cache(maxsize=64)
def executed_flops(config: TrainingConfig, *, sample_size: int, in_channels: int, num_classes: int) -> ExecutedFlops:
    """Floating-point operations of a step as `config` arranges it, counted as `step_flops` counts.

    On top of `step_flops`: the pass of its own that du/dt takes under bfloat16 and under activation checkpointing, and
    the forward that checkpointing runs again. Rows that pad calls to a few sizes are not counted.
    Raises ValueError where the sizes do not fit.
    """
    sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}
    if not config.separate_derivative:  # nor is anything computed again
        return ExecutedFlops(in_precision=step_flops(config, **sizes), in_float32=0.0)
    record = _mean_record(config, ROWS_OF_SHARES)

    def count(network_config: NetworkConfig) -> np.ndarray:
        with FakeTensorMode():  # and not meta, where there is no autocast to leave
            network = build_network(network_config, **sizes)
            if config.activation_checkpointing:
                network.enable_gradient_checkpointing()
            whole = _count_flops(lambda: _loss(network, config.loss, record, separate_derivative=True).backward())
            if config.loss.is_flow_matching:
                return np.concatenate([whole, np.zeros(1)])
            return np.concatenate([whole, _count_flops(lambda: _derivative(network, record))])

    whole, derivative = _at_full_depth(config.network, count, shallow=1) * config.global_batch_size / ROWS_OF_SHARES
    in_float32 = float(derivative) if config.precision == "bfloat16" else 0.0
    return ExecutedFlops(in_precision=float(whole) - in_float32, in_float32=in_float32)


def memory_estimate(
    config: TrainingConfig,
    *,
    sample_size: int,
    in_channels: int,
    num_classes: int,
    rows_per_pass: int,
    num_shards: int = 1,
) -> MemoryEstimate:
    """Memory of one device that takes at most rows_per_pass rows of a step in one pass.

    Parameters, gradients, Adam's moments and averages are in float32 and divided by num_shards (FSDP2); gradients are
    there all the time, as where a step has several passes. Activations and temporaries are those of the objective and
    its backward at the configured precision and activation checkpointing, with fused attention: every storage that is
    alive, once, in a pass whose operations are traced without data. The pass is the one of step 0 with most rows that
    need a derivative and a velocity. On CPUs, real steps have agreed within 3 %.
    Raises ValueError where the sizes do not fit, or a number is below 1.
    """
    for name, value in (("rows_per_pass", rows_per_pass), ("num_shards", num_shards)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but got {value}")
    sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}
    kept, forward_peak, backward_peak = _bytes_of_pass(config, rows_per_pass, tuple(sizes.items()))
    with torch.device("meta"):
        network = build_network(config.network, **sizes)
    share = -(-FLOAT32_BYTES * _count(network) // num_shards)
    temporaries = max(forward_peak, backward_peak) - kept
    if num_shards > 1:
        temporaries += _gathered_bytes(network)
    return MemoryEstimate(
        parameters=share,
        gradients=share,
        optimizer=2 * share,
        averages=len(config.ema_decays) * share,
        activations=kept,
        # Adam over lists of tensors takes the root of all its second moments at once.
        temporaries=max(temporaries, share - kept),
    )


@lru_cache(maxsize=64)  # seconds for a deep network, and the same for any number of shards
def _bytes_of_pass(
    config: TrainingConfig, rows_per_pass: int, sizes: tuple[tuple[str, int], ...]
) -> tuple[int, int, int]:
    """`_traced_bytes` of the heaviest pass of so many rows."""
    record = _heaviest_pass(config, rows_per_pass)

    def trace(network_config: NetworkConfig) -> np.ndarray:
        return _traced_bytes(replace(config, network=network_config), record, dict(sizes))

    # Deep enough that the worst moment is the same as in a deeper one.
    kept, forward_peak, backward_peak = (int(n) for n in _at_full_depth(config.network, trace, shallow=3))
    return kept, forward_peak, backward_peak


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _gathered_bytes(network: AnyNetwork) -> int:
    """Whole parameters, and gradients not yet shared out, that FSDP2 holds at once: of blocks, and of all the rest."""
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    blocks = [_count(block) for blocks in lists for block in blocks]
    return 2 * FLOAT32_BYTES * (GATHERED_BLOCKS * max(blocks) + _count(network) - sum(blocks))


def _at_full_depth(
    config: NetworkConfig, measure: Callable[[NetworkConfig], np.ndarray], *, shallow: int
) -> np.ndarray:
    """`measure`, affine in the numbers of blocks of each kind, at the network's own: from networks with few of each."""
    heads = config.aux_head_depth if config.architecture == "imf_dit" else 0
    wanted = (config.depth - heads, heads)

    def at(trunk: int, heads: int) -> np.ndarray:
        return measure(replace(config, depth=trunk + heads, aux_head_depth=heads))  # a DiT does not read the second

    first = (min(shallow, wanted[0]), min(shallow, wanted[1]))
    base = total = at(*first)
    for kind in range(2):
        more = wanted[kind] - first[kind]
        if more > 0:
            one_more = at(first[0] + (kind == 0), first[1] + (kind == 1))
            total = total + more * (one_more - base)
    return total


def _mean_record(config: TrainingConfig, rows: int) -> StepRecord:
    """Draws of step 0 for so many rows, none of them padding."""
    record = draw_step_record(config.loss, seed=config.seed, step=0, num_rows=rows, latent_shape=(1, 1, 1))
    return replace(record, rows_velocity=torch.cat([record.rows_conditional, record.rows_null]))


def _derivative(network: AnyNetwork, record: StepRecord) -> torch.Tensor:
    """du/dt of a record's rows with r < t in a pass of its own, on tensors without data."""
    size = (len(record.rows_below), network.config.in_channels, network.config.sample_size, network.config.sample_size)
    z, of_row = torch.empty(size), torch.empty(size[0])
    guidance = (
        {}
        if record.omega is None
        else {"omega": of_row, "guidance_interval_start": of_row, "guidance_interval_end": of_row}
    )
    return total_derivative(network, z, Conditioning(t=of_row, r=of_row, labels=of_row.long(), **guidance), z)


def _loss(
    network: AnyNetwork, config: LossConfig, record: StepRecord, *, separate_derivative: bool = False
) -> torch.Tensor:
    """The objective of a record's rows, on tensors without data of the kind that is made in the caller's context."""
    size = (len(record.t), network.config.in_channels, network.config.sample_size, network.config.sample_size)
    given: Mapping[str, Any] = {field.name: getattr(record, field.name) for field in fields(record)}
    empty = {name: torch.empty(v.shape, dtype=v.dtype) for name, v in given.items() if v is not None}
    empty |= {"noise": torch.empty(size), "posterior_noise": torch.empty(size)}
    return meanflow_loss(
        network,
        network,
        torch.empty(size),
        torch.empty(size[0], dtype=torch.int64),
        replace(record, **empty),
        config,
        null_label=network.config.num_classes,
        global_num_rows=size[0],
        separate_derivative=separate_derivative,
    ).loss


def _count_flops(function: Callable[[], object]) -> np.ndarray:
    # Fused attention would count as nothing, or with what it computes again.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return np.array([float(counter.get_total_flops())])


def _heaviest_pass(config: TrainingConfig, rows_per_pass: int) -> StepRecord:
    num_rows = max(config.global_batch_size, rows_per_pass)
    record = draw_step_record(config.loss, seed=config.seed, step=0, num_rows=num_rows, latent_shape=(1, 1, 1))
    starts = range(0, num_rows - rows_per_pass + 1, rows_per_pass)
    passes = (record.rows(start, start + rows_per_pass, config.loss) for start in starts)
    return max(passes, key=lambda record: (len(record.rows_below), len(record.rows_velocity)))


class _LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make, until nobody holds them."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        """known: tensors that are not counted."""
        super().__init__()
        self.now = self.peak = 0
        self._storages = WeakKeyDictionary({tensor.untyped_storage(): None for tensor in known})

    def _drop(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage not in self._storages:
                self._storages[storage] = None
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                finalize(storage, self._drop, storage.nbytes()).atexit = False
        return result


def _traced_bytes(config: TrainingConfig, record: StepRecord, sizes: Mapping[str, int]) -> np.ndarray:
    """(3,): bytes alive when backward begins, and the most before and after, of one pass of these rows.

    Parameters, buffers and gradients are not counted, though a layer's gradient is until it is added to the others.
    """
    # Tensors that pretend to be a CPU's: its fused attention keeps what a GPU's does, and meta tensors have none.
    with FakeTensorMode():
        network = build_network(config.network, **sizes).train()
        if config.activation_checkpointing:
            network.enable_gradient_checkpointing()
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        with _LiveBytes([*network.parameters(), *network.buffers(), *gradients]) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss = _loss(network, config.loss, record, separate_derivative=config.separate_derivative)
            kept, forward_peak = live.now, live.peak
            live.peak = live.now
            loss.backward()
        return np.array([kept, forward_peak, live.peak])
