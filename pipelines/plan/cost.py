"""Costs of a training run, counted before it starts: parameters, floating-point operations (FLOPs) and memory.

The objective runs on tensors without data, and its FLOPs and allocations are counted. All blocks of a kind cost the
same, so the cost of a deep network is extrapolated from two or three shallow ones.

    # B batch, C channels, H W latent size
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meanflow_core.config import LossConfig, NetworkConfig, TrainingConfig
from meanflow_core.networks.building import build_network
from meanflow_core.networks.interface import Conditioning, NetworkModel
from meanflow_core.objectives.interface import build_objective
from pipelines.plan.tracing import (
    LiveBytes,
    at_full_depth,
    count_flops,
    fake_network,
    loss_without_data,
    run_objective,
    shallowest,
    without_values,
)

FLOAT32_BYTES = 4
# Samples drawn to estimate the fractions that need velocities or du/dt: enough for FLOPs within 0.2 % of the long-run mean.
NUM_DRAWN_SAMPLES = 8192
NUM_TRIED_SAMPLES = 8
# Under FSDP2: the current block and the prefetched one, each with parameters and gradient.
GATHERED_BLOCKS = 2


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one device in a training step.

    Includes the persistent state and the tensors of one pass through the objective. Excludes the CUDA context and library
    workspaces (about 1 GB), the allocator's fragmentation and rounding, effects of torch.compile, communication buffers, and
    the autoencoder and sampling of the worker that draws images.
    """

    parameters: int
    """This device's share, in float32."""
    gradients: int
    """This device's share, in float32."""
    optimizer: int
    """This device's share of Adam's two moments."""
    averages: int
    """This device's share of the moving averages."""
    activations: int
    """Tensors alive when backward begins. Under bfloat16, these include bfloat16 copies of the parameters, not sharded."""
    temporaries: int
    """Bytes at the peak of a step beyond all of the above. The peak is the larger of the pass's and the optimiser's. The
    optimiser runs after the activations are freed, and its temporaries are as large as the parameters. With shards, the
    pass's peak includes an allowance for gathered blocks."""

    @property
    def total(self) -> int:
        """The sum."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class ExecutedFlops:
    """FLOPs that a step executes, over the global batch."""

    in_precision: float
    """FLOPs at the configured precision."""
    of_derivative: float
    """FLOPs of the separate pass that computes du/dt under bfloat16, at config.derivative_precision; else 0."""


def num_parameters(config: NetworkConfig, *, sample_size: int, in_channels: int, num_classes: int) -> int:
    """Number of parameters in training, including improved MeanFlow's v head.

    Raises ValueError for incompatible sizes, or DataDependentError.
    """
    with torch.device("meta"):
        network = build_network(config, sample_size=sample_size, in_channels=in_channels, num_classes=num_classes)
    return _count(network)


def num_sampling_parameters(config: NetworkConfig, *, sample_size: int, in_channels: int, num_classes: int) -> int:
    """`num_parameters` without improved MeanFlow's v head."""
    with torch.device("meta"):
        network = build_network(config, sample_size=sample_size, in_channels=in_channels, num_classes=num_classes)
        return _count(network.for_sampling())


def checkpoint_bytes(config: TrainingConfig, *, sample_size: int, in_channels: int, num_classes: int) -> int:
    """Bytes of a checkpoint's tensors: parameters, averages and Adam's moments in float32, without headers."""
    sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}
    return FLOAT32_BYTES * num_parameters(config.network, **sizes) * (3 + len(config.ema_decays))


def forward_flops(config: NetworkConfig, *, sample_size: int, in_channels: int, num_classes: int) -> float:
    """FLOPs of one function evaluation on one image in sampling, without improved MeanFlow's v head.

    A multiply-add counts as two FLOPs; papers on image generators usually count it as one. Only matrix products and
    convolutions are counted, including those of attention.
    """
    sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}

    def count(config: NetworkConfig) -> np.ndarray:
        with FakeTensorMode(), torch.no_grad():
            network = fake_network(config, sizes).for_sampling()
            z = torch.empty(1, in_channels, sample_size, sample_size)
            per_sample = torch.empty(1)
            guidance = (
                {"omega": per_sample, "guidance_interval_start": per_sample, "guidance_interval_end": per_sample}
                if network.supports_guidance
                else {}
            )
            conditioning = Conditioning(t=per_sample, r=per_sample, labels=per_sample.long(), **guidance)
            with without_values():
                return count_flops(lambda: network(z, conditioning))

    return float(at_full_depth(config, count, shallow=1)[0])


