import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed

from meanflow_core.generator import build_pipeline
from meanflow_core.presets import debug
from meanflow_core.training import SUMS, StepMetrics, build_train_state
from pipelines.tracking.run import MlflowClient, Run
from pipelines.train.figures import Figures, FiniteWatch
from pipelines.train.worker import Observer, sample_grid

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory):
    """A process group of this process alone."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/meeting", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.fixture
def now(monkeypatch):
    """The seconds that the clock shows, in a list."""
    seconds = [100.0]
    monkeypatch.setattr("pipelines.train.worker.time.monotonic", lambda: seconds[0])
    return seconds


def metrics(seed, *, norm=1.5, skipped=False):
    sums = torch.rand(len(SUMS), generator=torch.Generator().manual_seed(seed))
    sums[2], sums[4] = 12.0, 4.0  # rows
    return StepMetrics(sums=sums, gradient_norm=torch.tensor(norm), skipped=skipped)


def state():
    return build_train_state(debug(), sample_size=8, in_channels=4, num_classes=10, device=CPU)


STEADY = (
    "loss",
    "squared_error_r_equals_t",
    "squared_error_r_below_t",
    "squared_error_v",
    "dudt_norm",
    "gradient_norm",
)


def steady(figures):
    """The figures that do not tell the time."""
    return {name: figures[name] for name in STEADY}


def test_figures_are_means_over_steps_and_rows():
    figures, steps = Figures(CPU), [metrics(seed, norm=float(seed)) for seed in range(3)]
    for step in steps:
        figures.add(step, data_seconds=0.0)
    trained = state()
    trained.num_skipped = 2
    found = figures.read(debug(), trained, step_flops=7.0)
    sums = dict(zip(SUMS, sum(step.sums for step in steps).tolist(), strict=True))
    assert found["loss"] == pytest.approx(sums["loss"] / 3)
    assert found["squared_error_r_equals_t"] == pytest.approx(sums["squared_error_r_equals_t"] / 36)
    assert found["squared_error_r_below_t"] == pytest.approx(sums["squared_error_r_below_t"] / 12)
    assert found["squared_error_v"] == pytest.approx(sums["squared_error_v"] / 48)
    assert found["dudt_norm"] == pytest.approx(sums["dudt_norm"] / 12)
    assert found["gradient_norm"] == pytest.approx(1.0)
    assert found["model_flops_per_second"] / found["images_per_second"] == pytest.approx(7.0 / 16)
    assert found["peak_memory_bytes"] > 1e7
    assert found["learning_rate"] == debug().optimizer.learning_rate
    assert found["num_skipped"] == 2.0
    assert found["ema_distance_0.9"] == 0.0


def test_network_without_a_velocity_head_has_no_error_of_it():
    figures, step = Figures(CPU), metrics(0)
    step.sums[SUMS.index("squared_error_v")] = 0.0
    figures.add(step, data_seconds=0.0)
    assert "squared_error_v" not in figures.read(debug(), state(), 1.0)


def test_interval_of_skipped_steps_alone_has_figures():
    figures = Figures(CPU)
    figures.add(metrics(0, norm=float("nan"), skipped=True), data_seconds=0.0)
    found = figures.read(debug(), state(), 1.0)
    assert np.isfinite(list(found.values())).all()
    assert found["loss"] == 0.0


def test_skipped_step_is_in_no_mean():
    figures, without = Figures(CPU), Figures(CPU)
    broken = replace(metrics(1), sums=torch.full((len(SUMS),), float("nan")), skipped=True)
    for step in (metrics(0), broken, metrics(2)):
        figures.add(step, data_seconds=0.0)
        if not step.skipped:
            without.add(step, data_seconds=0.0)
    assert steady(figures.read(debug(), state(), 1.0)) == steady(without.read(debug(), state(), 1.0))


def test_interval_goes_on_after_a_resume_to_the_last_bit():
    straight, first = Figures(CPU), Figures(CPU)
    for seed in range(6):
        straight.add(metrics(seed), data_seconds=0.0)
        if seed < 4:
            first.add(metrics(seed), data_seconds=0.0)
    resumed = Figures(CPU)
    resumed.restore(first.state(), rank=0)
    for seed in (4, 5):
        resumed.add(metrics(seed), data_seconds=0.0)
    assert steady(resumed.read(debug(), state(), 1.0)) == steady(straight.read(debug(), state(), 1.0))


def test_interval_of_another_number_of_workers_is_the_first_ones_to_add_up():
    saved = {"num_steps": 2, "sums": [[1.0] * len(SUMS) + [5.0], [2.0] * len(SUMS) + [5.0]]}
    first, other = Figures(CPU), Figures(CPU)
    first.restore(saved, rank=0)
    other.restore(saved, rank=1)
    assert first.state() == {"num_steps": 2, "sums": [[3.0] * len(SUMS) + [5.0]]}
    assert other.state() == {"num_steps": 2, "sums": [[0.0] * (len(SUMS) + 1)]}


def test_worker_goes_on_with_its_own_sums(monkeypatch):
    saved = {"num_steps": 2, "sums": [[1.0] * (len(SUMS) + 1), [2.0] * (len(SUMS) + 1)]}
    second = Figures(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "get_world_size", lambda: 2)
        second.restore(saved, rank=1)
    assert second.state() == {"num_steps": 2, "sums": saved["sums"][1:]}


def test_pace_is_of_this_interval_and_of_steps_taken_here_skipped_ones_too(now):
    figures = Figures(CPU)
    figures.add(metrics(0), data_seconds=7.0)
    now[0] += 50.0
    figures.clear()
    figures.add(metrics(0), data_seconds=0.5)
    figures.add(metrics(1, skipped=True), data_seconds=0.5)
    now[0] += 4.0
    found = figures.read(debug(), state(), 1.0)
    assert found["images_per_second"] == pytest.approx(2 * 16 / 4.0)
    assert found["data_wait_share"] == pytest.approx(0.25)
    resumed = Figures(CPU)
    resumed.restore({"num_steps": 9, "sums": [[1.0] * (len(SUMS) + 1)]}, rank=0)
    resumed.add(metrics(0), data_seconds=0.0)
    now[0] += 4.0
    assert resumed.read(debug(), state(), 1.0)["images_per_second"] == pytest.approx(16 / 4.0)


def test_pace_is_without_what_was_excluded(now):
    figures = Figures(CPU)
    figures.add(metrics(0), data_seconds=0.5)
    now[0] += 12.0
    figures.exclude(10.0)
    found = figures.read(debug(), state(), 1.0)
    assert found["images_per_second"] == pytest.approx(8.0)
    assert found["data_wait_share"] == pytest.approx(0.25)


def test_first_gradient_that_is_not_finite_is_noticed_by_the_next_step():
    watch = FiniteWatch()
    watch.add(1, metrics(1))
    watch.add(2, metrics(2, norm=float("nan"), skipped=True))  # it moved nothing
    watch.add(3, metrics(3, norm=float("inf")))
    assert watch.first_bad_step is None
    watch.add(4, metrics(4, norm=float("nan")))
    assert watch.first_bad_step == 3
    watch.settle()
    assert watch.first_bad_step == 3
    settled = FiniteWatch()
    settled.add(7, metrics(7, norm=float("nan")))
    settled.settle()
    assert settled.first_bad_step == 7


def test_first_worker_alone_shows_what_all_draw(pipeline, tmp_path, caplog):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = Run.begin(uri, "experiment", "name", {})
    first, other = Observer(run, pipeline, 10, 0), Observer(None, pipeline, 10, 0)
    figures = {"loss": 1.0, "images_per_second": 5.0, "squared_error_r_equals_t": 2.0, "squared_error_r_below_t": 3.0}
    with caplog.at_level(logging.INFO):
        for observer in (other, first):
            observer.show_figures(figures, 10)
            observer.show_samples(10)
            observer.close()
    assert len([record for record in caplog.records if "trained 10 of 10 steps" in record.message]) == 1
    client = MlflowClient(uri)
    assert [metric.step for metric in client.get_metric_history(run.run_id, "loss")] == [10]
    names = [file.path for file in client.list_artifacts(run.run_id, "images") if file.path.endswith(".png")]
    assert sorted(name.split("~")[1].split("+")[0].split("%")[0] for name in names) == ["one_step", "two_steps"]
    pictures = [client.download_artifacts(run.run_id, name, str(tmp_path)) for name in sorted(names)]
    for path, num_steps in zip(pictures, (1, 2), strict=True):
        assert "step%10%" in path or "step+10+" in path
        assert np.array_equal(np.asarray(Image.open(path)), sample_grid(pipeline, num_steps))
    assert other.unlogged() == []
    assert np.isfinite(list(client.get_run(run.run_id).data.metrics.values())).all()


def test_figures_that_mlflow_has_not_taken_are_told_for_a_checkpoint(pipeline):
    away = Run("http://127.0.0.1:9", "1a2b")
    observer = Observer(away, pipeline, 10, 0)
    figures = {"loss": 1.0, "images_per_second": 5.0, "squared_error_r_equals_t": 2.0, "squared_error_r_below_t": 3.0}
    observer.show_figures(figures, 5)
    assert len(observer.unlogged()) == 1
    taken = Run("http://127.0.0.1:9", "1a2b")
    taken.adopt(observer.unlogged())
    assert taken.pending() == observer.unlogged()


def test_pace_in_the_log_is_of_steps_taken_since_the_resume(pipeline, monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: now[0])
    observer = Observer(Run("http://127.0.0.1:9", "1a2b"), pipeline, 10, 6)
    now[0] += 2.0
    figures = {"images_per_second": 5.0, "squared_error_r_equals_t": 2.0, "squared_error_r_below_t": 3.0}
    with caplog.at_level(logging.INFO):
        observer.show_figures(figures, 10)
    assert "trained 10 of 10 steps, 2.0 steps/s" in caplog.text


def test_grid_of_few_classes_has_a_row_for_each(vae):
    network = state().network
    few = type(network)(**{**{k: v for k, v in network.config.items() if not k.startswith("_")}, "num_classes": 2})
    assert sample_grid(build_pipeline(few.eval(), vae, ["a", "b"])).shape == (2 * 66 - 2, 8 * 66 - 2, 3)
