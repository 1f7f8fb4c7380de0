import pytest
import torch

from meanflow_core.config import TimeSamplingConfig
from meanflow_core.time_sampling import draw_times, rows_below


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
