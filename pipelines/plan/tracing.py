"""Runs networks and objectives on tensors without data, and counts their FLOPs and their bytes.

# C channels, H W latent size
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, finalize

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from meanflow_core.config import LossConfig, NetworkConfig
from meanflow_core.networks.building import build_network
from meanflow_core.networks.forward_mode import ForwardModeNetwork
from meanflow_core.networks.interface import NetworkModel
from meanflow_core.objectives.interface import Loss, Record, build_objective


class DataDependentError(ValueError):
    """The network or the objective reads values of tensors, so it cannot run without data."""


def fake_network(config: NetworkConfig, sizes: Mapping[str, int], *, checkpointing: bool = False) -> NetworkModel:
    """A network for a FakeTensorMode."""
    network = build_network(config, **sizes)
    if checkpointing:
        network.enable_gradient_checkpointing()
    if isinstance(network, ForwardModeNetwork):
        network.differentiate = _three_forwards
    return network


def _three_forwards(function: Callable[..., torch.Tensor], primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Has the FLOPs of torch.func.jvp, which fails on fake tensors: a product has two derivatives, one in each factor."""
    function(*primals)
    return function(*primals), function(*primals)


def run_objective(
    network: NetworkModel, config: LossConfig, latents: torch.Tensor, record: Record, *, separate_derivative: bool
) -> Loss:
    """The objective of a record's samples, all of class 0, on the device of the tensors."""
    num_rows = len(latents)
    return build_objective(config).loss(
        network,
        network,
        latents,
        torch.zeros(num_rows, dtype=torch.int64, device=latents.device),
        record,
        null_label=network.config.num_classes,
        global_num_rows=num_rows,
        separate_derivative=separate_derivative,
    )


def loss_without_data(
    network: NetworkModel, config: LossConfig, record: Record, *, separate_derivative: bool = False
) -> torch.Tensor:
    """The objective of a record's samples on tensors without data: the caller's FakeTensorMode or meta device."""
    latent_shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)

    def without_data(value: torch.Tensor) -> torch.Tensor:
        return torch.empty((len(value), *latent_shape) if value.dim() == 4 else value.shape, dtype=value.dtype)

    with without_values():
        empty = record.map(without_data)
        latents = torch.empty_like(empty.posterior_noise)
        return run_objective(network, config, latents, empty, separate_derivative=separate_derivative).loss


@contextmanager
def without_values() -> Iterator[None]:
    """Turns the errors of reading the value of a tensor without data into a DataDependentError."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        raise DataDependentError(f"the network or the objective does not run without data: {error}") from error


def shallowest(config: NetworkConfig) -> NetworkConfig:
    """The configuration with one block of each kind."""
    return config.with_block_counts(tuple(min(1, count) for count in config.block_counts))


def at_full_depth(config: NetworkConfig, measure: Callable[[NetworkConfig], np.ndarray], *, shallow: int) -> np.ndarray:
    """Extrapolates `measure`, which is affine in the number of blocks of each kind, from shallow networks.

    shallow: number of blocks of each kind in the shallowest network.
    """
    depths = config.block_counts
    first = tuple(min(shallow, depth) for depth in depths)
    base = total = measure(config.with_block_counts(first))
    for kind, depth in enumerate(depths):
        more = depth - first[kind]
        if more > 0:
            one_more = measure(config.with_block_counts(tuple(n + (i == kind) for i, n in enumerate(first))))
            total = total + more * (one_more - base)
    return total


class _FlopsOfDtype(TorchDispatchMode):
    """Counts the FLOPs of products whose first operand has a dtype."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.total = 0.0
        self._dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if count is not None and tensors[0].dtype == self._dtype:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def count_flops(function: Callable[[], object], only_dtype: torch.dtype | None = None) -> np.ndarray:
    """(2,): the FLOPs of a call, and those in only_dtype (0 without it)."""
    # Fused attention would be counted as zero, or with its recomputation. By default, math attention upcasts to float32.
    part, before = _FlopsOfDtype(only_dtype), torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), part:
            function()
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
    return np.array([float(counter.get_total_flops()), part.total])


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of all storages that operations create, until they are freed."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        """known: tensors to exclude."""
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
