"""alpha-Flow and SoFlow: one identity between two times, with a derivative only for a = 0.

    s     = t - a (t - r),  z_s = z_t - a (t - r) v             v: guided velocity, see `guidance`
    u_tgt = stop_gradient(a v + (1 - a) u(z_s, r, s))
    D     = u(z_t, r, t) - u_tgt,  g = D / a                    g is MeanFlow's error for a -> 0
    loss  = 1/B sum over samples of w ||D||^2 / a               its gradient is 2 w g, as that of MeanFlow's loss

alpha-Flow: w = 1 / (||g||^2 + c / a^2)^p, and a falls from 1 to 0. For a = 1 the target is v. For a = 0 it is MeanFlow's,
with a derivative. SoFlow: w = 1 / (||g||^2 + c)^p, and a falls from 0.1 to 0.002. For r = t, both are flow matching.

SoFlow states the identity for f(z, r, t) = z - (t - r) u: (f(z_t, r, t) - f(z_s, r, s)) / (t - s) = -g.
Source: Zhang et al. 2025, arXiv 2510.20771; Luo et al. 2025, arXiv 2512.15657.

    # B batch, b rows with r < t, C channels, H W latent size
"""

import torch

from meanflow_core.networks.interface import Network
from meanflow_core.objectives import guidance
from meanflow_core.objectives.flow import (
    FlowObjective,
    LossOutput,
    average_velocity_where_r_below_t,
    forward_with_derivative,
)
from meanflow_core.objectives.guidance import per_sample
from meanflow_core.objectives.row_plan import StepRecord
from meanflow_core.presets.alpha_flow import AlphaFlowConfig, SoFlowConfig


class AlphaFlow(FlowObjective[AlphaFlowConfig | SoFlowConfig]):
    """alpha-Flow at one value of its ratio a, which the configuration of each step gives."""

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
        config, a = self.config, self.config.ratio
        assert a is not None, "the ratio depends on the step: build the objective from config.loss_at(step)"
        t, r = per_sample(record.draws.t, latents), per_sample(record.draws.r, latents)
        z, v_sample = guidance.noisy_latents(latents, record)
        conditioning = record.draws.conditioning(labels, null_label)
        # Velocities. For samples with r = t, the conditional one is still missing.
        missing = guidance.missing_velocities(network, z, labels, record, null_label)
        direction = guidance.guided_velocity(v_sample, missing, record)
        # The network at the earlier time, or the derivative
        dudt = u_earlier = torch.zeros_like(z)
        if a == 0.0:
            output, dudt = forward_with_derivative(
                training_network, network, z, conditioning, direction, record, separate=separate_derivative
            )
        else:
            if a < 1.0:
                s, z_s = record.draws.t - a * (record.draws.t - record.draws.r), z - a * (t - r) * direction
                u_earlier = average_velocity_where_r_below_t(
                    network, z_s, s, record.draws.r, conditioning.labels, record
                )
            output = training_network(z, conditioning)
        u = output.average_velocity.to(z.dtype)
        # Target
        v_guided = guidance.guided_velocity(v_sample, missing, record, output)
        if a == 0.0:
            target = v_guided - (t - r) * dudt
        else:
            target = torch.where(r < t, a * v_guided + (1.0 - a) * u_earlier, v_guided)
        # Weight
        error, guarded = guidance.guarded_error(u, target, config.guards)
        is_below = record.draws.r < record.draws.t
        divisor = torch.ones_like(record.draws.t).masked_fill(is_below, a or 1.0)  # (B,): a, or 1 for r = t
        squared = guidance.squared_norm(error)
        weight = self._weight(squared.detach() / divisor.square(), divisor)
        loss = (weight * squared / divisor).sum()
        squared_error = guidance.squared_norm(u.detach() - target) / divisor.square()
        return LossOutput(
            loss=loss / global_num_rows,
            metrics=self._metrics(record, squared_error, dudt if a == 0.0 else None, guarded),
            squared_error=squared_error,
            u=u.detach(),
            v_guided=v_guided,
            tangent=direction[record.plan.below],
            dudt=dudt,
        )

    def _weight(self, squared_g: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
        """w, (B,). squared_g: ||g||^2. divisor: a, or 1 where r = t."""
        return (squared_g + self.config.norm_eps / divisor.square()) ** -self.config.norm_p


class SoFlow(AlphaFlow):
    """SoFlow at one value of its ratio."""

    has_derivative = False

    def _weight(self, squared_g: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
        """w, (B,). squared_g: ||g||^2."""
        return (squared_g + self.config.norm_eps) ** -self.config.norm_p
