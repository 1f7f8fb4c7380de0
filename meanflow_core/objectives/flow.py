"""What objectives with a `row_plan` share: records, the training forward with du/dt, and the metrics.

# B batch, b rows with r < t, C channels, H W latent size
"""

from dataclasses import dataclass
from typing import TypeVar

import torch

from meanflow_core.config import FlowLossConfig, GuardConfig, LossConfig
from meanflow_core.networks.interface import Conditioning, Network, NetworkOutput, without_autocast
from meanflow_core.objectives import guidance
from meanflow_core.objectives.draws import DrawnStep, StepDraws, draw_step, draw_two_times
from meanflow_core.objectives.interface import Loss, Mean, Objective
from meanflow_core.objectives.row_plan import StepRecord, plan_rows


@dataclass(frozen=True, kw_only=True)
class LossOutput(Loss):
    """The loss and its parts. With p = 1 the loss is always near 1, so monitor the squared errors instead."""

    squared_error: torch.Tensor
    """(B,) detached: ||u - u_tgt||^2, summed over C, H, W, before guards; in alpha-Flow and SoFlow divided by a^2, so that it
    is comparable with MeanFlow's."""
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
    with torch.no_grad(), without_autocast(z.device):
        dudt = network(z, conditioning, tangent).dudt
    assert dudt is not None, "a network must return du/dt if it gets a tangent"
    return dudt


def forward_with_derivative(
    training_network: Network,
    network: Network,
    z: torch.Tensor,
    conditioning: Conditioning,
    tangent: torch.Tensor,
    record: StepRecord,
    *,
    separate: bool,
) -> tuple[NetworkOutput, torch.Tensor]:
    """The training forward of all samples, and du/dt along `tangent`, (B, C, H, W), which is zero where r = t.

    separate: compute du/dt in a separate float32 forward of `network`.
    """
    below, derivative = record.plan.below, None
    if separate:
        rows = record.plan.below_or_one
        derivative = total_derivative(network, z[rows], conditioning.rows(rows), tangent[rows])[: len(below)]
    if separate or len(below) == 0:
        output = training_network(z, conditioning)
    else:
        order = record.plan.ordered  # samples with r < t first, because a tangent belongs to the first rows
        ordered = training_network(z[order], conditioning.rows(order), tangent[below])
        inverse = torch.argsort(order)
        u, v = (None if value is None else value[inverse] for value in (ordered.u, ordered.v))
        output, derivative = NetworkOutput(u=u, v=v), ordered.dudt
    dudt = torch.zeros_like(z)
    if derivative is not None:
        dudt = dudt.index_copy(0, below, derivative.to(z.dtype))
    return output, dudt


@torch.no_grad()
def average_velocity_where_r_below_t(
    network: Network, z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, labels: torch.Tensor, record: StepRecord
) -> torch.Tensor:
    """u(z, r, t) of the samples with r < t, from one no-grad forward; (B, C, H, W), zero for the others.

    z, t, r and labels are of all samples. t and r may differ from the record's.
    """
    below, rows = record.plan.below, record.plan.below_or_one
    u = network(z[rows], Conditioning(t=t[rows], r=r[rows], labels=labels[rows])).average_velocity
    return torch.zeros_like(z).index_copy(0, below, u.to(z.dtype)[: len(below)])


Config = TypeVar("Config", bound=LossConfig)
FlowConfig = TypeVar("FlowConfig", bound=FlowLossConfig)


class PlannedObjective(Objective[Config, DrawnStep | StepDraws, StepRecord]):
    """Base of objectives whose records have a `RowPlan`."""

    uses_own_velocity: bool = False
    """Whether the samples with r < t need the network's own conditional velocity."""
    has_r_below_t: bool = False
    """Whether any sample of any step has r < t."""

    def record(self, draws: DrawnStep | StepDraws, start: int, stop: int) -> StepRecord:
        """The draws of these samples with their guidance weights and row plan. Raises ValueError for invalid draws."""
        return plan_rows(
            draws.rows(start, stop),
            self.config,
            uses_own_velocity=self.uses_own_velocity,
            has_r_below_t=self.has_r_below_t,
        )

    def costs(self, record: StepRecord) -> tuple[int, ...]:
        """The number of samples with r < t, and the size of the no-grad forward."""
        return len(record.plan.below), len(record.plan.velocity)

    def unpadded(self, record: StepRecord) -> StepRecord:
        """The record without padding of the no-grad forward."""
        return StepRecord(draws=record.draws, weights=record.weights, plan=record.plan.unpadded())


class FlowObjective(PlannedObjective[FlowConfig]):
    """Base of objectives that learn u(z_t, r, t) on the path z_t = (1 - t) x + t e."""

    has_derivative: bool = True
    """Whether the target of the samples with r < t contains du/dt."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config)
        self.has_r_below_t = config.times.fraction_r_below_t > 0.0
        logs_derivative = self.has_r_below_t and self.has_derivative
        self.metric_names = (
            "squared_error_r_equals_t",
            *(("squared_error_r_below_t",) if self.has_r_below_t else ()),
            *(("dudt_norm",) if logs_derivative else ()),
            *(("guarded_share",) if config.guards != GuardConfig() else ()),
            *(("squared_error_v",) if config.needs_velocity_head else ()),
            *guidance.bin_names("squared_error"),
            *(guidance.bin_names("dudt_norm") if logs_derivative else ()),
        )

    def draw_times(self, num_rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws t and r of the global batch, each float32 (B,)."""
        return draw_two_times(num_rows, self.config.times, generator)

    def draw(self, *, seed: int, step: int, num_rows: int, latent_shape: tuple[int, int, int]) -> DrawnStep:
        """Draws times, noise, dropped labels and guidance; see `draws`."""
        return draw_step(
            self.config,
            self.draw_times,
            fraction_r_below_t=self.config.times.fraction_r_below_t,
            seed=seed,
            step=step,
            num_rows=num_rows,
            latent_shape=latent_shape,
        )

    def _metrics(
        self,
        record: StepRecord,
        squared_error: torch.Tensor,
        dudt: torch.Tensor | None,
        guarded: torch.Tensor | None,
        squared_error_v: torch.Tensor | None = None,
    ) -> dict[str, Mean]:
        """The values of `metric_names`. dudt: None if the step has no derivative."""
        below, t = record.plan.below, record.draws.t
        derived = below[:0] if dudt is None else below
        norm = torch.zeros_like(t) if dudt is None else dudt.flatten(1).norm(dim=1)
        values = {
            "squared_error_r_equals_t": guidance.mean_over(squared_error, record.plan.ordered[len(below) :]),
            "squared_error_r_below_t": guidance.mean_over(squared_error, below),
            "dudt_norm": guidance.mean_over(norm, derived),
            **guidance.means_by_time("squared_error", squared_error, t),
            **guidance.means_by_time("dudt_norm", norm[derived], t[derived]),
        }
        for name, rows in (("guarded_share", guarded), ("squared_error_v", squared_error_v)):
            if rows is not None:
                values[name] = Mean(rows.to(squared_error.dtype).sum(), len(rows))
        return {name: values[name] for name in self.metric_names}
