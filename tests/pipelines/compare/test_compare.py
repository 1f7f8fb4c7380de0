import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from meanflow_core.generator import load_pipeline
from meanflow_core.metrics import FeatureStatistics
from meanflow_core.training import SUMS
from pipelines.compare.__main__ import METHODS, REPORT_FILES, CompareJob, compare, ratios
from pipelines.compare.planar import EXAMPLE, Mixture, draw_figure
from pipelines.compare.plots import draw_grid, plot_comparison, plot_losses, spread, table
from pipelines.compare.scores import Point, draw_images, interleaved_medians, measure_run, points_of, read_quality
from pipelines.compare.trainings import (
    Data,
    LossCurve,
    Trial,
    methods,
    planned_runs,
    read_record,
    steps_of,
    train_all,
    train_run,
)
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.encode.job import EncodeJob
from pipelines.errors import InputError
from pipelines.evaluate.judge import load_judge
from pipelines.plan.cost import num_parameters
from tests.support.latents import encode_here

SIZES = {"sample_size": 8, "in_channels": 4, "num_classes": 10}
COSTS = {"flow_matching": 10.0, "meanflow": 12.0, "meanflow_own_velocity": 12.0, "improved_meanflow": 40.0}


@pytest.fixture(scope="module")
def data(image_root, tmp_path_factory):
    latents = str(tmp_path_factory.mktemp("comparison") / "latents")
    encode_here(
        EncodeJob(images=str(image_root / "train"), output=latents, vae=str(SHIPPED_AUTOENCODER), image_size=64)
    )
    return Data(latents=latents)


@pytest.fixture
def job(data, image_root, tmp_path):
    return CompareJob(
        data=data.latents,
        train_images=str(image_root / "train"),
        held_out_images=str(image_root / "val"),
        output=tmp_path / "comparison",
        methods=("flow_matching", "meanflow"),
        seeds=(0,),
        num_steps=2,
        budgets=("steps",),
        calls=(1, 2),
        num_samples=20,
        timed_rounds=1,
    )


def a_report(num_seeds=2):
    """A report as `compare` makes it, of invented figures."""
    lines = []
    for budget in ("steps", "flops"):
        for number, method in enumerate(METHODS):
            for point in points_of(methods(100)[method].config, (1, 2, 4)):
                distances = [1.0 + number + seed + 4.0 / point.calls for seed in range(num_seeds)]
                lines.append(
                    {
                        "budget": budget,
                        "method": method,
                        "num_steps": 100,
                        "solver": point.solver,
                        "calls": point.calls,
                        "frechet": spread(distances),
                        "accuracy": spread([0.5 for _ in distances]),
                        "by_seed": [{"seed": seed, "frechet": value} for seed, value in enumerate(distances)],
                    }
                )
    curve = [
        {"step": step, "squared_error_r_equals_t": 9.0 / step, "squared_error_r_below_t": 8.0 / step}
        for step in (50, 100)
    ]
    no_rows_below = [{**point, "squared_error_r_below_t": None} for point in curve]
    return {
        "num_samples": 20,
        "num_train_images": 60,
        "seeds": list(range(num_seeds)),
        "calls": [1, 2, 4],
        "timed_calls": [1, 4],
        "timed_images": 10,
        "decoder_milliseconds_per_image": 1.5,
        "budgets": ["steps", "flops"],
        "hardware": {"processor": "a processor", "num_cores": 2, "gpu": None, "num_threads": 1, "torch": "2"},
        "held_out": {"frechet": 0.1, "accuracy": 0.99},
        "reconstruction": {"frechet": 0.2, "accuracy": 0.98},
        "results": lines,
        "ratios": ratios(lines),
        "runs": [
            {
                "method": method,
                "budgets": ["steps", "flops"],
                "loss_curve": no_rows_below if method == "flow_matching" else curve,
            }
            for method in METHODS
            for _ in range(num_seeds)
        ],
        "methods": [
            {
                "name": name,
                "title": methods(100)[name].title,
                "step_flops": 1e9,
                "num_parameters": 2_000_000,
                "num_parameters_sampling": 1_500_000,
                "seconds_per_step": 0.5,
                "milliseconds_per_image": {"1": 3.0, "4": 9.0},
            }
            for name in METHODS
        ],
    }


def test_methods_differ_in_the_objective_alone():
    compared = {name: method.config for name, method in methods(100).items()}
    base = compared["meanflow"]
    for name, config in compared.items():
        assert replace(config, loss=base.loss, network=base.network, sampling=base.sampling) == base, name
    guided = [compared[name].loss.guidance.effective_scale for name in METHODS[:3]]
    assert [*guided, compared["improved_meanflow"].sampling.guidance_scale] == [2.0] * 4
    assert compared["flow_matching"].loss.is_flow_matching
    assert compared["meanflow_own_velocity"].loss == replace(base.loss, tangent="own_velocity")


