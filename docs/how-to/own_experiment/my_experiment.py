"""MeanFlow on the cosine path with a pseudo-Huber loss: an objective, its configuration and a preset.

    z_t   = cos(a) x + sin(a) e                     noisy latent, with a = pi t / 2
    v     = pi / 2 (cos(a) e - sin(a) x)            its velocity dz_t / dt
    u_tgt = stop_gradient(v - (t - r) du/dt)        du/dt: derivative along (dz, dt, dr) = (v, 1, 0)
    loss  = 1/B sum over samples of sqrt(||u - u_tgt||^2 + c^2) - c

# b samples of one pass on one worker
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from meanflow_core.config import LossConfig, NetworkConfig, OptimizerConfig, TimeSamplingConfig, TrainingConfig
from meanflow_core.networks.interface import Network
from meanflow_core.objectives.draws import StepDraws, draw_step, draw_two_times
from meanflow_core.objectives.flow import total_derivative
from meanflow_core.objectives.interface import Loss, Mean, Objective


@dataclass(frozen=True, kw_only=True)
class PlainNetConfig(NetworkConfig):
    """The fields are arguments of the network's constructor."""

    network: ClassVar[str] = "my_network:PlainNet"

    patch_size: int = 2
    width: int = 128
    depth: int = 6


@dataclass(frozen=True, kw_only=True)
class CosineMeanFlowConfig(LossConfig):
    """Every field is an option: --loss.huber 0.1."""

    objective: ClassVar[str] = "my_experiment:CosineMeanFlow"

    times: TimeSamplingConfig = field(default_factory=lambda: TimeSamplingConfig(fraction_r_below_t=0.5))
    huber: float = 1.0
    """The constant c: errors far above it count linearly, not squared."""
    label_drop_probability: float = 0.0


class CosineMeanFlow(Objective[CosineMeanFlowConfig, StepDraws, StepDraws]):
    """The objective."""

    metric_names = ("squared_error",)

    def draw(self, *, seed: int, step: int, num_rows: int, latent_shape: tuple[int, int, int]) -> StepDraws:
        """All random numbers of a step's global batch, a function of (seed, step): this makes a resume exact."""
        times = self.config.times
        return draw_step(
            self.config,
            lambda num_rows, generator: draw_two_times(num_rows, times, generator),
            fraction_r_below_t=times.fraction_r_below_t,
            seed=seed,
            step=step,
            num_rows=num_rows,
            latent_shape=latent_shape,
        )

    def record(self, draws: StepDraws, start: int, stop: int) -> StepDraws:
        """This worker's part of them. Whatever depends on their values would be computed here, on the CPU."""
        return draws.rows(start, stop)

    def loss(
        self,
        training_network: Network,
        network: Network,
        latents: torch.Tensor,
        labels: torch.Tensor,
        record: StepDraws,
        *,
        null_label: int,
        global_num_rows: int,
        separate_derivative: bool = False,
    ) -> Loss:
        """The loss of these samples, divided by the number of samples of all workers."""
        conditioning = record.conditioning(labels, null_label)
        t, r = record.t.view(-1, 1, 1, 1), record.r.view(-1, 1, 1, 1)
        cos, sin = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
        z = cos * latents + sin * record.noise
        v = (cos * record.noise - sin * latents) * math.pi / 2
        target = v - (t - r) * total_derivative(network, z, conditioning, v)
        u = training_network(z, conditioning).u
        assert u is not None
        squared_error = (u.float() - target).square().flatten(1).sum(dim=1)  # (b,)
        loss = torch.sqrt(squared_error + self.config.huber**2) - self.config.huber
        mean = Mean(squared_error.detach().sum(), len(labels))
        return Loss(loss=loss.sum() / global_num_rows, metrics={"squared_error": mean})


def cosine() -> TrainingConfig:
    """A preset: the demo's drawn shapes in about three minutes on 2 CPU cores."""
    return TrainingConfig(
        network=PlainNetConfig(),
        loss=CosineMeanFlowConfig(),
        optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, warmup_steps=100, cooldown_steps=400),
        ema_decays=(0.99,),
        global_batch_size=128,
        num_steps=1500,
        log_interval_steps=25,
        checkpoint_interval_steps=500,
        sample_interval_steps=500,
    )
