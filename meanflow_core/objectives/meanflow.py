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

from dataclasses import dataclass
from typing import TypeVar

import torch

from meanflow_core.config import GuardConfig, ImprovedMeanFlowConfig, MeanFlowConfig
from meanflow_core.networks.interface import Conditioning, Network, NetworkOutput
from meanflow_core.objectives import guidance
from meanflow_core.objectives.draws import StepDraws, draw_step, draw_two_times
from meanflow_core.objectives.guidance import per_sample
from meanflow_core.objectives.interface import Loss, Mean, Objective
from meanflow_core.objectives.row_plan import StepRecord, plan_rows


@dataclass(frozen=True, kw_only=True)
class LossOutput(Loss):
    """The loss and its parts. With p = 1 the loss is always near 1, so monitor the squared errors instead."""

    squared_error: torch.Tensor
    """(B,) detached: ||u - u_tgt||^2, summed over C, H, W, before guards."""
    squared_error_v: torch.Tensor | None = None
    """(B,) detached: ||v - guided velocity||^2 of the v head, if there is one."""
    u: torch.Tensor
    """(B, C, H, W) detached: the network's average velocity."""
    v: torch.Tensor | None = None
    """(B, C, H, W) detached: the v head's velocity, if there is one."""
    v_guided: torch.Tensor
    """(B, C, H, W): the guided velocity."""
    tangent: torch.Tensor
    """(b, C, H, W): the direction of du/dt, for the samples with r < t."""
    dudt: torch.Tensor
    """(B, C, H, W): the total derivative; zero for samples with r = t, whose target does not depend on it."""


def total_derivative(
    network: Network, z: torch.Tensor, conditioning: Conditioning, tangent: torch.Tensor
) -> torch.Tensor:
    """du/dt along (dz, dt, dr) = (tangent, 1, 0), (B, C, H, W), from a separate no-grad forward.

    Runs in float32 even under autocast, because t - r multiplies the derivative's rounding error.
    Source: Geng et al. 2025, Eq. 8.
    """
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        dudt = network(z, conditioning, tangent).dudt
    assert dudt is not None, "a network must return du/dt if it gets a tangent"
    return dudt


def _forward_with_derivative(
    network: Network, z: torch.Tensor, conditioning: Conditioning, record: StepRecord, tangent: torch.Tensor
) -> NetworkOutput:
    """Computes u and v of all samples, and du/dt of those with r < t, in one forward."""
    order = record.plan.ordered  # samples with r < t first, because a tangent belongs to the first rows
    output = network(z[order], conditioning.rows(order), tangent)
    inverse = torch.argsort(order)
    u, v = (None if value is None else value[inverse] for value in (output.u, output.v))
    return NetworkOutput(u=u, v=v, dudt=output.dudt)


def forward_with_derivative(
    training_network: Network,
    network: Network,
    z: torch.Tensor,
    conditioning: Conditioning,
    direction: torch.Tensor,
    record: StepRecord,
    *,
    separate: bool,
) -> tuple[NetworkOutput, torch.Tensor]:
    """The training forward of all samples, and du/dt along `direction`, (B, C, H, W), which is zero where r = t.

    separate: compute du/dt in a separate float32 forward of `network`.
    """
    below, derivative = record.plan.below, None
    if separate:
        # Never an empty batch: under FSDP, a rank without samples r < t must make the same calls as the others.
        rows = below if len(below) else record.plan.ordered[:1]
        derivative = total_derivative(network, z[rows], conditioning.rows(rows), direction[rows])[: len(below)]
    if separate or len(below) == 0:
        output = training_network(z, conditioning)
    else:
        output = _forward_with_derivative(training_network, z, conditioning, record, direction[below])
        derivative = output.dudt
    dudt = torch.zeros_like(z)
    if derivative is not None:
        dudt = dudt.index_copy(0, below, derivative.to(z.dtype))
    return output, dudt


Config = TypeVar("Config", bound=MeanFlowConfig | ImprovedMeanFlowConfig)


