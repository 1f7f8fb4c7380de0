"""How a step's times (t, r) are drawn, t >= r, which rows have r < t, and the guidance that improved MeanFlow draws."""

import math
from fractions import Fraction

import torch

from meanflow_core.config import GuidanceSamplingConfig, TimeSamplingConfig


def rows_below(num_rows: int, fraction: float) -> torch.Tensor:
    """Which rows of a batch have r < t: bool (B,), row i iff floor((i + 1) rho) > floor(i rho).

    Exactly floor(B rho) rows, spread evenly, so that every contiguous block has its share of them.
    """
    # As a fraction of small numbers, or 0.7 would lose a row to rounding.
    rho = Fraction(fraction).limit_denominator(10_000)
    edges = torch.arange(num_rows + 1) * rho.numerator // rho.denominator
    return edges[1:] > edges[:-1]


def draw_times(
    num_rows: int, config: TimeSamplingConfig, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws t and r, float32 (B,), 0 <= r <= t <= 1: two logit-normal times, sorted, then r = t on most rows.

    Source: Geng et al. 2025, Section 4.3 and Table 1a, 1d; where r = t it is the larger of the two that stays.
    """
    logits = config.logit_mean + config.logit_std * torch.randn(2, num_rows, generator=generator)
    times = torch.sigmoid(logits)
    t, r = times.amax(dim=0), times.amin(dim=0)
    return t, torch.where(rows_below(num_rows, config.fraction_r_below_t), r, t)


def draw_omega(num_rows: int, config: GuidanceSamplingConfig, generator: torch.Generator) -> torch.Tensor:
    """Draws guidance scales, float32 (B,) in [1, omega_max], of density proportional to omega^-beta.

    By inverting its distribution function: with b = 1 - beta, F(w) = (w^b - 1) / (omega_max^b - 1), and
    log w / log omega_max at beta = 1.
    """
    uniform = torch.rand(num_rows, generator=generator)
    exponent, log_max = 1.0 - config.omega_power, math.log(config.omega_max)
    if exponent == 0.0:
        return torch.exp(uniform * log_max)
    return torch.exp(torch.log1p(uniform * math.expm1(exponent * log_max)) / exponent)


def draw_guidance_interval(
    below: torch.Tensor, config: GuidanceSamplingConfig, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the start and the end of each guidance interval, float32 (B,): uniform on either side of the split; [0, 1] on
    rows with r = t.

    below: (B,) bool, the rows with r < t.
    """
    start, end = torch.rand(2, len(below), generator=generator)
    start = torch.where(below, start * config.interval_split, 0.0)
    end = torch.where(below, config.interval_split + end * (1.0 - config.interval_split), 1.0)
    return start, end
