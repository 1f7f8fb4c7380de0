"""Which rows of a batch need which forward, and the weights of the guided velocity, computed from a step's draws.

To avoid redundant forwards, one no-grad forward computes only the velocities that the training forward lacks: those of
the null class for guided samples, and those of the sample's class if r < t. If r = t, the training forward's own output
is the velocity of the sample's class.

# B batch, b rows with r < t
"""

from dataclasses import dataclass, replace

import torch

from meanflow_core.config import GuidanceConfig, GuidedLossConfig, ImprovedMeanFlowConfig, LossConfig
from meanflow_core.networks.interface import TensorFields
from meanflow_core.objectives.draws import GUIDANCE_INPUTS, StepDraws, check_draws

# The no-grad forward's batch is padded to a multiple of B / 8 rows, so that few batch sizes have to be compiled. This
# adds 2 % to the work on average.
VELOCITY_BATCH_PARTS = 8


@dataclass(frozen=True, kw_only=True)
class GuidanceWeights(TensorFields):
    """The guided velocity is a v_t + k v(z_t, t | y) + n v(z_t, t | null), with a + k + n = 1."""

    sample: torch.Tensor
    """(B,) float32: a."""
    conditional: torch.Tensor
    """(B,) float32: k."""
    null: torch.Tensor
    """(B,) float32: n."""


@dataclass(frozen=True, kw_only=True)
class RowPlan(TensorFields):
    """The rows of each forward."""

    below: torch.Tensor
    """int64 (b,): rows with r < t."""
    ordered: torch.Tensor
    """int64 (B,): all rows, those with r < t first."""
    conditional: torch.Tensor
    """int64: rows whose conditional velocity requires a forward."""
    null: torch.Tensor
    """int64: rows whose null velocity requires a forward."""
    velocity: torch.Tensor
    """int64: rows of the no-grad forward: conditional, null, then padding with row 0. Empty only if the objective never
    needs that forward."""

    @property
    def below_or_one(self) -> torch.Tensor:
        """The rows with r < t, or any one row if there are none.

        For forwards of these rows alone: under FSDP, a rank without such rows must make the same calls as the others.
        """
        return self.below if len(self.below) else self.ordered[:1]

    def unpadded(self) -> "RowPlan":
        """The plan without padding of the no-grad forward."""
        return replace(self, velocity=torch.cat([self.conditional, self.null]))


@dataclass(frozen=True, kw_only=True)
class StepRecord(TensorFields):
    """The draws of some samples of a step, with their guidance weights and row plan."""

    draws: StepDraws
    weights: GuidanceWeights
    plan: RowPlan

    @property
    def posterior_noise(self) -> torch.Tensor:
        """(B, C, H, W) float32, standard normal: for sampling latents from moments."""
        return self.draws.posterior_noise

    @property
    def mirrored(self) -> torch.Tensor:
        """(B,) bool: whether to use the moments of the mirror image."""
        return self.draws.mirrored


def plan_rows(
    draws: StepDraws, config: LossConfig, *, uses_own_velocity: bool = False, has_r_below_t: bool = True
) -> StepRecord:
    """Checks the draws and computes weights and row plan. The draws must be on the CPU, because their values are read.

    Rows with r < t and rows with r = t may be in any order, and any row may have a dropped label. uses_own_velocity:
    whether the rows with r < t need the network's own conditional velocity. has_r_below_t: whether any step of the
    objective has rows with r < t. Raises ValueError for invalid draws.
    """
    check_draws(draws)
    below = draws.r < draws.t
    if isinstance(config, ImprovedMeanFlowConfig):
        weights, is_reusable = _improved_weights(draws)
        may_need_forward = True
    else:
        if not isinstance(config, GuidedLossConfig):
            raise TypeError(f"{type(config).__name__} must be a GuidedLossConfig to have a row plan; override record")
        weights, is_reusable = _fixed_weights(draws, config.guidance), torch.ones_like(below)
        needs_own = has_r_below_t and (uses_own_velocity or config.guidance.kappa != 0.0)
        may_need_forward = config.guidance.null_weight != 0.0 or needs_own
    needs_conditional = (weights.conditional != 0.0) | (below & uses_own_velocity)
    conditional = (needs_conditional & (below | ~is_reusable)).nonzero().flatten()
    null = (weights.null != 0.0).nonzero().flatten()
    plan = RowPlan(
        below=below.nonzero().flatten(),
        ordered=torch.argsort(below.logical_not().to(torch.uint8), stable=True),
        conditional=conditional,
        null=null,
        velocity=_padded(torch.cat([conditional, null]), len(below), may_need_forward=may_need_forward),
    )
    return StepRecord(draws=draws, weights=weights, plan=plan)


def _fixed_weights(draws: StepDraws, config: GuidanceConfig) -> GuidanceWeights:
    t = draws.t
    is_guided = (t >= config.guidance_interval_start) & (t <= config.guidance_interval_end) & ~draws.label_dropped
    return GuidanceWeights(
        sample=torch.where(is_guided, config.omega, torch.ones_like(t)),
        conditional=torch.where(is_guided, config.kappa, torch.zeros_like(t)),
        null=config.null_weight * is_guided.to(t.dtype),
    )


def _improved_weights(draws: StepDraws) -> tuple[GuidanceWeights, torch.Tensor]:
    """The weights, and a mask of reusable rows, bool (B,).

    A reusable row with r = t takes its conditional velocity from the training forward's v, without another forward.
    """
    omega, start, end = draws.omega, draws.guidance_interval_start, draws.guidance_interval_end
    if omega is None or start is None or end is None:
        given = [name for name in GUIDANCE_INPUTS if getattr(draws, name) is not None]
        raise ValueError(
            f"improved MeanFlow needs {', '.join(GUIDANCE_INPUTS)} of every row, but got {' and '.join(given) or 'none'}"
        )
    is_valid = (omega >= 1) & torch.isfinite(omega) & (start >= 0) & (start <= end) & (end <= 1)
    if not bool(is_valid.all()):
        row = int(is_valid.int().argmin())
        raise ValueError(
            "guidance must satisfy omega >= 1 and 0 <= guidance_interval_start <= guidance_interval_end <= 1 in every row, "
            f"but row {row} has omega = {omega[row]:g} and [{start[row]:g}, {end[row]:g}]"
        )
    is_guided = (draws.t >= start) & (draws.t <= end) & ~draws.label_dropped
    conditional = torch.where(is_guided, 1.0 - 1.0 / omega, 0.0)
    # The conditional velocity is v with [0, 1] as the guidance interval. So rows with that interval are reusable.
    weights = GuidanceWeights(sample=torch.ones_like(draws.t), conditional=conditional, null=-conditional)
    return weights, (start == 0.0) & (end == 1.0)


def _padded(rows: torch.Tensor, batch_size: int, *, may_need_forward: bool) -> torch.Tensor:
    """Pads with row 0 to a multiple of B / 8 rows: at least B / 8 if any step of the objective may need the forward."""
    part = max(1, -(-batch_size // VELOCITY_BATCH_PARTS))
    size = part * max(-(-len(rows) // part), int(may_need_forward))
    return torch.cat([rows, rows.new_zeros(size - len(rows))])