class _MeanFlow(Objective[Config, StepDraws, StepRecord]):
    """What MeanFlow and improved MeanFlow share: times, records and metrics."""

    uses_own_velocity: bool
    """Whether du/dt is taken along the network's own conditional velocity."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        names = ["squared_error_r_equals_t"]
        self.has_r_below_t = config.times.fraction_r_below_t > 0.0
        if self.has_r_below_t:
            names += ["squared_error_r_below_t", "dudt_norm"]
        if config.guards != GuardConfig():
            names += ["guarded_share"]
        if config.needs_velocity_head:
            names += ["squared_error_v"]
        names += guidance.bin_names("squared_error")
        if self.has_r_below_t:
            names += guidance.bin_names("dudt_norm")
        self.metric_names = tuple(names)

    def draw(self, *, seed: int, step: int, num_rows: int, latent_shape: tuple[int, int, int]) -> StepDraws:
        """Draws times, noise, dropped labels and guidance; see `draws`."""
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

    def record(self, draws: StepDraws, start: int, stop: int) -> StepRecord:
        """The draws of these samples with their guidance weights and row plan. Raises ValueError for invalid draws."""
        return plan_rows(
            draws.rows(start, stop),
            self.config,
            uses_own_velocity=self.uses_own_velocity,
            has_r_below_t=self.has_r_below_t,
        )

    def costs(self, record: StepRecord) -> tuple[int, ...]:
        """The number of samples that need du/dt, and the size of the no-grad forward."""
        return len(record.plan.below), len(record.plan.velocity)

    def unpadded(self, record: StepRecord) -> StepRecord:
        """The record without padding of the no-grad forward."""
        return StepRecord(draws=record.draws, weights=record.weights, plan=record.plan.unpadded())

    def _metrics(
        self,
        record: StepRecord,
        squared_error: torch.Tensor,
        dudt: torch.Tensor,
        guarded: torch.Tensor | None,
        squared_error_v: torch.Tensor | None = None,
    ) -> dict[str, Mean]:
        """The values of `metric_names`."""
        below, t = record.plan.below, record.draws.t
        norm = dudt.flatten(1).norm(dim=1)
        values = {
            "squared_error_r_equals_t": guidance.mean_over(squared_error, record.plan.ordered[len(below) :]),
            "squared_error_r_below_t": guidance.mean_over(squared_error, below),
            "dudt_norm": guidance.mean_over(norm, below),
            **guidance.means_by_time("squared_error", squared_error, t),
            **guidance.means_by_time("dudt_norm", norm[below], t[below]),
        }
        for name, rows in (("guarded_share", guarded), ("squared_error_v", squared_error_v)):
            if rows is not None:
                values[name] = Mean(rows.to(squared_error.dtype).sum(), len(rows))
        return {name: values[name] for name in self.metric_names}


class MeanFlow(_MeanFlow[MeanFlowConfig]):
    """MeanFlow, and flow matching if no sample has r < t."""

    def __init__(self, config: MeanFlowConfig) -> None:
        super().__init__(config)
        self.uses_own_velocity = config.tangent == "own_velocity"

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
        guidance.check_labels(labels, record)
        config, below = self.config, record.plan.below
        t, r = per_sample(record.draws.t, latents), per_sample(record.draws.r, latents)
        z, v_sample = guidance.noisy_latents(latents, record)
        conditioning = record.draws.conditioning(labels, null_label)
        # Velocities. For samples with r = t, the conditional one is still missing, but these have no derivative.
        missing = guidance.missing_velocities(network, z, labels, record, null_label)
        direction = missing.conditional
        if not self.uses_own_velocity:
            direction = guidance.guided_velocity(v_sample, missing, record.weights)
        # JVP
        output, dudt = forward_with_derivative(
            training_network, network, z, conditioning, direction, record,
            separate=separate_derivative and self.has_r_below_t,
        )  # fmt: skip
        assert output.u is not None, "a network must return u unless velocity_only is set"
        u = output.u.to(z.dtype)
        # Target
        velocities = guidance.complete_velocities(missing, output, record)
        v_guided = guidance.guided_velocity(v_sample, velocities, record.weights)
        target = v_guided - (t - r) * dudt
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


class ImprovedMeanFlow(_MeanFlow[ImprovedMeanFlowConfig]):
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
        guidance.check_labels(labels, record)
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
        velocities = guidance.complete_velocities(missing, output, record)
        v_guided = guidance.guided_velocity(v_sample, velocities, record.weights)
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
