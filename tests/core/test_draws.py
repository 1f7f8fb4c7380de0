"""Distributions of times and guidance, and the record of a step."""

import pytest
import torch

from meanflow_core.config import GuidanceConfig, GuidanceSamplingConfig, MeanFlowConfig, TimeSamplingConfig
from meanflow_core.objectives.draws import (
    GUIDANCE_INPUTS,
    draw_guidance_interval,
    draw_omega,
    draw_two_times,
    r_below_t_mask,
)
from meanflow_core.objectives.interface import build_objective
from tests.support.objectives import GUIDED, HALF, IMPROVED, draw_record, make_record

DRAWS = {
    "t": torch.tensor([0.7, 0.5]),
    "r": torch.tensor([0.2, 0.5]),
    "noise": torch.zeros(2, 1, 1, 1),
    "label_dropped": torch.tensor([False, False]),
    "omega": torch.tensor([1.0, 8.0]),
    "guidance_interval_start": torch.tensor([0.2, 0.0]),
    "guidance_interval_end": torch.tensor([0.5, 1.0]),
}


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("num_rows", [1, 7, 32])
def test_number_of_rows_below_is_exact_and_they_are_spread_evenly(num_rows, fraction):
    below = r_below_t_mask(num_rows, fraction)
    assert int(below.sum()) == int(num_rows * fraction + 1e-9)
    for start in range(num_rows):  # the fraction holds for every contiguous share, to within one row
        for stop in range(start + 1, num_rows + 1):
            assert abs(float(below[start:stop].sum()) - fraction * (stop - start)) < 1.0 + 1e-6


def test_times_are_sorted_and_differ_only_on_rows_below():
    t, r = draw_two_times(1000, TimeSamplingConfig(), torch.Generator().manual_seed(0))
    below = r_below_t_mask(1000, 0.25)
    assert ((r > 0) & (r <= t) & (t < 1)).all()
    assert torch.equal(r < t, below)


@pytest.mark.parametrize(("mean", "std"), [(-0.4, 1.0), (0.3, 2.0)])
def test_times_follow_the_logit_normal_distribution(mean, std):
    t, _ = draw_two_times(40_000, TimeSamplingConfig(logit_mean=mean, logit_std=std), torch.Generator().manual_seed(1))
    # t is the larger of two: its logit has mean mu + sigma / sqrt(pi) and variance sigma^2 (1 - 1 / pi).
    logits = torch.logit(t.double())
    assert float(logits.mean()) == pytest.approx(mean + std / torch.pi**0.5, abs=0.02 * std)
    assert float(logits.std()) == pytest.approx(std * (1 - 1 / torch.pi) ** 0.5, abs=0.02 * std)


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


def test_ends_of_the_guidance_interval_are_independent_and_uniform_on_either_side_of_the_split():
    below, config = torch.arange(20_000) % 2 == 0, GuidanceSamplingConfig(interval_split=0.2)
    start, end = draw_guidance_interval(below, config, torch.Generator().manual_seed(0))
    assert torch.equal(start[~below], torch.zeros(10_000))  # r = t: the interval is [0, 1]
    assert torch.equal(end[~below], torch.ones(10_000))
    start, end = start[below], end[below]
    assert float(start.max()) <= 0.2 <= float(end.min())
    assert float(start.mean()) == pytest.approx(0.1, abs=0.01)
    assert float(end.mean()) == pytest.approx(0.6, abs=0.01)
    assert float(end.max()) == pytest.approx(1.0, abs=0.01)
    assert abs(float(torch.corrcoef(torch.stack([start, end]))[0, 1])) < 0.05


def test_draws_are_a_function_of_seed_and_step():
    def draw(seed, step):
        return draw_record(IMPROVED, seed=seed, step=step, num_rows=8, latent_shape=(4, 8, 8)).draws

    assert torch.equal(draw(1, 2).noise, draw(1, 2).noise)
    assert torch.equal(draw(1, 2).omega, draw(1, 2).omega)
    assert not torch.equal(draw(1, 2).noise, draw(1, 3).noise)
    assert not torch.equal(draw(1, 2).t, draw(2, 2).t)
    assert not torch.equal(draw(1, 2).noise, draw(1, 2).posterior_noise)
    assert not torch.equal(draw(1, 2).noise, draw(2, 1).noise)
    # The identity of every run: another value, for example of a newer NumPy, would change what a resumed run trains on.
    drawn = draw(1, 2)
    assert drawn.noise[0, 0, 0, :2].tolist() == pytest.approx([0.0196245, -0.6034775])
    assert drawn.noise[7, 3, 7, 6:].tolist() == pytest.approx([-0.3993497, 0.0508170])
    assert drawn.posterior_noise[7, 3, 7, 6:].tolist() == pytest.approx([-0.4135489, -0.6062246])
    assert drawn.t[:2].tolist() == pytest.approx([0.1739077, 0.4857677])
    assert drawn.omega[:2].tolist() == pytest.approx([4.1246300, 1.9764085])
    assert drawn.mirrored.tolist() == [False, False, True, False, False, False, True, False]


