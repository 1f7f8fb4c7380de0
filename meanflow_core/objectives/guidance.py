"""What objectives on the path z_t = (1 - t) x + t e share: noisy latents, guided velocities, guards, weights, metrics.

    v_t = e - x                                            velocity of one sample
    v   = a v_t + k v(z_t, t | y) + n v(z_t, t | null)     guided velocity, a + k + n = 1

(a, k, n) = (omega, kappa, 1 - omega - kappa) inside the guidance interval. Outside, and for samples whose label is dropped,
it is (1, 0, 0). The network's own class-conditional velocity v(z_t, t | y) is u(z_t, t, t | y), or its v head's output.
Source: Geng et al. 2025, Eq. 19 to 21.

    # B batch, b rows with r < t, C channels, H W latent size
"""

from typing import NamedTuple

import torch

from meanflow_core.config import GuardConfig
from meanflow_core.networks.interface import Conditioning, Network, NetworkOutput
from meanflow_core.objectives.interface import Mean
from meanflow_core.objectives.row_plan import StepRecord

NUM_BINS = 10
NORMALIZATION_CONSTANT = 0.1  # Source: Lu and Song 2024 (sCM), Section 4.1


class Velocities(NamedTuple):
    """Velocities of the network itself, without a graph; zero for rows that need none."""

    conditional: torch.Tensor
    """(B, C, H, W): v(z_t, t | y) with the true labels, even where a label is dropped."""
    null: torch.Tensor
    """(B, C, H, W): v(z_t, t | null)."""


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshapes (B,) to (B, 1, ..., 1) with as many dimensions as `like`."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def noisy_latents(latents: torch.Tensor, record: StepRecord) -> tuple[torch.Tensor, torch.Tensor]:
    """z_t and v_t, each (B, C, H, W)."""
    draws = record.draws
    t = per_sample(draws.t, latents)
    return (1.0 - t) * latents + t * draws.noise, draws.noise - latents


def check_batch(latents: torch.Tensor, labels: torch.Tensor, record: StepRecord) -> None:
    """Raises ValueError unless latents and labels have the shapes of the record's noise and times."""
    draws = record.draws
    for name, values, expected in (("latents", latents, draws.noise.shape), ("labels", labels, draws.t.shape)):
        if values.shape != expected:
            raise ValueError(f"the record is for {name} {tuple(expected)}, but got {tuple(values.shape)}")


@torch.no_grad()
def missing_velocities(
    network: Network, z: torch.Tensor, labels: torch.Tensor, record: StepRecord, null_label: int
) -> Velocities:
    """The velocities that the training forward lacks, in one forward; see `row_plan`."""
    draws, plan = record.draws, record.plan
    zeros = torch.zeros_like(z)
    rows, num_conditional, num_null = plan.velocity, len(plan.conditional), len(plan.null)
    if len(rows) == 0:
        return Velocities(zeros, zeros)
    is_conditional = torch.arange(len(rows), device=rows.device) < num_conditional
    t, ones = draws.t[rows], torch.ones_like(draws.t[rows])
    guidance: dict[str, torch.Tensor] = {}
    start, end = draws.guidance_interval_start, draws.guidance_interval_end
    if draws.omega is not None and start is not None and end is not None:
        # The interval is [0, 1]. omega is 1 for null velocities and for samples whose t is outside their own interval.
        is_inside = (draws.t >= start) & (draws.t <= end)
        omega = torch.where(is_inside[rows] & is_conditional, draws.omega[rows], ones)
        guidance = {"omega": omega, "guidance_interval_start": torch.zeros_like(ones), "guidance_interval_end": ones}
    classes = torch.where(is_conditional, labels[rows], null_label)
    conditioning = Conditioning(t=t, r=t, labels=classes, **guidance)
    velocities = network(z[rows], conditioning, velocity_only=True).velocity.to(z.dtype)
    # The last rows are padding.
    conditional, null = velocities[: num_conditional + num_null].split([num_conditional, num_null])
    return Velocities(zeros.index_copy(0, plan.conditional, conditional), zeros.index_copy(0, plan.null, null))


def guided_velocity(
    sample: torch.Tensor, missing: Velocities, record: StepRecord, output: NetworkOutput | None = None
) -> torch.Tensor:
    """a v_t + k v(z_t, t | y) + n v(z_t, t | null), (B, C, H, W). sample: v_t.

    output: the training forward's, whose v is the conditional velocity of the rows that `missing` lacks. Without it, only
    the rows with r < t are valid.
    """
    conditional = missing.conditional
    if output is not None:
        rows = record.plan.conditional
        conditional = output.velocity.detach().to(sample.dtype).index_copy(0, rows, conditional[rows])
    weights = record.weights
    a, k, n = (per_sample(weight, sample) for weight in (weights.sample, weights.conditional, weights.null))
    return a * sample + k * conditional + n * missing.null


def guarded_error(
    prediction: torch.Tensor, target: torch.Tensor, guards: GuardConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """prediction - target with its gradient, changed by guards, and the rows that a guard changed, bool (B,).

    The rows are None if all guards are off.
    """
    if guards == GuardConfig():
        return prediction - target, None
    plain = (prediction - target).detach()
    limited = target if guards.max_target is None else target.clamp(-guards.max_target, guards.max_target)
    error = prediction.detach() - limited
    if guards.max_error is not None:
        error = error.clamp(-guards.max_error, guards.max_error)
    if guards.normalize_error:
        size = error.square().flatten(1).mean(dim=1).sqrt() + NORMALIZATION_CONSTANT
        error = error / per_sample(size, error)
    touched = (error != plain).flatten(1).any(dim=1)
    return prediction - (prediction.detach() - error), touched


def squared_norm(error: torch.Tensor) -> torch.Tensor:
    """(B,): the sum of squares over C, H, W, as in the papers; not a mean."""
    return error.square().flatten(1).sum(dim=1)


def adaptively_weighted_sum(squared_error: torch.Tensor, norm_p: float, norm_eps: float) -> torch.Tensor:
    """Sum over samples of w ||error||^2, with w = stop_gradient(1 / (||error||^2 + c)^p). Source: Geng et al., Eq. 22."""
    weight = (squared_error.detach() + norm_eps) ** -norm_p
    return (weight * squared_error).sum()


def mean_over(values: torch.Tensor, rows: torch.Tensor) -> Mean:
    """The mean of (B,) over an int64 index."""
    return Mean(values[rows].sum(), len(rows))


def bin_names(name: str) -> tuple[str, ...]:
    """Metric names of a value in ten bins of t: "dudt_norm_by_t/0.0", ..., "dudt_norm_by_t/0.9"."""
    return tuple(f"{name}_by_t/{index / NUM_BINS:.1f}" for index in range(NUM_BINS))


def means_by_time(name: str, values: torch.Tensor, t: torch.Tensor) -> dict[str, Mean]:
    """The means of (B,) in ten bins of t, under `bin_names`."""
    bins = (t * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    is_in_bin = bins[:, None] == torch.arange(NUM_BINS, device=t.device)  # (B, 10)
    # Not a matrix product, which autocast rounds to bfloat16 and which spreads a NaN over all bins.
    totals, counts = torch.where(is_in_bin, values[:, None], 0.0).sum(dim=0), is_in_bin.sum(dim=0)
    return {key: Mean(totals[i], counts[i]) for i, key in enumerate(bin_names(name))}