def test_equal_operations_are_as_many_steps_as_the_dearest_method_pays_for():
    assert steps_of("steps", 30, COSTS) == dict.fromkeys(COSTS, 30)
    assert steps_of("flops", 30, COSTS) == {
        "flow_matching": 120,
        "meanflow": 100,
        "meanflow_own_velocity": 100,
        "improved_meanflow": 30,
    }
    assert steps_of("flops", 30, COSTS, "meanflow")["improved_meanflow"] == 9


def test_run_of_two_budgets_is_trained_once_and_dear_ones_begin():
    steps = [steps_of(budget, 30, COSTS) for budget in ("steps", "flops")]
    runs = planned_runs(steps, ("flow_matching", "improved_meanflow"), (0, 1), COSTS)
    assert [(run.method, run.num_steps) for run in runs[4:]] == [("flow_matching", 30)] * 2
    assert sorted((run.method, run.num_steps, run.seed) for run in runs[:4]) == [
        ("flow_matching", 120, 0),
        ("flow_matching", 120, 1),
        ("improved_meanflow", 30, 0),
        ("improved_meanflow", 30, 1),
    ]


def test_loss_curve_has_means_over_parts_of_the_run():
    curve = LossCurve(num_steps=120)  # two steps a part
    for step in range(120):
        figures = {
            "squared_error_r_equals_t": 3.0 * step,
            "rows_r_equals_t": 3.0,
            "squared_error_r_below_t": 0.0,
            "rows_r_below_t": 0.0,
        }
        curve.add(step, torch.tensor([figures.get(name, 0.0) for name in SUMS]))
    assert len(curve.points) == 60
    assert curve.points[1] == {"step": 4, "squared_error_r_equals_t": 2.5, "squared_error_r_below_t": None}


def test_networks_sample_with_as_many_parameters():
    from meanflow_core.generator import for_sampling
    from meanflow_core.networks import build_network

    compared = methods(100)
    wanted = num_parameters(compared["meanflow"].config.network, **SIZES)
    network = for_sampling(build_network(compared["improved_meanflow"].config.network, **SIZES))
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(wanted, rel=0.03)


