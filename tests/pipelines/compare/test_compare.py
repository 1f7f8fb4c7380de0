import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from meanflow_core.generator import load_pipeline
from meanflow_core.metrics import FeatureStatistics
from pipelines.compare.job import CompareJob
from pipelines.compare.measuring_trials import (
    SamplingPoint,
    draw_images,
    measure_trial,
    missing_points,
    sampling_points,
)
from pipelines.compare.methods import METHODS, Trial, build_methods, plan_trials, steps_in_budget
from pipelines.compare.plots import plot_losses, plot_quality, plot_samples
from pipelines.compare.results import ratios, spread
from pipelines.compare.run import REPORT_FILES, compare
from pipelines.compare.table import table
from pipelines.compare.timing import interleaved_medians
from pipelines.compare.training_trials import LossCurve, read_record, train_all, train_trial
from pipelines.compare.velocity_figure import EXAMPLE, Mixture, draw_velocities
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.encode.job import EncodeJob
from pipelines.errors import InputError
from pipelines.evaluate.judge import load_judge
from pipelines.plan.cost import num_parameters
from tests.support.latents import encode_without_ray

SIZES = {"sample_size": 8, "in_channels": 4, "num_classes": 10}
FLOPS = {"flow_matching": 10.0, "meanflow": 12.0, "meanflow_own_velocity": 12.0, "improved_meanflow": 40.0}


@pytest.fixture(scope="module")
def latents(image_root, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("comparison") / "latents")
    encode_without_ray(
        EncodeJob(images=str(image_root / "train"), output=output, vae=str(SHIPPED_AUTOENCODER), image_size=64)
    )
    return output


@pytest.fixture
def job(latents, image_root, tmp_path):
    return CompareJob(
        data=latents,
        train_images=str(image_root / "train"),
        held_out_images=str(image_root / "val"),
        judge=SHIPPED_JUDGE,
        output=tmp_path / "comparison",
        methods=("flow_matching", "meanflow"),
        seeds=(0,),
        num_steps=2,
        budgets=("steps",),
        nfe=(1, 2),
        num_samples=20,
        timed_rounds=1,
    )


def example_report(num_seeds=2):
    """A report as `compare` returns it, with made-up figures."""
    lines = []
    for budget in ("steps", "flops"):
        for number, method in enumerate(METHODS):
            for point in sampling_points(build_methods(100)[method].config, (1, 2, 4)):
                distances = [1.0 + number + seed + 4.0 / point.nfe for seed in range(num_seeds)]
                lines.append(
                    {
                        "budget": budget,
                        "method": method,
                        "num_steps": 100,
                        "solver": point.solver,
                        "nfe": point.nfe,
                        "frechet": spread(distances),
                        "accuracy": spread([0.5 for _ in distances]),
                        "by_seed": [{"seed": seed, "frechet": value} for seed, value in enumerate(distances)],
                    }
                )
    curve = [
        {"step": step, "squared_error_r_equals_t": 9.0 / step, "squared_error_r_below_t": 8.0 / step}
        for step in (50, 100)
    ]
    flow_matching_curve = [{**point, "squared_error_r_below_t": None} for point in curve]
    return {
        "num_samples": 20,
        "num_train_images": 60,
        "seeds": list(range(num_seeds)),
        "nfe": [1, 2, 4],
        "timed_nfe": [1, 4],
        "num_timed_images": 10,
        "decoder_milliseconds_per_image": 1.5,
        "budgets": ["steps", "flops"],
        "hardware": {"processor": "a processor", "num_cores": 2, "gpu": None, "num_threads": 1, "torch": "2"},
        "held_out": {"frechet": 0.1, "accuracy": 0.99},
        "reconstruction": {"frechet": 0.2, "accuracy": 0.98},
        "results": lines,
        "ratios": ratios(lines),
        "trials": [
            {
                "method": method,
                "budgets": ["steps", "flops"],
                "loss_curve": flow_matching_curve if method == "flow_matching" else curve,
            }
            for method in METHODS
            for _ in range(num_seeds)
        ],
        "methods": [
            {
                "name": name,
                "title": build_methods(100)[name].title,
                "step_flops": 1e9,
                "num_parameters": 2_000_000,
                "num_parameters_sampling": 1_500_000,
                "seconds_per_step": 0.5,
                "milliseconds_per_image": {"1": 3.0, "4": 9.0},
            }
            for name in METHODS
        ],
    }


