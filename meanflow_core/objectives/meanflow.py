"""Flow matching, MeanFlow and improved MeanFlow.

    z_t   = (1 - t) x + t e                       noisy latent
    v     = guided velocity                       see `guidance`
    u_tgt = stop_gradient(v - (t - r) du/dt)      du/dt: derivative along (dz, dt, dr) = (tangent, 1, 0)
    loss  = 1/B sum over samples of w ||u - u_tgt||^2

Flow matching: r = t for every sample.

MeanFlow: the tangent is v, or the network's own v(z_t, t | y).

Improved MeanFlow: omega and its interval are drawn per sample and are inputs of the network; (a, k, n) =
(1, 1 - 1/omega, 1/omega - 1). The tangent is the network's own v(z_t, t | y), from its v head. A second loss term
regresses the v head onto v.

The training forward computes u for all samples, and du/dt only for those with r < t, because the others multiply it by
zero. The number of forwards does not depend on the draws, so that sharded workers make the same collective calls.

Source: Geng et al. 2025, arXiv 2505.13447, Eq. 6 to 11 and 19 to 22; and arXiv 2512.02012. The latter regresses
V = u + (t - r) du/dt onto v, which is equivalent: V - v = u - u_tgt.

    # B batch, b rows with r < t, C channels, H W latent size
"""

import torch

from meanflow_core.config import ImprovedMeanFlowConfig, MeanFlowConfig
from meanflow_core.networks.interface import Network
from meanflow_core.objectives import guidance
from meanflow_core.objectives.flow import FlowObjective, LossOutput, forward_with_derivative
from meanflow_core.objectives.guidance import per_sample
from meanflow_core.objectives.row_plan import StepRecord


class MeanFlow(FlowObjective[MeanFlowConfig]):
    """MeanFlow, and flow matching if no sample has r < t."""

    def __init__(self, config: MeanFlowConfig) -> None:
        super().__init__(config)
        self.uses_own_velocity = config.tangent == "own_velocity"

    @property
    def derivative_weight(self) -> float:
        """Factor of (t - r) du/dt in the target."""
        return 1.0

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
        """See `Objective.loss`."""
        guidance.check_batch(latents, labels, record)
        config, below = self.config, record.plan.below
        t, r = per_sample(record.draws.t, latents), per_sample(record.draws.r, latents)
        z, v_sample = guidance.noisy_latents(latents, record)
        conditioning = record.draws.conditioning(labels, null_label)
        # Velocities. For samples with r = t, the conditional one is still missing, but these have no derivative.
        missing = guidance.missing_velocities(network, z, labels, record, null_label)
        direction = missing.conditional
        if not self.uses_own_velocity:
            direction = guidance.guided_velocity(v_sample, missing, record)
        # JVP
        output, dudt = forward_with_derivative(
            training_network, network, z, conditioning, direction, record,
            separate=separate_derivative and self.has_r_below_t,
        )  # fmt: skip
        u = output.average_velocity.to(z.dtype)
        # Target
        v_guided = guidance.guided_velocity(v_sample, missing, record, output)
        target = v_guided - self.derivative_weight * (t - r) * dudt
        # Weight
        error, guarded = guidance.guarded_error(u, target, config.guards)
        loss = guidance.adaptively_weighted_sum(guidance.squared_norm(error), config.norm_p, config.norm_eps)
        squared_error = guidance.squared_norm(u.detach() - target)
        return LossOutput(
            loss=loss / global_num_rows,
            metrics=self._metrics(record, squared_error, dudt, guarded),
            squared_error=squared_error,
            u=u.detach(),
            v_guided=v_guided,
            tangent=direction[below],
            dudt=dudt,
        )


class ImprovedMeanFlow(FlowObjective[ImprovedMeanFlowConfig]):
    """Improved MeanFlow."""

    uses_own_velocity = True

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
        """See `Objective.loss`. Raises ValueError also if the network has no v head."""
        guidance.check_batch(latents, labels, record)
        config, below = self.config, record.plan.below
        t, r = per_sample(record.draws.t, latents), per_sample(record.draws.r, latents)
        z, v_sample = guidance.noisy_latents(latents, record)
        conditioning = record.draws.conditioning(labels, null_label)
        # Velocities
        missing = guidance.missing_velocities(network, z, labels, record, null_label)
        # JVP, along the network's own velocity
        output, dudt = forward_with_derivative(
            training_network, network, z, conditioning, missing.conditional, record, separate=separate_derivative
        )
        if output.u is None or output.v is None:
            raise ValueError("improved MeanFlow needs a network with a v head, but this one returned only u")
        u, v = output.u.to(z.dtype), output.v.to(z.dtype)
        # Target
        v_guided = guidance.guided_velocity(v_sample, missing, record, output)
        target = v_guided - (t - r) * dudt
        # Weight, for both heads
        error, guarded = guidance.guarded_error(u, target, config.guards)
        squared_error_v = guidance.squared_norm(v - v_guided)
        loss = guidance.adaptively_weighted_sum(guidance.squared_norm(error), config.norm_p, config.norm_eps)
        loss = loss + guidance.adaptively_weighted_sum(squared_error_v, config.norm_p, config.norm_eps)
        squared_error = guidance.squared_norm(u.detach() - target)
        return LossOutput(
            loss=loss / global_num_rows,
            metrics=self._metrics(record, squared_error, dudt, guarded, squared_error_v.detach()),
            squared_error=squared_error,
            squared_error_v=squared_error_v.detach(),
            u=u.detach(),
            v=v.detach(),
            v_guided=v_guided,
            tangent=missing.conditional[below],
            dudt=dudt,
        )
