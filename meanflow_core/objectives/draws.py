"""The random draws of a training step: times, noise, dropped labels and guidance, as one record.

# B batch, b rows with r < t, C channels, H W latent size
"""

import math
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch

from meanflow_core.config import GuidanceConfig, GuidanceSamplingConfig, LossConfig, TimeSamplingConfig

GUIDANCE_INPUTS = ("omega", "guidance_interval_start", "guidance_interval_end")
_DRAWS = ("t", "r", "noise", "posterior_noise", "label_dropped", "mirrored", *GUIDANCE_INPUTS)
# The no-grad forward's batch is padded to a multiple of B / 8 rows, so that few batch sizes have to be compiled. This
# adds 2 % to the work on average.
VELOCITY_BATCH_PARTS = 8


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """All random draws of one step, and the weights and row indices computed from them."""

    t: torch.Tensor
    """(B,) float32 in [0, 1]."""
    r: torch.Tensor
    """(B,) float32 in [0, t]."""
    noise: torch.Tensor
    """(B, C, H, W) float32, standard normal: e in z_t."""
    posterior_noise: torch.Tensor
    """(B, C, H, W) float32, standard normal: for sampling latents from moments."""
    label_dropped: torch.Tensor
    """(B,) bool: whether the null class replaces the sample's label."""
    mirrored: torch.Tensor
    """(B,) bool: whether to use the moments of the horizontally flipped image."""
    omega: torch.Tensor | None = None
    """(B,) float32, at least 1: guidance scale, for improved MeanFlow."""
    guidance_interval_start: torch.Tensor | None = None
    """(B,) float32 in [0, 1], for improved MeanFlow."""
    guidance_interval_end: torch.Tensor | None = None
    """(B,) float32 in [guidance_interval_start, 1], for improved MeanFlow."""

    weight_sample: torch.Tensor
    """(B,) float32: a, the weight of v_t in the guided velocity."""
    weight_conditional: torch.Tensor
    """(B,) float32: k, the weight of the network's velocity given the label."""
    weight_null: torch.Tensor
    """(B,) float32: n, the weight of the network's velocity given the null class."""
    rows_below: torch.Tensor
    """int64 (b,): rows with r < t."""
    rows_ordered: torch.Tensor
    """int64 (B,): all rows, those with r < t first."""
    rows_conditional: torch.Tensor
    """int64: rows whose conditional velocity requires a forward."""
    rows_null: torch.Tensor
    """int64: rows whose null velocity requires a forward."""
    rows_velocity: torch.Tensor
    """int64: rows of the no-grad forward: rows_conditional, rows_null, then padding with row 0. Empty only if the
    objective never needs that forward."""

    @classmethod
    def from_draws(
        cls,
        *,
        t: torch.Tensor,
        r: torch.Tensor,
        noise: torch.Tensor,
        label_dropped: torch.Tensor,
        config: LossConfig,
        posterior_noise: torch.Tensor | None = None,
        mirrored: torch.Tensor | None = None,
        omega: torch.Tensor | None = None,
        guidance_interval_start: torch.Tensor | None = None,
        guidance_interval_end: torch.Tensor | None = None,
    ) -> "StepRecord":
        """Checks the draws and derives the weights and row indices.

        The draws must be on the CPU, because their values are read. Rows with r < t and rows with r = t may be in any
        order, and any row may have a dropped label. posterior_noise and mirrored default to zeros. Only improved MeanFlow
        uses omega and the guidance interval. Raises ValueError for mismatched shapes, non-finite noise, times that
        violate 0 <= r <= t <= 1, omega below 1, or an invalid interval.
        """
        guidance = [omega, guidance_interval_start, guidance_interval_end]
        vectors = {"t": t, "r": r, "label_dropped": label_dropped, "mirrored": mirrored}
        _check_draws(vectors | dict(zip(GUIDANCE_INPUTS, guidance, strict=True)), noise, posterior_noise)
        below = r < t
        if config.objective == "improved_meanflow":
            weights, is_reusable = _improved_weights(t, label_dropped, *guidance)
        else:
            weights, is_reusable = _meanflow_weights(t, label_dropped, config.guidance), torch.ones_like(below)
            guidance = [None, None, None]
        needs_conditional = (weights.conditional != 0.0) | (below & config.uses_own_velocity)
        rows_conditional = (needs_conditional & (below | ~is_reusable)).nonzero().flatten()
        rows_null = (weights.null != 0.0).nonzero().flatten()
        return cls(
            t=t,
            r=r,
            noise=noise,
            posterior_noise=torch.zeros_like(noise) if posterior_noise is None else posterior_noise,
            label_dropped=label_dropped,
            mirrored=torch.zeros_like(label_dropped) if mirrored is None else mirrored,
            **dict(zip(GUIDANCE_INPUTS, guidance, strict=True)),
            weight_sample=weights.sample,
            weight_conditional=weights.conditional,
            weight_null=weights.null,
            rows_below=below.nonzero().flatten(),
            rows_ordered=torch.argsort(below.logical_not().to(torch.uint8), stable=True),
            rows_conditional=rows_conditional,
            rows_null=rows_null,
            rows_velocity=_padded(torch.cat([rows_conditional, rows_null]), len(t), config),
        )

    def rows(self, start: int, stop: int, config: LossConfig) -> "StepRecord":
        """The record of rows start to stop - 1, for one worker or one micro-batch."""
        draws = {name: getattr(self, name) for name in _DRAWS}
        share = {name: value[start:stop] for name, value in draws.items() if value is not None}
        return StepRecord.from_draws(**share, config=config)

    def to(self, device: torch.device) -> "StepRecord":
        """Copies every tensor to `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: v.to(device, non_blocking=True) for n, v in tensors.items() if v is not None})


def _check_draws(
    vectors: dict[str, torch.Tensor | None], noise: torch.Tensor, posterior_noise: torch.Tensor | None
) -> None:
    given = {name: value for name, value in vectors.items() if value is not None}
    t, r = given["t"], given["r"]
    shapes = [tuple(value.shape) for value in given.values()]
    if t.dim() != 1 or set(shapes) != {tuple(t.shape)} or noise.dim() != 4 or len(noise) != len(t):
        raise ValueError(
            f"{', '.join(given)} must have shape (B,) and noise (B, C, H, W), but got "
            f"{', '.join(map(str, shapes))} and {tuple(noise.shape)}"
        )
    if posterior_noise is not None and posterior_noise.shape != noise.shape:
        raise ValueError(
            f"posterior_noise must have noise's shape {tuple(noise.shape)}, but got {tuple(posterior_noise.shape)}"
        )
    is_valid = (r >= 0) & (r <= t) & (t <= 1)
    if not bool(is_valid.all()):
        row = int(is_valid.int().argmin())
        raise ValueError(
            f"times must satisfy 0 <= r <= t <= 1 in every row, but row {row} has r = {r[row]:g}, t = {t[row]:g}"
        )
    if not bool(torch.isfinite(noise).all()):
        raise ValueError("noise must be finite")


class _Weights(NamedTuple):
    sample: torch.Tensor
    conditional: torch.Tensor
    null: torch.Tensor


def _meanflow_weights(t: torch.Tensor, label_dropped: torch.Tensor, config: GuidanceConfig) -> _Weights:
    is_guided = (t >= config.guidance_interval_start) & (t <= config.guidance_interval_end) & ~label_dropped
    return _Weights(
        sample=torch.where(is_guided, config.omega, torch.ones_like(t)),
        conditional=torch.where(is_guided, config.kappa, torch.zeros_like(t)),
        null=_null_weight(config) * is_guided.to(t.dtype),
    )


def _null_weight(config: GuidanceConfig) -> float:
    weight = 1.0 - config.omega - config.kappa
    return 0.0 if abs(weight) < 1e-12 else weight  # if omega + kappa = 1, rounding must not cause a forward


def _improved_weights(
    t: torch.Tensor,
    label_dropped: torch.Tensor,
    omega: torch.Tensor | None,
    start: torch.Tensor | None,
    end: torch.Tensor | None,
) -> tuple[_Weights, torch.Tensor]:
    """The weights, and a mask of reusable rows, bool (B,).

    A reusable row with r = t takes its conditional velocity from the training forward's v, without another forward.
    """
    if omega is None or start is None or end is None:
        given = [name for name, value in zip(GUIDANCE_INPUTS, (omega, start, end), strict=True) if value is not None]
        raise ValueError(
            f"improved_meanflow needs {', '.join(GUIDANCE_INPUTS)} of every row, but got {' and '.join(given) or 'none'}"
        )
    is_valid = (omega >= 1) & torch.isfinite(omega) & (start >= 0) & (start <= end) & (end <= 1)
    if not bool(is_valid.all()):
        row = int(is_valid.int().argmin())
        raise ValueError(
            "guidance must satisfy omega >= 1 and 0 <= guidance_interval_start <= guidance_interval_end <= 1 in every row, "
            f"but row {row} has omega = {omega[row]:g} and [{start[row]:g}, {end[row]:g}]"
        )
    is_guided = (t >= start) & (t <= end) & ~label_dropped
    conditional = torch.where(is_guided, 1.0 - 1.0 / omega, 0.0)
    # The conditional velocity is v with [0, 1] as the guidance interval. So rows with that interval are reusable.
    return _Weights(torch.ones_like(t), conditional, -conditional), (start == 0.0) & (end == 1.0)


def _padded(rows: torch.Tensor, batch_size: int, config: LossConfig) -> torch.Tensor:
    """Pads with row 0 to a multiple of B / 8 rows: at least B / 8 if any step of the objective may need the forward."""
    if config.objective == "improved_meanflow":
        may_need_forward = True
    else:
        needs_own = config.guidance.kappa != 0.0 or config.uses_own_velocity
        may_need_forward = _null_weight(config.guidance) != 0.0 or (not config.is_flow_matching and needs_own)
    part = max(1, -(-batch_size // VELOCITY_BATCH_PARTS))
    size = part * max(-(-len(rows) // part), int(may_need_forward))
    return torch.cat([rows, rows.new_zeros(size - len(rows))])


def r_below_t_mask(num_rows: int, fraction: float) -> torch.Tensor:
    """Selects the rows of a batch with r < t, bool (B,): row i if floor((i + 1) rho) > floor(i rho).

    These are floor(B rho) rows, spread evenly: each contiguous share of the batch has the same fraction of them, to
    within one row.
    """
    # limit_denominator undoes binary rounding: Fraction(0.7) is below 7/10 and would lose a row.
    rho = Fraction(fraction).limit_denominator(10_000)
    edges = torch.arange(num_rows + 1) * rho.numerator // rho.denominator
    return edges[1:] > edges[:-1]


def draw_times(
    num_rows: int, config: TimeSamplingConfig, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws t and r, float32 (B,), 0 <= r <= t <= 1.

    t is the larger of two logit-normal times. r is the smaller one in the rows of `r_below_t_mask`, and t in the others.
    Source: Geng et al. 2025, Section 4.3 and Tables 1a, 1d.
    """
    logits = config.logit_mean + config.logit_std * torch.randn(2, num_rows, generator=generator)
    times = torch.sigmoid(logits)
    t, r = times.amax(dim=0), times.amin(dim=0)
    return t, torch.where(r_below_t_mask(num_rows, config.fraction_r_below_t), r, t)


