"""MeanFlow on the cosine path, with a pseudo-Huber loss: an objective, its configuration and a preset.

z_t   = cos(a) x + sin(a) e                     noisy latent, with a = pi t / 2
v     = pi / 2 (cos(a) e - sin(a) x)            its velocity dz_t / dt
u_tgt = stop_gradient(v - (t - r) du/dt)        du/dt: derivative along (dz, dt, dr) = (v, 1, 0)
loss  = 1/B sum over samples of sqrt(||u - u_tgt||^2 + c^2) - c
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from meanflow_core.config import LossConfig, NetworkConfig, OptimizerConfig, TimeSamplingConfig, TrainingConfig
from meanflow_core.networks.interface import Network
from meanflow_core.objectives.draws import DrawnStep, StepDraws, draw_step, draw_two_times
from meanflow_core.objectives.flow import total_derivative
from meanflow_core.objectives.interface import Loss, Mean, Objective


@dataclass(frozen=True, kw_only=True)
class PlainNetConfig(NetworkConfig):
    """Arguments of the network's constructor."""

    network: ClassVar[str] = "my_network:PlainNet"
    patch_size: int = 2
    width: int = 128
    depth: int = 6


@dataclass(frozen=True, kw_only=True)
class CosineMeanFlowConfig(LossConfig):
    """Numbers of the objective. Each is an option of the command line: --loss.huber 0.1."""

    objective: ClassVar[str] = "my_experiment:CosineMeanFlow"
    times: TimeSamplingConfig = field(default_factory=lambda: TimeSamplingConfig(fraction_r_below_t=0.5))
    huber: float = 1.0
    """The constant c: larger errors count linearly, smaller ones squared."""
    label_drop_probability: float = 0.0


class CosineMeanFlow(Objective[CosineMeanFlowConfig, DrawnStep, StepDraws]):
    """The objective."""

    metric_names = ("squared_error",)

    def draw(self, *, seed: int, step: int, num_rows: int, latent_shape: tuple[int, int, int]) -> DrawnStep:
        """All random numbers of a step, for the batch of all workers: a function of (seed, step), so resume is exact."""
        times = self.config.times
        return draw_step(
            self.config, lambda count, generator: draw_two_times(count, times, generator), seed=seed, step=step,
            fraction_r_below_t=times.fraction_r_below_t, num_rows=num_rows, latent_shape=latent_shape,
        )  # fmt: skip

    def record(self, draws: DrawnStep, start: int, stop: int) -> StepDraws:
        """One worker's part of them, with its noise, still on the CPU."""
        return draws.rows(start, stop)

    def loss(
        self, training_network: Network, network: Network, latents: torch.Tensor, labels: torch.Tensor,
        record: StepDraws, *, null_label: int, global_num_rows: int, separate_derivative: bool = False,
    ) -> Loss:  # fmt: skip
        """The loss of one worker's samples, as a share of the mean over all workers."""
        conditioning = record.conditioning(labels, null_label)
        t, r = record.t.view(-1, 1, 1, 1), record.r.view(-1, 1, 1, 1)
        cos, sin = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
        z = cos * latents + sin * record.noise
        v = (cos * record.noise - sin * latents) * math.pi / 2
        target = v - (t - r) * total_derivative(network, z, conditioning, v)
        u = training_network(z, conditioning).average_velocity
        squared_error = (u.float() - target).square().flatten(1).sum(dim=1)  # (B,)
        loss = torch.sqrt(squared_error + self.config.huber**2) - self.config.huber
        mean = Mean(squared_error.detach().sum(), len(labels))
        return Loss(loss=loss.sum() / global_num_rows, metrics={"squared_error": mean})


def cosine() -> TrainingConfig:
    """A preset: the demo's drawn shapes, 1.2 M parameters, a few minutes on 2 CPU cores."""
    return TrainingConfig(
        network=PlainNetConfig(),
        loss=CosineMeanFlowConfig(),
        optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, warmup_steps=60, cooldown_steps=200),
        ema_decays=(0.99,),
        global_batch_size=128,
        num_steps=600,
        checkpoint_interval_steps=200,
        sample_interval_steps=200,
    )