def test_half_of_the_rows_are_mirrored_and_posterior_noise_is_standard_normal():
    record = draw_record(MeanFlowConfig(), seed=0, step=0, num_rows=40_000, latent_shape=(1, 1, 1))
    assert float(record.mirrored.double().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(record.posterior_noise.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(record.posterior_noise.std()) == pytest.approx(1.0, abs=0.02)


def test_labels_are_dropped_on_rows_with_r_equal_to_t_if_there_are_enough():
    def draw(probability, fraction, num_rows):
        times = TimeSamplingConfig(fraction_r_below_t=fraction)
        config = MeanFlowConfig(label_drop_probability=probability, times=times)
        return draw_record(config, seed=0, step=0, num_rows=num_rows, latent_shape=(1, 1, 1))

    record = draw(0.1, 0.25, 40_000)
    assert not record.draws.label_dropped[record.plan.below].any()
    assert float(record.draws.label_dropped.double().mean()) == pytest.approx(0.1, abs=0.006)
    for probability, fraction in ((0.5, 0.5), (0.1, 0.9)):  # just enough, although 1 - 0.9 is rounded
        record = draw(probability, fraction, 1000)
        assert torch.equal(record.draws.label_dropped, record.draws.r == record.draws.t)
    record = draw(0.5, 0.75, 40_000)
    assert float(record.draws.label_dropped[record.plan.below].double().mean()) == pytest.approx(0.5, abs=0.02)


def test_rows_of_the_no_grad_forward_have_few_sizes():
    sizes = {
        len(draw_record(GUIDED, seed=0, step=step, num_rows=64, latent_shape=(1, 1, 1)).plan.velocity)
        for step in range(200)
    }
    assert all(size % 8 == 0 for size in sizes)
    assert len(sizes) <= 6


def test_rows_at_the_bounds_of_the_interval_are_guided_and_omega_may_be_one():
    t = torch.tensor([0.125, 0.25, 0.75, 0.875])
    draws = {"t": t, "r": t, "noise": torch.zeros(4, 1, 1, 1), "label_dropped": torch.zeros(4, dtype=torch.bool)}
    config = MeanFlowConfig(
        guidance=GuidanceConfig(omega=0.7, kappa=0.5, guidance_interval_start=0.25, guidance_interval_end=0.75)
    )
    assert (make_record(config, **draws).weights.conditional > 0).tolist() == [False, True, True, False]
    guidance = {
        "omega": torch.tensor([2.0, 2.0, 2.0, 1.0]),
        "guidance_interval_start": torch.full((4,), 0.25),
        "guidance_interval_end": torch.full((4,), 0.75),
    }
    record = make_record(IMPROVED, **draws, **guidance)
    assert record.weights.conditional.tolist() == [0.0, 0.5, 0.5, 0.0]


def test_a_worker_draws_its_rows_as_one_process_would():
    objective = build_objective(IMPROVED)
    drawn = objective.draw(seed=1, step=2, num_rows=16, latent_shape=(4, 2, 2))
    whole, share = objective.record(drawn, 0, 16), objective.record(drawn, 3, 9)
    for name in ("t", "r", "noise", "posterior_noise", "label_dropped", "mirrored", *GUIDANCE_INPUTS):
        assert torch.equal(getattr(share.draws, name), getattr(whole.draws, name)[3:9]), name


def test_record_moves_to_a_device():
    for config in (IMPROVED, MeanFlowConfig(times=HALF)):
        record = draw_record(config, seed=1, step=2, num_rows=16, latent_shape=(4, 2, 2))
        moved = record.to(torch.device("meta"))
        for part in ("draws", "weights", "plan"):
            before, after = vars(getattr(record, part)), vars(getattr(moved, part))
            for name, value in before.items():
                if value is None:
                    assert after[name] is None
                else:
                    assert (after[name].device.type, after[name].shape) == ("meta", value.shape)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"t": torch.tensor([1.2, 0.5])}, "0 <= r <= t <= 1"),
        ({"t": torch.tensor([float("nan"), 0.5])}, "0 <= r <= t <= 1"),
        ({"t": torch.tensor([0.7, 0.25])}, "but row 1 has r = 0.5, t = 0.25"),
        ({"r": torch.tensor([-0.1, 0.5])}, "0 <= r <= t <= 1"),
        ({"noise": torch.full((2, 1, 1, 1), torch.inf)}, "finite"),
        ({"noise": torch.zeros(2, 1)}, "shape"),
        ({"label_dropped": torch.tensor([True])}, "shape"),
        ({"mirrored": torch.tensor([True])}, "label_dropped, mirrored, omega, .* must have shape"),
        ({"posterior_noise": torch.zeros(2, 1, 1, 2)}, r"shape \(2, 1, 1, 1\), but got \(2, 1, 1, 2\)"),
        ({"omega": torch.tensor([0.5, 2.0])}, "omega >= 1"),
        ({"omega": torch.tensor([torch.inf, 2.0])}, "omega >= 1"),
        ({"omega": None}, "needs omega"),
        ({"guidance_interval_start": torch.tensor([0.6, 0.0])}, "guidance_interval_start <= guidance_interval_end"),
        ({"guidance_interval_start": torch.tensor([-0.1, 0.0])}, "0 <= guidance_interval_start"),
        ({"guidance_interval_end": torch.tensor([1.1, 1.0])}, "guidance_interval_end <= 1"),
    ],
)
def test_invalid_draws_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make_record(IMPROVED, **{**DRAWS, **changes})
