"""How a step's times (t, r) are drawn, t >= r, and which rows have r < t."""

from fractions import Fraction

import torch

from meanflow_core.config import TimeSamplingConfig


def rows_below(num_rows: int, fraction: float) -> torch.Tensor:
    """Which rows of a batch have r < t: bool (B,), row i iff floor((i + 1) rho) > floor(i rho).

    Exactly floor(B rho) rows, spread evenly, so that every contiguous block has its share of them.
    """
    # As a fraction of small numbers, or 0.1 would lose a row to rounding.
    rho = Fraction(fraction).limit_denominator(10_000)
    edges = torch.arange(num_rows + 1) * rho.numerator // rho.denominator
    return edges[1:] > edges[:-1]


def draw_times(
    num_rows: int, config: TimeSamplingConfig, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws t and r, float32 (B,), 0 < r <= t < 1: two logit-normal times, sorted, then r = t on most rows.

    Source: Geng et al. 2025, Section 4.3 and Table 1a, 1d; where r = t it is the larger of the two that stays.
    """
    logits = config.logit_mean + config.logit_std * torch.randn(2, num_rows, generator=generator)
    times = torch.sigmoid(logits)
    t, r = times.amax(dim=0), times.amin(dim=0)
    return t, torch.where(rows_below(num_rows, config.fraction_r_below_t), r, t)