def test_trained_run_is_whole_and_neither_trained_nor_measured_again(data, tmp_path):
    run = Trial(method="flow_matching", seed=3, num_steps=2)
    record = train_run(run, data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [run.name]
    assert record == read_record(run, tmp_path)
    assert record["config"]["seed"] == 3
    assert [point["step"] for point in record["loss_curve"]] == [1, 2]
    folder = tmp_path / run.name
    assert load_pipeline(folder / "generator").config.prediction == "velocity"

    judge = load_judge(SHIPPED_JUDGE)
    statistics = FeatureStatistics.of(torch.randn(80, 64))
    points = [Point(solver="euler", calls=1), Point(solver="heun", calls=2)]
    measure_run(folder, points, judge, statistics, 20)
    found = [read_quality(folder, point) for point in points]
    assert found[0] != found[1]
    shutil.rmtree(folder / "generator")  # what is known needs no generator
    measure_run(folder, points, judge, statistics, 20)
    assert train_run(run, Data(latents="nowhere"), tmp_path) == record
    assert [read_quality(folder, point) for point in points] == found


def test_what_a_killed_run_left_is_deleted_and_whole_runs_stay(tmp_path):
    for name in ("meanflow-2-steps-seed-0", "meanflow-2-steps-seed-1.0a1b.partial"):
        (tmp_path / name / "generator").mkdir(parents=True)
    train_all([], Data(latents="none"), tmp_path, COSTS, use_gpu=False)
    assert [path.name for path in tmp_path.iterdir()] == ["meanflow-2-steps-seed-0"]


@pytest.mark.parametrize(
    "point", points_of(methods(100)["flow_matching"].config, (1, 2, 8)), ids=lambda point: point.file
)
def test_every_evaluation_of_the_network_counts(pipeline, point):
    pipeline.register_to_config(prediction="velocity")
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    draw_images(pipeline, point, range(3))
    assert len(calls) == point.calls


def test_samples_have_their_own_seeds_and_classes(pipeline):
    expected = pipeline.images_from_seeds([2, 1], [12, 31], 2)
    drawn = draw_images(pipeline, Point(solver="euler", calls=2), [12, 31])
    assert (expected.int() - drawn.int()).abs().max() <= 1


def test_times_are_medians_of_turns_without_the_first(monkeypatch):
    now, turns = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def action(name, seconds):
        def take():
            turns.append(name)
            now[0] += seconds.pop(0)

        return take

    actions = {"a": action("a", [90.0, 1.0, 3.0, 2.0]), "b": action("b", [80.0, 7.0, 7.0, 5.0])}
    assert interleaved_medians(actions, torch.device("cpu"), 3) == {"a": 2.0, "b": 7.0}
    assert "".join(turns) == "abababab"


def test_ratios_are_between_runs_of_the_same_seed():
    def line(method, calls, distances, solver="euler"):
        return {
            "budget": "steps",
            "method": method,
            "solver": solver,
            "calls": calls,
            "by_seed": [{"seed": seed, "frechet": value} for seed, value in enumerate(distances)],
        }

    lines = [
        line("flow_matching", 1, [10.0, 20.0]),
        line("flow_matching", 32, [2.0, 1.0]),
        line("flow_matching", 32, [0.1, 0.1], solver="heun"),
        line("meanflow", 1, [4.0, 3.0]),
        line("meanflow", 32, [7.0, 7.0]),
    ]
    assert ratios(lines) == [
        {
            "budget": "steps",
            "method": "meanflow",
            "over_most_calls": {"mean": 2.5, "min": 2.0, "max": 3.0},
            "over_one_call": {"mean": pytest.approx(0.275), "min": 0.15, "max": 0.4},
        }
    ]
    assert ratios(lines[3:]) == []


def test_table_says_what_was_measured_on_what():
    text = table(a_report())
    assert "not FID" in text
    assert "1 thread of 2 cores, a processor" in text
    assert "| flow matching, Euler | 100 | 5.500 (5.000–6.000) | 3.500 (3.000–4.000) | 2.500 (2.000–3.000) |" in text
    assert "| flow matching, Heun | 100 | — | 3.500 (3.000–4.000) |" in text
    assert "| MeanFlow | equal steps | 2.67 (2.33–3.00) | 1.18 (1.17–1.20) |" in text
    assert "| MeanFlow | 1.50 M (2.00 M) | 1.0 | 0.500 | 3.0 | 9.0 |" in text


def test_plots_are_drawn(tmp_path):
    report = a_report()
    plot_comparison(report, tmp_path / "comparison.png")
    plot_losses(report, tmp_path / "losses.png")
    block = np.zeros((8, 64, 64, 3), np.uint8)
    draw_grid({"MeanFlow": {1: block, 2: block}}, tmp_path / "grid.png", num_columns=4, subtitle="")
    draw_figure(tmp_path / "paths.png")
    assert len(list(tmp_path.iterdir())) == 4


def test_velocity_of_one_gaussian_carries_noise_straight_to_it():
    # Of N(m, s^2 I), z_0 = m + s z_1: the map that keeps each point's place in its Gaussian.
    mixture = Mixture(means=np.array([[2.0, -1.0]]), std=0.5)
    z = np.random.default_rng(0).standard_normal((20, 2))
    end = z - mixture.average_velocity(z, 0.0, 1.0)
    assert end == pytest.approx(mixture.means + 0.5 * z, abs=1e-6)


@pytest.mark.parametrize(("r", "t"), [(0.0, 0.9), (0.2, 0.7), (0.5, 0.95)])
def test_average_velocity_satisfies_the_meanflow_identity(r, t):
    z, h = np.random.default_rng(0).standard_normal((50, 2)), 1e-4
    v = EXAMPLE.velocity(z, t)
    after, before = (EXAMPLE.average_velocity(z + side * v, r, t + side) for side in (h, -h))
    du_dt = (after - before) / (2.0 * h)
    assert np.abs(v - (t - r) * du_dt - EXAMPLE.average_velocity(z, r, t)).max() < 1e-4
    assert np.abs((t - r) * du_dt).max() > 0.1


def test_one_step_of_the_velocity_ends_at_the_mean_of_the_data():
    z = np.random.default_rng(0).standard_normal((50, 2))
    assert z - EXAMPLE.velocity(z, 1.0) == pytest.approx(np.tile(EXAMPLE.means.mean(axis=0), (50, 1)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": ("meanflow", "gan")}, "methods must be some of flow_matching, .* but got gan"),
        ({"seeds": (1, 1)}, "seeds must name one or more, each once"),
        ({"calls": (0, 1)}, "calls must be at least 1"),
    ],
)
def test_wrong_jobs_are_refused(job, wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(job, **wrong)


@pytest.mark.soak
@pytest.mark.cluster
def test_comparison_is_made_once_and_continued(job):
    report = compare(job)
    assert {(line["method"], line["solver"], line["calls"]) for line in report["results"]} == {
        ("flow_matching", "euler", 1),
        ("flow_matching", "euler", 2),
        ("flow_matching", "heun", 2),
        ("meanflow", "euler", 1),
        ("meanflow", "euler", 2),
    }
    assert all((job.output / name).stat().st_size > 0 for name in REPORT_FILES)
    assert report == json.loads((job.output / "report.json").read_text())
    records = sorted((job.output / "runs").rglob("*.json"))
    written = [path.stat().st_mtime_ns for path in records]

    again = compare(job)  # without a cluster, for nothing is missing
    assert [path.stat().st_mtime_ns for path in records] == written
    assert again["results"] == report["results"]
    with pytest.raises(InputError, match=r"begun with other settings \(num_steps was 2, is 3\)"):
        compare(replace(job, num_steps=3))