def test_methods_differ_only_in_the_objective():
    compared = {name: method.config for name, method in build_methods(100).items()}
    base = compared["meanflow"]
    for name, config in compared.items():
        assert replace(config, loss=base.loss, network=base.network, sampling=base.sampling) == base, name
    guided = [compared[name].loss.guidance.effective_scale for name in METHODS[:3]]
    assert [*guided, compared["improved_meanflow"].sampling.guidance_scale] == [2.0] * 4
    assert compared["flow_matching"].loss.is_flow_matching
    assert compared["meanflow_own_velocity"].loss == replace(base.loss, tangent="own_velocity")


def test_equal_flops_give_cheaper_methods_more_steps():
    assert steps_in_budget("steps", 30, FLOPS) == dict.fromkeys(FLOPS, 30)
    assert steps_in_budget("flops", 30, FLOPS) == {
        "flow_matching": 120,
        "meanflow": 100,
        "meanflow_own_velocity": 100,
        "improved_meanflow": 30,
    }
    assert steps_in_budget("flops", 30, FLOPS, "meanflow")["improved_meanflow"] == 9


def test_trials_shared_by_budgets_are_planned_once_and_expensive_ones_first():
    steps = [steps_in_budget(budget, 30, FLOPS) for budget in ("steps", "flops")]
    trials = plan_trials(steps, ("flow_matching", "improved_meanflow"), (0, 1), FLOPS)
    assert [(trial.method, trial.num_steps) for trial in trials[4:]] == [("flow_matching", 30)] * 2
    assert sorted((trial.method, trial.num_steps, trial.seed) for trial in trials[:4]) == [
        ("flow_matching", 120, 0),
        ("flow_matching", 120, 1),
        ("improved_meanflow", 30, 0),
        ("improved_meanflow", 30, 1),
    ]


def test_loss_curve_averages_over_intervals():
    curve = LossCurve(["squared_error_r_equals_t", "squared_error_r_below_t"], num_steps=120)  # two steps per interval
    for step in range(120):
        curve.add(step, torch.tensor([1.0, 3.0 * step, 3.0, 0.0, 0.0]))  # the loss, then (sum, count) of each metric
    assert len(curve.points) == 60
    assert curve.points[1] == {"step": 4, "squared_error_r_equals_t": 2.5, "squared_error_r_below_t": None}


def test_networks_have_equal_numbers_of_parameters_at_sampling_time():
    from meanflow_core.networks.building import build_network

    compared = build_methods(100)
    expected = num_parameters(compared["meanflow"].config.network, **SIZES)
    network = build_network(compared["improved_meanflow"].config.network, **SIZES).for_sampling()
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(expected, rel=0.03)


