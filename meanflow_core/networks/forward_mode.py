"""Trains any torch.nn.Module: du/dt by torch's forward-mode automatic differentiation.

A module m(z, t, h, labels) -> (B, C, H, W), with h = t - r, becomes u(z_t, r, t, label). Its du/dt is `torch.func.jvp` in
a no-grad forward over the rows with r < t, which takes three products per linear layer. A network that is written on
(value, tangent) pairs (`dual`) adds one product to the training forward instead.

# B batch, b samples with a tangent, C channels, H W latent size
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow_core.networks.interface import (
    Conditioning,
    NetworkModel,
    NetworkOutput,
    check_network_input,
    without_autocast,
)
from meanflow_core.references import resolve

# {"module:Class": class} of the modules in this file. A portable generator fills it.
EMBEDDED_MODULES: dict[str, type[nn.Module]] = {}
# What torch says about an operation that it cannot differentiate in forward mode.
_FORWARD_MODE_ERRORS = ("forward AD", "forward mode AD", "functorch", "doesn't have storage")


class ForwardModeNetwork(NetworkModel):
    """A network made of a plain module.

    Args:
        module_class: the module's class, as "module:Class". Its constructor takes sample_size, in_channels, num_classes
            and `arguments`; its forward takes noisy latents (B, C, H, W), t and h = t - r, float (B,), and class ids,
            int64 (B,), with num_classes as the null class, and returns (B, C, H, W). It is a function of its inputs
            that treats each row of a batch alone: no dropout, no batch normalisation. Every operation needs forward-mode
            AD: a custom autograd function needs `setup_context` and `jvp`, and there are no out= arguments.
        arguments: further arguments of the constructor.

    Raises ValueError for an unknown class, other arguments than the constructor's, or layers that break these rules.
    """

    differentiate: Callable[..., Any] = staticmethod(torch.func.jvp)
    """(function, primals, tangents) -> its value and its derivative. Estimates of memory replace it."""

    @register_to_config
    def __init__(
        self,
        module_class: str,
        arguments: Mapping[str, Any] | None = None,
        sample_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        sizes = {"sample_size": sample_size, "in_channels": in_channels, "num_classes": num_classes}
        self.module = _build_module(module_class, {**sizes, **(arguments or {})})
        for layer in self.module.modules():
            if isinstance(layer, nn.GroupNorm):  # its forward-mode AD views its input, which fails after attention
                layer.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())

    def forward(
        self,
        z: torch.Tensor,
        conditioning: Conditioning,
        tangent: torch.Tensor | None = None,
        velocity_only: bool = False,
    ) -> NetworkOutput:
        """Computes u of noisy latents z_t, float (B, C, H, W).

        tangent: (b, C, H, W), b <= B: also compute du/dt of the first b rows along (dz, dt, dr) = (tangent, 1, 0).
        velocity_only: ignored; only networks with a v head use it.
        Raises ValueError for mismatched shapes, and for an operation without forward-mode AD.
        """
        check_network_input(z, conditioning, tangent, self.config.in_channels, self.config.sample_size)
        inputs = z, conditioning.t, conditioning.t - conditioning.r
        if tangent is None:
            return NetworkOutput(u=self._checked(self.module(*inputs, conditioning.labels), z))
        rows = len(tangent)
        primals = inputs[0][:rows], inputs[1][:rows], inputs[2][:rows]
        if rows == len(z) and not torch.is_grad_enabled():  # the derivative's forward has u, too
            u, dudt = self._derivative(primals, conditioning.labels, tangent)
            return NetworkOutput(u=u, dudt=dudt)
        u = self._checked(self.module(*inputs, conditioning.labels), z)
        return NetworkOutput(u=u, dudt=self._derivative(primals, conditioning.labels[:rows], tangent)[1])

    def _derivative(
        self, primals: tuple[torch.Tensor, torch.Tensor, torch.Tensor], labels: torch.Tensor, tangent: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """u and du/dt, each (b, C, H, W), without a graph, in float32 even under autocast."""

        ones = torch.ones_like(primals[1])

        def function(z: torch.Tensor, t: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            # Not self.module(...), which may be compiled.
            return self._checked(self.module.forward(z, t, h, labels), z)

        with torch.no_grad(), without_autocast(tangent.device), _unfused_attention():
            try:
                u, dudt = self.differentiate(function, primals, (tangent, ones, ones))
            except RuntimeError as error:
                if any(words in str(error) for words in _FORWARD_MODE_ERRORS):
                    raise ValueError(
                        f"{self.config.module_class} has an operation without forward-mode AD, which du/dt needs: "
                        f"{str(error).splitlines()[0]}; replace the operation, or make it a torch.autograd.Function with "
                        "setup_context and jvp"
                    ) from error
                error.add_note(
                    f"This happened in the forward-mode AD of {self.config.module_class}, which computes du/dt. "
                    "See 'Rules for the network' in docs/how-to/own-experiment.md."
                )
                raise
        return u, dudt

    def _checked(self, u: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if u.shape != z.shape:
            raise ValueError(
                f"{self.config.module_class} must return the shape of z {tuple(z.shape)}, but got {tuple(u.shape)}"
            )
        return u

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the module as a whole. The forward of du/dt is not compiled."""
        self.module.compile(*args, **kwargs)

    def enable_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError: the module itself decides what to recompute."""
        raise ValueError(
            "activation_checkpointing is for this package's networks; call torch.utils.checkpoint.checkpoint(block, ..., "
            f"use_reentrant=False) in the forward of {self.config.module_class} if torch.is_grad_enabled()"
        )


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Math attention: fused kernels have no forward-mode AD (pytorch#165530)."""
    has_fast_path = torch.backends.mha.get_fastpath_enabled()  # of nn.MultiheadAttention, in evaluation mode
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(has_fast_path)


def find_network_class(reference: str) -> type[nn.Module]:
    """The network class that "module:Class" refers to: a NetworkModel or another torch.nn.Module.

    Imports the module. Raises ValueError if there is no such class, or if it is something else.
    """
    found = EMBEDDED_MODULES.get(reference) or resolve(reference)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"a network must be a subclass of torch.nn.Module, but {reference!r} is {found!r}")
    return found


def _build_module(reference: str, arguments: dict[str, Any]) -> nn.Module:
    module_class = find_network_class(reference)
    try:
        inspect.signature(module_class).bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"the constructor of {reference} must take {', '.join(arguments)} as arguments, but: {error}"
        ) from error
    try:
        inspect.signature(module_class.forward).bind(None, "z", "t", "h", "labels")
    except TypeError as error:
        raise ValueError(f"the forward of {reference} must take z, t, h and labels, but: {error}") from error
    module = module_class(**arguments)
    for name, layer in module.named_modules():
        is_random = isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0
        is_random |= isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)) and layer.dropout > 0
        if is_random or isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{reference} must treat each sample alone and be a function of its inputs, but {name} is "
                f"{type(layer).__name__}; use layer or group normalisation, and no dropout"
            )
    return module