@lru_cache(maxsize=64)
def step_flops(
    config: TrainingConfig,
    *,
    sample_size: int,
    in_channels: int,
    num_classes: int,
    num_drawn_samples: int = NUM_DRAWN_SAMPLES,
) -> float:
    """Model FLOPs of one optimiser step over the global batch, averaged over the phases of the objective.

    These are the FLOPs that the mathematics requires, independent of precision, sharding and compilation, as used for model
    FLOPs utilisation (MFU). Recomputation is excluded: the second forward of a separate du/dt pass, activation checkpointing,
    and the padding of the no-grad forward's batch. A multiply-add counts as two. Only matrix products and convolutions
    are counted, including those of attention; they are about 99 % of the work.

    num_drawn_samples: how many samples to draw as in training, to estimate the fractions with r < t and with guidance. With
    the default, 8,192, the result is within 0.2 % of the long-run mean; a single step of 256 samples differs by about 1 %.
    Raises ValueError for incompatible sizes, or DataDependentError.
    """
    sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}
    return float(_flops(config, sizes, num_drawn_samples, with_recomputation=False)[0])


@lru_cache(maxsize=64)
def executed_flops(config: TrainingConfig, *, sample_size: int, in_channels: int, num_classes: int) -> ExecutedFlops:
    """FLOPs that a step executes under `config`, averaged over the phases of the objective.

    Adds recomputation to `step_flops`: the separate du/dt pass under bfloat16 or activation checkpointing, and the forward
    that checkpointing repeats. The padding of the no-grad forward's batch is excluded.

    Raises ValueError for incompatible sizes, or DataDependentError.
    """
    sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}
    if not config.separate_derivative:  # nothing is recomputed
        return ExecutedFlops(in_precision=step_flops(config, **sizes), of_derivative=0.0)
    total, of_derivative = _flops(config, sizes, NUM_DRAWN_SAMPLES, with_recomputation=True)
    return ExecutedFlops(in_precision=float(total - of_derivative), of_derivative=float(of_derivative))


def _flops(
    config: TrainingConfig, sizes: Mapping[str, int], num_drawn_samples: int, *, with_recomputation: bool
) -> np.ndarray:
    """(2,): FLOPs of a step, averaged over the phases, and with recomputation under bfloat16 those of float32 operands."""
    is_bfloat16 = with_recomputation and config.precision == "bfloat16"

    def of_phase(loss: LossConfig) -> np.ndarray:
        record = _unpadded_record(loss, config.seed, num_drawn_samples)

        def count(network_config: NetworkConfig) -> np.ndarray:
            with FakeTensorMode():  # not meta tensors, which have no autocast
                is_checkpointed = with_recomputation and config.activation_checkpointing
                network = fake_network(network_config, sizes, checkpointing=is_checkpointed)
                with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16):
                    return count_flops(
                        lambda: loss_without_data(
                            network, loss, record, separate_derivative=with_recomputation
                        ).backward(),
                        only_dtype=torch.float32 if is_bfloat16 else None,
                    )

        return at_full_depth(config.network, count, shallow=1)

    phases = config.loss.phases(config.num_steps)
    total = sum((fraction * of_phase(loss) for fraction, loss in phases), start=np.zeros(2))
    return total * config.global_batch_size / num_drawn_samples


def num_network_calls(config: TrainingConfig, *, sample_size: int, in_channels: int, num_classes: int) -> int:
    """Number of forwards of the network in one pass, in the phase of the objective that has the most."""
    sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}

    def calls(loss: LossConfig) -> int:
        found: list[None] = []
        record = _record(loss, config.seed, config.global_batch_size)
        with FakeTensorMode():
            network = fake_network(shallowest(config.network), sizes)
            network.register_forward_pre_hook(lambda *_: found.append(None))
            loss_without_data(network, loss, record, separate_derivative=config.separate_derivative)
        return len(found)

    return max(calls(loss) for _, loss in config.loss.phases(config.num_steps))


def try_step(config: TrainingConfig, *, sample_size: int, in_channels: int, num_classes: int) -> None:
    """Runs a step in every phase of the objective, with one block of each kind.

    On tensors without data if network and objective are of this package, else on a few samples of noise, because another
    network or objective may depend on values. Raises ValueError if the network cannot be built, if the step fails, or if
    its metrics are not the objective's `metric_names`.
    """
    names = config.network.network, config.loss.objective
    is_ours = all(name.startswith("meanflow_core.") for name in names)
    with torch.device("meta" if is_ours else "cpu"):  # fake tensors have no forward-mode AD
        network = build_network(
            shallowest(config.network), sample_size=sample_size, in_channels=in_channels, num_classes=num_classes
        )
    for _, loss in config.loss.phases(config.num_steps):
        if is_ours:
            record = _record(loss, config.seed, config.global_batch_size)
            with torch.device("meta"):
                loss_without_data(network, loss, record, separate_derivative=config.separate_derivative)
        else:
            _try_on_noise(config, loss, network.train())


def _try_on_noise(config: TrainingConfig, loss: LossConfig, network: NetworkModel) -> None:
    objective = build_objective(loss)
    shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)
    try:
        draws = objective.draw(seed=config.seed, step=0, num_rows=NUM_TRIED_SAMPLES, latent_shape=shape)
        record = objective.record(draws, 0, NUM_TRIED_SAMPLES)
        output = run_objective(
            network, loss, record.posterior_noise, record, separate_derivative=config.separate_derivative
        )
        output.loss.backward()
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"a step of {NUM_TRIED_SAMPLES} samples of noise fails with {config.network.network} and {loss.objective}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if set(output.metrics) != set(objective.metric_names):
        raise ValueError(
            f"the metrics of {loss.objective} must be its metric_names {', '.join(objective.metric_names)}, but its loss "
            f"returns {', '.join(output.metrics)}"
        )


