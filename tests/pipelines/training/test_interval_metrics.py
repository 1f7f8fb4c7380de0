from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import distributed

from meanflow_core.config import OptimizerConfig, TimeSamplingConfig
from meanflow_core.objectives.interface import build_objective
from meanflow_core.presets.demo import debug, debug_imf
from meanflow_core.training import StepMetrics, build_train_state
from pipelines.tracking.run import Run
from pipelines.training.metrics import IntervalMetrics, NonfiniteDetector
from pipelines.training.reporting import Reporter
from tests.support.training_steps import fresh_state, take_steps

CPU = torch.device("cpu")
NAMES = build_objective(debug_imf().loss).metric_names
NUM_SUMS = 1 + 2 * len(NAMES)
NUM_SAMPLES = torch.arange(1.0, len(NAMES) + 1.0)


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory):
    """A process group with a single process."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/meeting", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.fixture
def now(monkeypatch):
    """A fake clock: a list that holds the current time in seconds."""
    seconds = [100.0]
    monkeypatch.setattr("pipelines.training.metrics.time.monotonic", lambda: seconds[0])
    return seconds


def metrics(seed, *, norm=1.5, skipped=False):
    sums = torch.rand(NUM_SUMS, generator=torch.Generator().manual_seed(seed))
    sums[2::2] = NUM_SAMPLES
    return StepMetrics(sums=sums, gradient_norm=torch.tensor(norm), skipped=skipped)


def state():
    return build_train_state(debug(), sample_size=8, in_channels=4, num_classes=10, device=CPU)


DETERMINISTIC = ("loss", *NAMES, "gradient_norm")


def deterministic(found):
    """The metrics that do not depend on time."""
    return {name: found[name] for name in DETERMINISTIC}


def test_metrics_are_means_over_steps_and_samples():
    interval, steps = IntervalMetrics(NAMES, CPU), [metrics(seed, norm=float(seed)) for seed in range(3)]
    for step in steps:
        interval.add(step, data_seconds=0.0)
    trained = state()
    trained.num_skipped = 2
    found = interval.read(debug(), trained, step_flops=7.0)
    sums = sum(step.sums for step in steps)
    assert found["loss"] == pytest.approx(sums[0] / 3)
    means = sums[1::2] / (3 * NUM_SAMPLES)
    expected = dict(zip(NAMES, means.tolist(), strict=True))
    assert {name: found[name] for name in NAMES} == pytest.approx(expected)
    assert found["gradient_norm"] == pytest.approx(1.0)
    assert found["model_flops_per_second"] / found["images_per_second"] == pytest.approx(7.0 / 16)
    assert found["peak_memory_bytes"] > 1e7
    assert found["learning_rate"] == debug().optimizer.learning_rate
    assert found["num_skipped"] == 2.0
    assert found["ema_distance_0.9"] == 0.0


def test_learning_rate_is_that_of_the_last_step_without_the_factors_of_single_parameters():
    factors = OptimizerConfig(learning_rate=1.0, warmup_steps=4, learning_rate_factors=(("x_embedder", 0.1),))
    config = replace(debug(), optimizer=factors)
    trained, interval = fresh_state(config), IntervalMetrics(NAMES, CPU)
    take_steps(trained, config, 2)
    assert trained.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)
    assert interval.read(config, trained, 1.0)["learning_rate"] == 0.5


def test_mean_of_no_samples_is_left_out():
    interval, step = IntervalMetrics(NAMES, CPU), metrics(0)
    step.sums[1:3] = 0.0
    interval.add(step, data_seconds=0.0)
    assert set(NAMES) - set(interval.read(debug(), state(), 1.0)) == {NAMES[0]}


@pytest.mark.parametrize("skipped", [False, True])
def test_flow_matching_and_skipped_intervals_can_be_reported(skipped, caplog):
    flow = replace(debug(), loss=replace(debug().loss, times=TimeSamplingConfig(fraction_r_below_t=0.0)))
    trained, interval = fresh_state(flow), IntervalMetrics(build_objective(flow.loss).metric_names, CPU)
    interval.add(replace(take_steps(trained, flow, 1), skipped=skipped), data_seconds=0.0)
    run = MagicMock(spec=Run)
    with caplog.at_level("INFO"):
        Reporter(run, None, num_steps=1, first_step=0).log_metrics(interval.read(flow, trained, 1.0), step=1)
    assert "trained 1 of 1 steps" in caplog.text
    assert ("squared error r equals t" in caplog.text) == (not skipped)
    logged = run.log_metrics.call_args.args[0]
    assert ("squared_error_r_equals_t" in logged) == (not skipped)
    assert not any(name.startswith(("squared_error_r_below_t", "dudt_norm")) for name in logged)


def test_metrics_of_an_interval_of_skipped_steps_are_finite():
    interval = IntervalMetrics(NAMES, CPU)
    interval.add(metrics(0, norm=float("nan"), skipped=True), data_seconds=0.0)
    found = interval.read(debug(), state(), 1.0)
    assert np.isfinite(list(found.values())).all()
    assert found["loss"] == 0.0


def test_skipped_steps_do_not_count():
    interval, without = IntervalMetrics(NAMES, CPU), IntervalMetrics(NAMES, CPU)
    nonfinite = replace(metrics(1), sums=torch.full((NUM_SUMS,), float("nan")), skipped=True)
    for step in (metrics(0), nonfinite, metrics(2)):
        interval.add(step, data_seconds=0.0)
        if not step.skipped:
            without.add(step, data_seconds=0.0)
    assert deterministic(interval.read(debug(), state(), 1.0)) == deterministic(without.read(debug(), state(), 1.0))


def test_resumed_interval_matches_an_uninterrupted_one_bit_for_bit():
    uninterrupted, first = IntervalMetrics(NAMES, CPU), IntervalMetrics(NAMES, CPU)
    for seed in range(6):
        uninterrupted.add(metrics(seed), data_seconds=0.0)
        if seed < 4:
            first.add(metrics(seed), data_seconds=0.0)
    resumed = IntervalMetrics(NAMES, CPU)
    resumed.restore(first.state(), rank=0)
    for seed in (4, 5):
        resumed.add(metrics(seed), data_seconds=0.0)
    assert deterministic(resumed.read(debug(), state(), 1.0)) == deterministic(
        uninterrupted.read(debug(), state(), 1.0)
    )


def test_rank_0_takes_all_sums_if_the_world_size_has_changed():
    saved = {"num_steps": 2, "sums": [[1.0] * NUM_SUMS + [5.0], [2.0] * NUM_SUMS + [5.0]]}
    first, other = IntervalMetrics(NAMES, CPU), IntervalMetrics(NAMES, CPU)
    first.restore(saved, rank=0)
    other.restore(saved, rank=1)
    assert first.state() == {"num_steps": 2, "sums": [[3.0] * NUM_SUMS + [5.0]]}
    assert other.state() == {"num_steps": 2, "sums": [[0.0] * (NUM_SUMS + 1)]}


def test_each_rank_restores_its_own_sums(monkeypatch):
    saved = {"num_steps": 2, "sums": [[1.0] * (NUM_SUMS + 1), [2.0] * (NUM_SUMS + 1)]}
    second = IntervalMetrics(NAMES, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "get_world_size", lambda: 2)
        second.restore(saved, rank=1)
    assert second.state() == {"num_steps": 2, "sums": saved["sums"][1:]}


def test_rates_exclude_earlier_intervals_and_steps_before_a_resume(now):
    interval = IntervalMetrics(NAMES, CPU)
    interval.add(metrics(0), data_seconds=7.0)
    now[0] += 50.0
    interval.clear()
    interval.add(metrics(0), data_seconds=0.5)
    interval.add(metrics(1, skipped=True), data_seconds=0.5)
    now[0] += 4.0
    found = interval.read(debug(), state(), 1.0)
    assert found["images_per_second"] == pytest.approx(2 * 16 / 4.0)
    assert found["data_wait_share"] == pytest.approx(0.25)
    resumed = IntervalMetrics(NAMES, CPU)
    resumed.restore({"num_steps": 9, "sums": [[1.0] * (NUM_SUMS + 1)]}, rank=0)
    resumed.add(metrics(0), data_seconds=0.0)
    now[0] += 4.0
    assert resumed.read(debug(), state(), 1.0)["images_per_second"] == pytest.approx(16 / 4.0)


def test_rates_exclude_pauses(now):
    interval = IntervalMetrics(NAMES, CPU)
    interval.add(metrics(0), data_seconds=0.5)
    now[0] += 2.0
    with interval.paused():
        now[0] += 10.0
    found = interval.read(debug(), state(), 1.0)
    assert found["images_per_second"] == pytest.approx(8.0)
    assert found["data_wait_share"] == pytest.approx(0.25)


def test_nonfinite_gradient_is_found_one_step_later():
    detector = NonfiniteDetector()
    detector.add(1, metrics(1))
    detector.add(2, metrics(2, norm=float("nan"), skipped=True))  # skipped steps are ignored
    detector.add(3, metrics(3, norm=float("inf")))
    assert detector.first_nonfinite_step is None
    detector.add(4, metrics(4, norm=float("nan")))
    assert detector.first_nonfinite_step == 3
    detector.check()
    assert detector.first_nonfinite_step == 3
    settled = NonfiniteDetector()
    settled.add(7, metrics(7, norm=float("nan")))
    settled.check()
    assert settled.first_nonfinite_step == 7