def test_trained_trial_is_complete_and_not_trained_or_measured_again(latents, tmp_path):
    trial = Trial(method="flow_matching", seed=3, num_steps=2)
    record = train_trial(trial, latents, "none", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [trial.name]
    assert record == read_record(trial, tmp_path)
    assert record["config"]["seed"] == 3
    assert [point["step"] for point in record["loss_curve"]] == [1, 2]
    folder = tmp_path / trial.name
    assert load_pipeline(folder / "generator").config.prediction == "velocity"
    assert train_trial(trial, "nowhere", "none", tmp_path) == record

    points = missing_points(trial, tmp_path, (1, 2))
    assert [(point.solver, point.nfe) for point in points] == [("euler", 1), ("euler", 2), ("heun", 2)]
    measure_trial(folder, points, load_judge(SHIPPED_JUDGE), FeatureStatistics.of(torch.randn(80, 64)), 20)
    measured = [(folder / point.file).read_text() for point in points]
    assert len(set(measured)) == 3
    assert missing_points(trial, tmp_path, (1, 2)) == []


def test_leftovers_of_a_killed_trial_are_deleted(tmp_path):
    for name in ("meanflow-2-steps-seed-0", "meanflow-2-steps-seed-1.0a1b.partial"):
        (tmp_path / name / "generator").mkdir(parents=True)
    train_all([], "none", "none", tmp_path, FLOPS, use_gpu=False)
    assert [path.name for path in tmp_path.iterdir()] == ["meanflow-2-steps-seed-0"]


@pytest.mark.parametrize(
    "point", sampling_points(build_methods(100)["flow_matching"].config, (1, 2, 8)), ids=lambda point: point.file
)
def test_every_network_call_counts_as_a_function_evaluation(pipeline, point):
    pipeline.register_to_config(prediction="velocity")
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    draw_images(pipeline, point, range(3))
    assert len(calls) == point.nfe


def test_each_sample_has_its_own_seed_and_class(pipeline):
    expected = pipeline.images_from_seeds([2, 1], [12, 31], 2)
    drawn = draw_images(pipeline, SamplingPoint(solver="euler", nfe=2), [12, 31])
    assert (expected.int() - drawn.int()).abs().max() <= 1


def test_times_are_medians_of_interleaved_rounds_without_the_first(monkeypatch):
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


def test_ratios_are_computed_per_seed():
    def result(method, nfe, distances, solver="euler"):
        return {
            "budget": "steps",
            "method": method,
            "solver": solver,
            "nfe": nfe,
            "by_seed": [{"seed": seed, "frechet": value} for seed, value in enumerate(distances)],
        }

    results = [
        result("flow_matching", 1, [10.0, 20.0]),
        result("flow_matching", 32, [2.0, 1.0]),
        result("flow_matching", 32, [0.1, 0.1], solver="heun"),
        result("meanflow", 1, [4.0, 3.0]),
        result("meanflow", 32, [7.0, 7.0]),
    ]
    assert ratios(results) == [
        {
            "budget": "steps",
            "method": "meanflow",
            "over_most_nfe": {"mean": 2.5, "min": 2.0, "max": 3.0},
            "over_one_nfe": {"mean": pytest.approx(0.275), "min": 0.15, "max": 0.4},
        }
    ]
    assert ratios(results[3:]) == []


def test_table_shows_results_and_hardware():
    text = table(example_report())
    assert "not FID" in text
    assert "1 thread of 2 cores, a processor" in text
    assert "| flow matching, Euler | 100 | 5.500 (5.000–6.000) | 3.500 (3.000–4.000) | 2.500 (2.000–3.000) |" in text
    assert "| flow matching, Heun | 100 | — | 3.500 (3.000–4.000) |" in text
    assert "| MeanFlow | equal steps | 2.67 (2.33–3.00) | 1.18 (1.17–1.20) |" in text
    assert "| MeanFlow | 1.50 M (2.00 M) | 1.0 | 0.500 | 3.0 | 9.0 |" in text


def test_plots_are_drawn(tmp_path):
    report = example_report()
    plot_quality(report, tmp_path / "comparison.png")
    plot_losses(report, tmp_path / "losses.png")
    block = np.zeros((8, 64, 64, 3), np.uint8)
    plot_samples({"MeanFlow": {1: block, 2: block}}, tmp_path / "grid.png", num_columns=4, subtitle="")
    draw_velocities(tmp_path / "paths.png")
    assert len(list(tmp_path.iterdir())) == 4


def test_velocity_of_one_gaussian_maps_noise_onto_it():
    # For N(m, s^2 I) the map is z_0 = m + s z_1.
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


def test_one_step_with_the_velocity_ends_at_the_mean_of_the_data():
    z = np.random.default_rng(0).standard_normal((50, 2))
    assert z - EXAMPLE.velocity(z, 1.0) == pytest.approx(np.tile(EXAMPLE.means.mean(axis=0), (50, 1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("meanflow", "gan")}, "methods must be among flow_matching, .* but got gan"),
        ({"seeds": (1, 1)}, "seeds must have at least one value and no duplicates"),
        ({"nfe": (0, 1)}, "nfe must be at least 1"),
    ],
)
def test_invalid_options_are_refused(job, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(job, **changes)


@pytest.mark.soak
@pytest.mark.cluster
def test_comparison_runs_once_and_continues(job):
    report = compare(job)
    assert {(result["method"], result["solver"], result["nfe"]) for result in report["results"]} == {
        ("flow_matching", "euler", 1),
        ("flow_matching", "euler", 2),
        ("flow_matching", "heun", 2),
        ("meanflow", "euler", 1),
        ("meanflow", "euler", 2),
    }
    assert all((job.output / name).stat().st_size > 0 for name in REPORT_FILES)
    assert report == json.loads((job.output / "report.json").read_text())
    records = sorted((job.output / "trials").rglob("*.json"))
    written = [path.stat().st_mtime_ns for path in records]

    again = compare(job)  # without a cluster, because nothing is missing
    assert [path.stat().st_mtime_ns for path in records] == written
    assert again["results"] == report["results"]
    with pytest.raises(InputError, match=r"started with other settings \(num_steps was 2, is 3\)"):
        compare(replace(job, num_steps=3))
