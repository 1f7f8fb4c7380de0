"""Consistency training, continuous and discrete: u(z_t, 0, t) predicts the image from any time.

    f(z_t, t) = z_t - t u(z_t, 0, t)          f(z, 0) = z by itself

Continuous: f does not change along the path, df/dt = 0, which is MeanFlow's identity with r = 0,

    u_tgt = stop_gradient(v - w t du/dt)      w rises from 0 to 1

with the error normalised as in sCM. Discrete (ECT): two points of one path, s < t, with sigma = t / (1 - t),

    z_s     = z_t - (t - s) v,  sigma_s = max(0, sigma_t (1 - (1 + 8 sigmoid(-sigma_t)) / 2^(k + 1)))
    loss    = ||f(z_t, t) - stop_gradient(f(z_s, s))|| / (sigma_t - sigma_s)

v is the guided velocity (`guidance`); without guidance z_s is the same mixture of image and noise at s. Samples with r = t
train the velocity by flow matching, as in FACM; guidance needs them.

Source: Lu and Song 2024, arXiv 2410.11081; Geng et al. 2024, arXiv 2406.14548; FACM, arXiv 2507.03738.

    # B batch, b rows with r < t, C channels, H W latent size
"""

import torch

from meanflow_core.networks.interface import Network
from meanflow_core.objectives import guidance
from meanflow_core.objectives.draws import r_below_t_mask
from meanflow_core.objectives.flow import FlowObjective, LossOutput, average_velocity_where_r_below_t
from meanflow_core.objectives.guidance import per_sample
from meanflow_core.objectives.meanflow import MeanFlow
from meanflow_core.objectives.row_plan import StepRecord
from meanflow_core.presets.consistency import ContinuousConsistencyConfig, DiscreteConsistencyConfig

Config = ContinuousConsistencyConfig | DiscreteConsistencyConfig


def _draw_times(num_rows: int, config: Config, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """t, logit-normal, and r: 0 in the rows of `r_below_t_mask`, t in the others; each float32 (B,)."""
    times = config.times
    t = torch.sigmoid(times.logit_mean + times.logit_std * torch.randn(num_rows, generator=generator))
    return t, torch.where(r_below_t_mask(num_rows, times.fraction_r_below_t), 0.0, t)


class ContinuousConsistency(MeanFlow):
    """Continuous consistency training at one value of w, which the configuration of each step gives."""

    config: ContinuousConsistencyConfig

    def draw_times(self, num_rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws t, and r = 0 or r = t."""
        return _draw_times(num_rows, self.config, generator)

    @property
    def derivative_weight(self) -> float:
        """w."""
        weight = self.config.derivative_weight
        assert weight is not None, "the weight depends on the step: build the objective from config.loss_at(step)"
        return weight


def previous_time(t: torch.Tensor, stage: int) -> torch.Tensor:
    """ECT's s < t in stage k, (B,) in [0, 1). t: (B,) in (0, 1)."""
    sigma = t / (1.0 - t)
    previous = (sigma * (1.0 - (1.0 + 8.0 * torch.sigmoid(-sigma)) / 2.0 ** (stage + 1))).clamp(min=0.0)
    return previous / (1.0 + previous)


class DiscreteConsistency(FlowObjective[DiscreteConsistencyConfig]):
    """Easy consistency tuning in one stage, which the configuration of each step gives."""

    has_derivative = False

    def draw_times(self, num_rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws t, and r = 0 or r = t."""
        return _draw_times(num_rows, self.config, generator)

    def loss(
        self,
        training_network: Network,
        network: Network,
        latents: torch.Tensor,
        labels: torch.Tensor,
        record: StepRecord,
        *,
        null_label: int,
        global_num_rows: int,
        separate_derivative: bool = False,
    ) -> LossOutput:
        """See `Objective.loss`. The configuration must be the one of a step, `LossConfig.at`."""
        guidance.check_batch(latents, labels, record)
        config, stage, t = self.config, self.config.stage, record.draws.t
        assert stage is not None, "the stage depends on the step: build the objective from config.loss_at(step)"
        z, v_sample = guidance.noisy_latents(latents, record)
        conditioning = record.draws.conditioning(labels, null_label)
        # Velocities. For samples with r = t, the conditional one is still missing.
        missing = guidance.missing_velocities(network, z, labels, record, null_label)
        direction = guidance.guided_velocity(v_sample, missing, record)
        # The image as predicted from the previous time
        s = previous_time(t, stage)
        z_s = z - per_sample(t - s, z) * direction
        u_s = average_velocity_where_r_below_t(network, z_s, s, torch.zeros_like(s), conditioning.labels, record)
        image = z_s - per_sample(s, z) * u_s
        output = training_network(z, conditioning)
        u = output.average_velocity.to(z.dtype)
        # Target: the u whose prediction is that image, or the velocity
        v_guided = guidance.guided_velocity(v_sample, missing, record, output)
        is_below = record.draws.r < t
        target = torch.where(per_sample(is_below, z), (z - image) / per_sample(t, z), v_guided)
        # Weight: f(z_t, t) - image = -t (u - target)
        error, guarded = guidance.guarded_error(u, target, config.guards)
        squared = guidance.squared_norm(error) * torch.where(is_below, t.square(), 1.0)
        gap = t / (1.0 - t) - s / (1.0 - s)
        weight = torch.where(is_below, 1.0 / gap, 1.0) * (squared.detach() + config.norm_eps) ** -config.norm_p
        squared_error = guidance.squared_norm(u.detach() - target)
        return LossOutput(
            loss=(weight * squared).sum() / global_num_rows,
            metrics=self._metrics(record, squared_error, None, guarded),
            squared_error=squared_error,
            u=u.detach(),
            v_guided=v_guided,
            tangent=direction[record.plan.below],
            dudt=torch.zeros_like(z),
        )
