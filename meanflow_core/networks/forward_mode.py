"""Trains any torch.nn.Module: du/dt by torch's forward-mode automatic differentiation.

A module m(z, t, h, labels) -> (B, C, H, W), with h = t - r, becomes u(z_t, r, t, label). Its du/dt is `torch.func.jvp` in
a separate no-grad forward over the rows with r < t: three products per linear layer instead of the two of a network that
is written on (value, tangent) pairs (`dual`).

# B batch, b samples with a tangent, C channels, H W latent size
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow_core.networks.interface import Conditioning, NetworkModel, NetworkOutput, check_network_input
from meanflow_core.references import resolve


class ForwardModeNetwork(NetworkModel):
    """A network made of a plain module.

    Args:
        module: the module's class, as "module:Class". Its constructor takes sample_size, in_channels, num_classes and
            `arguments`; its forward takes noisy latents (B, C, H, W), t and h = t - r, float (B,), and class ids, int64
            (B,), with num_classes as the null class, and returns (B, C, H, W). It must not mix the rows of a batch, and
            every operation needs forward-mode AD: no custom autograd function without `jvp`, no in-place views.
        arguments: further arguments of the constructor.

    Raises ValueError for an unknown class.
    """

    @register_to_config
    def __init__(
        self,
        module: str,
        arguments: Mapping[str, Any] | None = None,
        sample_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.module = _find_class(module)(
            sample_size=sample_size, in_channels=in_channels, num_classes=num_classes, **(arguments or {})
        )

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
        Raises ValueError for mismatched shapes.
        """
        check_network_input(z, conditioning, tangent, self.config.in_channels, self.config.sample_size)
        h = conditioning.t - conditioning.r
        u = self.module(z, conditioning.t, h, conditioning.labels)
        if u.shape != z.shape:
            raise ValueError(
                f"{self.config.module} must return the shape of z {tuple(z.shape)}, but got {tuple(u.shape)}"
            )
        if tangent is None:
            return NetworkOutput(u=u)
        rows = len(tangent)
        primals = z[:rows], conditioning.t[:rows], h[:rows]
        return NetworkOutput(u=u, dudt=self._derivative(primals, conditioning.labels[:rows], tangent))

    def _derivative(
        self, primals: tuple[torch.Tensor, torch.Tensor, torch.Tensor], labels: torch.Tensor, tangent: torch.Tensor
    ) -> torch.Tensor:
        """du/dt, (b, C, H, W), without a graph, in float32 even under autocast."""
        ones = torch.ones_like(primals[1])
        # Math attention: fused kernels have no forward-mode AD (pytorch#165530).
        with (
            torch.no_grad(),
            torch.autocast(tangent.device.type, enabled=False),
            sdpa_kernel(SDPBackend.MATH),
        ):
            return torch.func.jvp(lambda z, t, h: self.module(z, t, h, labels), primals, (tangent, ones, ones))[1]


def _find_class(reference: str) -> type[nn.Module]:
    # In a portable generator, the class is in this very file.
    found = globals().get(reference.partition(":")[2]) or resolve(reference)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"a network must be a subclass of torch.nn.Module, but {reference!r} is {found!r}")
    return found
