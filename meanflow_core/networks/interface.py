"""The interface of networks: conditioning inputs, outputs, and checks of both.

# B batch, b samples with a tangent, C channels, H W latent size
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from diffusers import ConfigMixin, ModelMixin


@dataclass(frozen=True, kw_only=True)
class TensorFields:
    """Base of dataclasses whose fields are tensors, other such dataclasses, or None."""

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Applies a function to every tensor."""

        def apply(value: Any) -> Any:
            if isinstance(value, TensorFields):
                return value.map(function)
            return None if value is None else function(value)

        return replace(self, **{f.name: apply(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device) -> Self:
        """Copies every tensor to `device`."""
        return self.map(lambda value: value.to(device, non_blocking=True))


@dataclass(frozen=True, kw_only=True)
class Conditioning(TensorFields):
    """Conditioning inputs."""

    t: torch.Tensor
    """(B,) float, in [0, 1]: the time of z_t."""
    r: torch.Tensor
    """(B,) float, in [0, t]: the time at which a step from t ends."""
    labels: torch.Tensor
    """(B,) int64: class ids; the id num_classes is the null class."""
    omega: torch.Tensor | None = None
    """(B,) float, at least 1: guidance scale, for improved MeanFlow's network."""
    guidance_interval_start: torch.Tensor | None = None
    """(B,) float, in [0, 1], for improved MeanFlow's network."""
    guidance_interval_end: torch.Tensor | None = None
    """(B,) float, in [guidance_interval_start, 1], for improved MeanFlow's network."""

    def rows(self, index: torch.Tensor) -> "Conditioning":
        """Selects rows by an int64 index (b,)."""
        return self.map(lambda value: value[index])


@dataclass(frozen=True, kw_only=True)
class NetworkOutput:
    """Outputs of a network."""

    u: torch.Tensor | None = None
    """(B, C, H, W): average velocity over [r, t]. None if velocity_only is set and the network has a v head."""
    v: torch.Tensor | None = None
    """(B, C, H, W): instantaneous velocity at t, if the network has a v head."""
    dudt: torch.Tensor | None = None
    """(b, C, H, W), without a graph: du/dt of the first b rows, if a tangent was given."""

    @property
    def average_velocity(self) -> torch.Tensor:
        """(B, C, H, W): u, of a forward without velocity_only."""
        assert self.u is not None, "a network returns u unless velocity_only is set"
        return self.u

    @property
    def velocity(self) -> torch.Tensor:
        """(B, C, H, W): the instantaneous velocity, for a forward with r = t: v if the network has a v head, else u."""
        velocity = self.u if self.v is None else self.v
        assert velocity is not None, "a network returns u or v"
        return velocity


# Registered as a pytree, so that wrappers and compilers find the tensors in an output.
torch.export.register_dataclass(NetworkOutput)


class Network(Protocol):
    """What objectives call: a network, or a wrapper of it such as DistributedDataParallel."""

    def __call__(
        self,
        z: torch.Tensor,
        conditioning: Conditioning,
        tangent: torch.Tensor | None = None,
        velocity_only: bool = False,
    ) -> NetworkOutput:
        """Maps noisy latents (B, C, H, W) to u, to v if there is a v head, and to du/dt of the first b samples.

        tangent: (b, C, H, W): dz of the direction (dz, dt, dr) = (tangent, 1, 0) along which to differentiate u.
        velocity_only: in a network with a v head, compute v only.
        """
        ...


class NetworkModel(ModelMixin, ConfigMixin):
    """Base of networks that training builds and generators save. Its config has sample_size, in_channels and num_classes.

    Blocks that should be compiled together are listed in `_repeated_blocks`; blocks in a ModuleList are sharded one by one.
    """

    supports_guidance: ClassVar[bool] = False
    """Whether guidance scale and interval are inputs of the network."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        # diffusers loads a component only if the module of its class also contains the base class.
        vars(sys.modules[cls.__module__]).setdefault("ModelMixin", ModelMixin)

    def for_sampling(self) -> Self:
        """The network without the parts that only training uses; it shares the parameters."""
        return self


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Disables autocast on this kind of device. The meta device, on which FLOPs are counted, has none."""
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else nullcontext()


def check_patch_size(sample_size: int, patch_size: int) -> None:
    """Raises ValueError if the patch size does not divide the latent size."""
    if sample_size % patch_size:
        raise ValueError(
            f"the latent size must be a multiple of the patch size, but got {sample_size} and {patch_size}"
        )


def check_network_input(
    z: torch.Tensor, conditioning: Conditioning, tangent: torch.Tensor | None, channels: int, size: int
) -> None:
    """Raises ValueError unless z is (B, channels, size, size), each conditioning input has B rows, and the tangent has
    b <= B rows of z's shape."""
    if z.shape[1:] != (channels, size, size):
        raise ValueError(f"latents must have shape (B, {channels}, {size}, {size}), but got {tuple(z.shape)}")
    lengths = {f.name: len(value) for f in fields(conditioning) if (value := getattr(conditioning, f.name)) is not None}
    if any(length != len(z) for length in lengths.values()):
        raise ValueError(f"each conditioning input must have {len(z)} rows, like the latents, but got {lengths}")
    if tangent is not None and (tangent.shape[1:] != z.shape[1:] or len(tangent) > len(z)):
        raise ValueError(
            f"tangent must have shape (b, {channels}, {size}, {size}) with b at most {len(z)}, but got "
            f"{tuple(tangent.shape)}"
        )