def draw_omega(num_rows: int, config: GuidanceSamplingConfig, generator: torch.Generator) -> torch.Tensor:
    """Draws guidance scales, float32 (B,) in [1, omega_max], with density proportional to omega^-beta.

    Method: inverts the distribution function F(w) = (w^b - 1) / (omega_max^b - 1) with b = 1 - beta, or
    F(w) = log w / log omega_max for beta = 1.
    """
    uniform = torch.rand(num_rows, generator=generator)
    exponent, log_max = 1.0 - config.omega_power, math.log(config.omega_max)
    if exponent == 0.0:
        return torch.exp(uniform * log_max)
    return torch.exp(torch.log1p(uniform * math.expm1(exponent * log_max)) / exponent)


def draw_guidance_interval(
    below: torch.Tensor, config: GuidanceSamplingConfig, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the start and the end of each guidance interval, float32 (B,), uniformly on either side of the split.

    Rows with r = t get the interval [0, 1]. below: (B,) bool, the rows with r < t.
    """
    start, end = torch.rand(2, len(below), generator=generator)
    start = torch.where(below, start * config.interval_split, 0.0)
    end = torch.where(below, config.interval_split + end * (1.0 - config.interval_split), 1.0)
    return start, end


def draw_step_record(
    config: LossConfig, *, seed: int, step: int, num_rows: int, latent_shape: tuple[int, int, int]
) -> StepRecord:
    """Draws a step's record for the *global* batch of B = num_rows, on the CPU, as a pure function of (seed, step).

    latent_shape: (C, H, W).

    Let p be label_drop_probability and rho be fraction_r_below_t. As in the authors' code, labels are dropped only on
    rows with r = t, each with probability p / (1 - rho). If p > 1 - rho, there are too few such rows, and labels are
    dropped on all rows with probability p.
    """
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state) % 2**63)
    t, r = draw_times(num_rows, config.times, generator)
    uniform = torch.rand(num_rows, generator=generator)
    probability, rho = config.label_drop_probability, config.times.fraction_r_below_t
    below = r_below_t_mask(num_rows, rho)
    if probability <= 1.0 - rho + 1e-9:  # in floating point, 1 - 0.9 is slightly below 0.1
        label_dropped = ~below & (uniform * (1.0 - rho) < probability)
    else:
        label_dropped = uniform < probability
    mirrored = torch.rand(num_rows, generator=generator) < 0.5
    noise = torch.randn(num_rows, *latent_shape, generator=generator)
    posterior_noise = torch.randn(num_rows, *latent_shape, generator=generator)
    omega = start = end = None
    if config.objective == "improved_meanflow":
        omega = draw_omega(num_rows, config.guidance_sampling, generator)
        start, end = draw_guidance_interval(below, config.guidance_sampling, generator)
    return StepRecord.from_draws(
        t=t,
        r=r,
        noise=noise,
        posterior_noise=posterior_noise,
        label_dropped=label_dropped,
        mirrored=mirrored,
        omega=omega,
        guidance_interval_start=start,
        guidance_interval_end=end,
        config=config,
    )
