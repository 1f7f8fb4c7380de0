"""Distributions of times and guidance, and the record of a step."""

import pytest
import torch

from meanflow_core.config import GuidanceSamplingConfig, TimeSamplingConfig
from meanflow_core.draws import draw_guidance_interval, draw_omega, draw_times, rows_below


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("num_rows", [1, 7, 10, 128])
def test_share_of_rows_below_is_exact_and_even(num_rows, fraction):
    below = rows_below(num_rows, fraction)
    assert int(below.sum()) == int(num_rows * fraction + 1e-9)
    for start in range(num_rows):  # every contiguous block has its share, to within one row
        for stop in range(start + 1, num_rows + 1):
            assert abs(float(below[start:stop].sum()) - fraction * (stop - start)) < 1.0 + 1e-6


def test_times_are_sorted_and_equal_where_they_should_be():
    t, r = draw_times(1000, TimeSamplingConfig(), torch.Generator().manual_seed(0))
    below = rows_below(1000, 0.25)
    assert ((r > 0) & (r <= t) & (t < 1)).all()
    assert torch.equal(r < t, below)


def test_times_follow_the_logit_normal_law():
    t, _ = draw_times(40_000, TimeSamplingConfig(logit_mean=-0.4, logit_std=1.0), torch.Generator().manual_seed(1))
    # t is the larger of two: its logit's mean is mu + sigma / sqrt(pi), its variance 1 - 1 / pi.
    logits = torch.logit(t)
    assert float(logits.mean()) == pytest.approx(-0.4 + 1 / torch.pi**0.5, abs=0.02)
    assert float(logits.var()) == pytest.approx(1 - 1 / torch.pi, abs=0.02)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_guidance_scales_have_the_density_omega_to_the_minus_beta(power):
    config = GuidanceSamplingConfig(omega_max=8.0, omega_power=power)
    omega = draw_omega(100_000, config, torch.Generator().manual_seed(0)).double()
    assert 1.0 <= float(omega.min()) <= 1.01
    assert 7.5 <= float(omega.max()) <= 8.0
    grid = torch.linspace(1.0, 8.0, 20_001, dtype=torch.float64)
    density = grid**-power
    share = torch.cumulative_trapezoid(density, grid)
    for bound in (1.5, 3.0, 6.0):
        expected = float(share[(grid[1:] <= bound)][-1] / share[-1])
        assert float((omega <= bound).double().mean()) == pytest.approx(expected, abs=0.006)


def test_guidance_interval_is_everything_where_r_equals_t():
    below = torch.arange(10_000) % 2 == 0
    start, end = draw_guidance_interval(below, GuidanceSamplingConfig(), torch.Generator().manual_seed(0))
    assert torch.equal(start[~below], torch.zeros(5_000))
    assert torch.equal(end[~below], torch.ones(5_000))
    assert float(start[below].mean()) == pytest.approx(0.25, abs=0.01)
    assert float(end[below].mean()) == pytest.approx(0.75, abs=0.01)
    assert float(start.max()) <= 0.5 <= float(end.min())


def test_times_spread_with_the_standard_deviation():
    t, _ = draw_times(40_000, TimeSamplingConfig(logit_mean=0.3, logit_std=2.0), torch.Generator().manual_seed(1))
    logits = torch.logit(t.double())
    assert float(logits.mean()) == pytest.approx(0.3 + 2 / torch.pi**0.5, abs=0.04)
    assert float(logits.std()) == pytest.approx(2 * (1 - 1 / torch.pi) ** 0.5, abs=0.04)


def test_ends_of_the_guidance_interval_are_drawn_apart_on_either_side_of_the_split():
    below, config = torch.ones(10_000, dtype=torch.bool), GuidanceSamplingConfig(interval_split=0.2)
    start, end = draw_guidance_interval(below, config, torch.Generator().manual_seed(0))
    assert float(start.mean()) == pytest.approx(0.1, abs=0.01)
    assert float(end.mean()) == pytest.approx(0.6, abs=0.01)
    assert float(end.max()) == pytest.approx(1.0, abs=0.01)
    assert abs(float(torch.corrcoef(torch.stack([start, end]))[0, 1])) < 0.05