def memory_estimate(
    config: TrainingConfig,
    *,
    sample_size: int,
    in_channels: int,
    num_classes: int,
    samples_per_pass: int,
    num_shards: int = 1,
) -> MemoryEstimate:
    """Memory of one device with micro-batches of at most samples_per_pass samples.

    Parameters, gradients, Adam's moments and averages are float32 and divided by num_shards (FSDP2); gradients are always
    allocated, as in a step of several passes. Activations and temporaries come from tracing the objective and its backward
    without data, at the configured precision and activation checkpointing, with fused attention. The traced pass is the one
    of step 0 with the most samples that need du/dt; among equals, the one with the largest no-grad forward; in the phase
    of the objective that needs the most. Real steps on CPUs agree within 3 %. The optimiser's share is Adam's; muon
    stores one moment instead of two for its matrices.
    Raises ValueError for incompatible sizes, or numbers below 1.
    """
    for name, value in (("samples_per_pass", samples_per_pass), ("num_shards", num_shards)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but got {value}")
    sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}
    kept, forward_peak, backward_peak = _bytes_of_pass(config, samples_per_pass, tuple(sizes.items()))
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
        # Adam with foreach takes the square root of all second moments at once.
        temporaries=max(temporaries, share - kept),
    )


@lru_cache(maxsize=64)  # takes seconds for a deep network, and is the same for any number of shards
def _bytes_of_pass(
    config: TrainingConfig, samples_per_pass: int, sizes: tuple[tuple[str, int], ...]
) -> tuple[int, int, int]:
    """`_traced_bytes` of `_heaviest_pass`, at full depth, in the phase with the highest peak."""

    def traced(loss: LossConfig) -> tuple[int, int, int]:
        record = _heaviest_pass(config, loss, samples_per_pass)

        def trace(network_config: NetworkConfig) -> np.ndarray:
            return _traced_bytes(replace(config, network=network_config), loss, record, dict(sizes))

        # From three blocks of a kind on, memory peaks at the same point of the pass.
        kept, forward_peak, backward_peak = (int(n) for n in at_full_depth(config.network, trace, shallow=3))
        return kept, forward_peak, backward_peak

    return max((traced(loss) for _, loss in config.loss.phases(config.num_steps)), key=lambda found: max(found[1:]))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _gathered_bytes(network: NetworkModel) -> int:
    """Unsharded parameters and gradients that FSDP2 holds at once: of GATHERED_BLOCKS blocks and of all other layers."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    blocks = [_count(block) for blocks in lists for block in blocks]
    rest = max(0, _count(network) - sum(blocks))
    return 2 * FLOAT32_BYTES * (GATHERED_BLOCKS * max(blocks, default=0) + rest)


def _record(config: LossConfig, seed: int, num_samples: int) -> Any:
    """The record of step 0 with this many samples, with latents of shape (1, 1, 1)."""
    objective = build_objective(config)
    draws = objective.draw(seed=seed, step=0, num_rows=num_samples, latent_shape=(1, 1, 1))
    return objective.record(draws, 0, num_samples)


def _unpadded_record(config: LossConfig, seed: int, num_samples: int) -> Any:
    """`_record` without padding of the no-grad forward's batch."""
    return build_objective(config).unpadded(_record(config, seed, num_samples))


def _heaviest_pass(config: TrainingConfig, loss: LossConfig, samples_per_pass: int) -> Any:
    """The record of the pass of step 0 that needs the most memory."""
    num_rows = max(config.global_batch_size, samples_per_pass)
    objective = build_objective(loss)
    draws = objective.draw(seed=config.seed, step=0, num_rows=num_rows, latent_shape=(1, 1, 1))
    starts = range(0, num_rows - samples_per_pass + 1, samples_per_pass)
    return max((objective.record(draws, start, start + samples_per_pass) for start in starts), key=objective.costs)


def _traced_bytes(config: TrainingConfig, loss: LossConfig, record: Any, sizes: Mapping[str, int]) -> np.ndarray:
    """(3,): bytes alive when backward begins, and the peaks before and after, in one pass.

    Excludes parameters, buffers and gradients, but includes a layer's gradient until it is accumulated.
    """
    # Fake CPU tensors: their fused attention saves the same tensors as a GPU's; meta tensors have no fused attention.
    with FakeTensorMode():
        network = fake_network(config.network, sizes, checkpointing=config.activation_checkpointing).train()
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        with LiveBytes([*network.parameters(), *network.buffers(), *gradients]) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                output = loss_without_data(network, loss, record, separate_derivative=config.separate_derivative)
            kept, forward_peak = live.now, live.peak
            live.peak = live.now
            output.backward()
        return np.array([kept, forward_peak, live.peak])
