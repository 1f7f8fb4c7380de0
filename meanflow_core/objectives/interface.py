"""The interface of training objectives: the random draws of a step, and the loss of its samples.

Training, validation, cost estimates and comparison use an objective through this interface alone. A new one is a class in
a file of its own, and a configuration (`config.LossConfig`) with presets. docs/how-to/own-experiment.md has an example.

    # b samples of one pass on one worker, C channels, H W latent size
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from diffusers import FlowMapEulerDiscreteScheduler, SchedulerMixin

from meanflow_core.config import LossConfig
from meanflow_core.networks.interface import Network
from meanflow_core.references import resolve


class Record(Protocol):
    """The random draws of the samples of one pass, and whatever the objective computes from them on the CPU.

    A `TensorFields` with these properties. Its tensors with four dimensions have the shape of the latents: cost estimates
    draw for latents of shape (1, 1, 1), and then replace them.
    """

    @property
    def posterior_noise(self) -> torch.Tensor:
        """(b, C, H, W) float32, standard normal: for sampling latents from moments."""
        ...

    @property
    def mirrored(self) -> torch.Tensor:
        """(b,) bool: whether to use the moments of the mirror image."""
        ...

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Applies a function to every tensor."""
        ...

    def to(self, device: torch.device) -> Self:
        """Copies every tensor to `device`."""
        ...


D = TypeVar("D")
R = TypeVar("R", bound=Record)
C = TypeVar("C", bound=LossConfig)


class Mean(NamedTuple):
    """A mean over samples, as a sum and a count, which add up over passes, workers and steps."""

    total: torch.Tensor
    """Scalar: the sum over samples."""
    num_samples: torch.Tensor | int
    """The number of these samples, a scalar. Training does not log the mean of an interval that has none."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of some samples, and what to log about them."""

    loss: torch.Tensor
    """Scalar with a graph: a sum over these samples, divided by the number of samples in the global batch."""
    metrics: dict[str, Mean]
    """{name: mean}, detached, one for each of the objective's `metric_names`."""


class Objective(ABC, Generic[C, D, R]):
    """A training objective. It holds its configuration only; all randomness is in the draws."""

    metric_names: tuple[str, ...] = ()
    """What `Loss.metrics` reports. Names that start with "squared_error" are also measured in validation. The log's
    progress line shows those without a slash."""

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def draw(self, *, seed: int, step: int, num_rows: int, latent_shape: tuple[int, int, int]) -> D:
        """The draws of a step's *global* batch of num_rows samples on the CPU, a pure function of (seed, step).

        Every worker calls this. Leave what is large, such as noise, to `record`, which knows the worker's samples.
        latent_shape: (C, H, W).
        """

    @abstractmethod
    def record(self, draws: D, start: int, stop: int) -> R:
        """The record of samples start to stop - 1 of the global batch: the share of a worker or of a pass."""

    @abstractmethod
    def loss(
        self,
        training_network: Network,
        network: Network,
        latents: torch.Tensor,
        labels: torch.Tensor,
        record: R,
        *,
        null_label: int,
        global_num_rows: int,
        separate_derivative: bool = False,
    ) -> Loss:
        """The loss of these samples, a pure function of its arguments.

        Args:
            training_network: called once, with a graph; may be a wrapper that reduces gradients, such as DDP.
            network: the same function without the wrapper, called without a graph. The number of calls must not depend
                on the draws, so that sharded workers make the same collective calls.
            latents: float32 (b, C, H, W), normalised.
            labels: int64 (b,).
            null_label: the class id that replaces dropped labels.
            global_num_rows: number of samples in the global batch.
            separate_derivative: compute du/dt, if there is one, in a separate float32 forward instead of the training
                forward. Use it if the training forward runs under autocast or recomputes its activations.

        Raises ValueError for mismatched shapes.
        """

    def scheduler(self) -> SchedulerMixin:
        """The diffusers scheduler that samples from the trained network."""
        return FlowMapEulerDiscreteScheduler()

    def costs(self, record: R) -> tuple[int, ...]:
        """Numbers of samples that decide how much memory a pass takes, the most important first.

        The pass with the largest tuple is the one that a memory estimate traces. Default: all passes cost the same.
        """
        return ()

    def unpadded(self, record: R) -> R:
        """The record without work that only rounds up batch sizes, for counting a step's FLOPs."""
        return record


def build_objective(config: LossConfig) -> Objective[Any, Any, Any]:
    """The objective with this configuration. Raises ValueError if its class cannot be imported."""
    return resolve(config.objective)(config)
