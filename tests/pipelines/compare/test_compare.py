import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import ray
from mlflow import MlflowClient

from meanflow_core.presets import preset_config
from pipelines.compare.job import TITLES, CompareJob
from pipelines.compare.plan import distinct_experiments, plan_entrants, with_num_steps
from pipelines.compare.plots import plot_quality, plot_samples
from pipelines.compare.report import collect_results, findings, table
from pipelines.compare.run import REPORT_FILES, compare
from pipelines.compare.velocity_figure import draw_velocities
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.errors import InputError
from pipelines.plan.cost import num_sampling_parameters
from pipelines.sweep.parent_run import FILE
from tests.support.latents import encode_demo_images

SIZES = {"sample_size": 8, "in_channels": 4, "num_classes": 10}
ON_FASHION = "meanflow_core.presets.real_images:on_fashion"
FLOPS = {"demo_improved_meanflow": 40.0, "demo_meanflow": 12.0, "demo_ddpm": 10.02, "demo_consistency": 20.0}


@pytest.fixture(scope="module")
def latents(image_root, tmp_path_factory):
    return encode_demo_images(image_root / "train", tmp_path_factory.mktemp("comparison") / "latents", 64)


@pytest.fixture
def job(latents, image_root, tmp_path):
    return CompareJob(
        data=str(latents),
        train_images=str(image_root / "train"),
        held_out_images=str(image_root / "val"),
        judge=str(SHIPPED_JUDGE),
        output=tmp_path / "comparison",
        methods=("demo_flow_matching",),
        seeds=(0,),
        num_steps=2,
        nfe=(1, 2),
        num_samples=20,
        device="cpu",
    )


def flops_of(config):
    """Made-up FLOPs of a step; 10 for methods that FLOPS does not list."""
    return next((flops for name, flops in FLOPS.items() if preset_config(name).loss == config.loss), 10.0)


def example_reports(entrants):
    """Evaluations with made-up distances, which fall with the NFE and the method's number, and rise with the seed."""
    methods = list(dict.fromkeys(entrant.method for entrant in entrants))

    def samples(entrant, solver):
        return [
            {
                "solver": solver,
                "num_function_evaluations": nfe,
                "frechet": 10.0 / nfe - methods.index(entrant.method) + entrant.seed,
                "frechet_standard_error": 0.1,
                "accuracy": 0.5,
            }
            for nfe in ((1, 2) if solver == "euler" else (2,))
        ]

    return {
        entrant.experiment.name: [
            {"samples": samples(entrant, solver)}
            for solver in (("heun", "euler") if entrant.method == "demo_flow_matching" else ("euler",))
        ]
        for entrant in entrants
    }


@pytest.fixture
def report(job):
    """A report of two methods and seeds, as `compare` returns it, with made-up figures."""
    job = replace(job, methods=("demo_flow_matching", "demo_meanflow"), seeds=(0, 1), budgets=("steps",))
    entrants = plan_entrants(job, flops_of)
    costs = {"step_flops": 1e9, "seconds_per_step": 0.5, "num_parameters": 2_000_000}
    costs |= {"num_parameters_sampling": 1_500_000, "milliseconds_per_image": {"1": 3.0, "2": 9.0}}
    return {
        **asdict(job),
        "distance": "Fréchet distance (judge)",
        "held_out": {"frechet": 0.1, "accuracy": 0.99},
        "reconstruction": {"frechet": 0.2, "accuracy": 0.98},
        "machine": "CPU, 2 workers",
        "results": collect_results(entrants, example_reports(entrants)),
        "costs": [{"method": method, **costs} for method in job.methods],
    }


def test_shipped_methods_differ_only_in_objective_but_for_one_network_and_one_learning_rate():
    configs = {name: preset_config(name) for name in TITLES}
    base = configs["demo_meanflow"]
    for name, config in configs.items():
        others = {"loss": base.loss, "network": base.network, "sampling": base.sampling, "guidance_after_steps": None}
        if name.startswith("demo_ddpm"):
            assert config.optimizer == replace(base.optimizer, learning_rate=8e-3)
            others["optimizer"] = base.optimizer
        assert replace(config, **others) == base, name
    parameters = {name: num_sampling_parameters(config.network, **SIZES) for name, config in configs.items()}
    assert parameters["demo_improved_meanflow"] == pytest.approx(parameters["demo_meanflow"], rel=0.03)


def test_equal_flops_give_cheaper_methods_more_steps(job):
    methods = ("demo_flow_matching", "demo_meanflow", "demo_improved_meanflow", "demo_ddpm")
    entrants = plan_entrants(replace(job, methods=methods, num_steps=1200), flops_of)
    steps = {(entrant.budget, entrant.method): entrant.num_steps for entrant in entrants}
    assert [steps["steps", method] for method in methods] == [1200] * 4
    assert [steps["flops", method] for method in methods] == [1200, 1000, 300, 1200]  # 10.02 is 10 within the error
    assert len(distinct_experiments(entrants)) == 6


def test_consistency_spends_half_of_its_budget_on_the_flow_matching_that_it_starts_from(job):
    job = replace(job, methods=("demo_consistency", "demo_ect"), num_steps=1200, seeds=(3,))
    entrants = plan_entrants(job, flops_of)
    start = "demo_flow_matching-600-steps-seed-3"
    assert [(e.budget, e.method, e.num_steps, e.experiment.init_from) for e in entrants] == [
        ("steps", "demo_consistency", 1200, start),
        ("steps", "demo_ect", 1200, start),
        ("flops", "demo_consistency", 900, start),
        ("flops", "demo_ect", 1200, start),
    ]
    experiments = {experiment.name: experiment for experiment in distinct_experiments(entrants)}
    assert len(experiments) == 4
    last = experiments["demo_consistency-300-steps-after-600-seed-3"].config
    assert (last.num_steps, last.optimizer.cooldown_steps, last.seed, last.guidance_after_steps) == (300, 90, 3, 0)


def test_cooldown_keeps_its_fraction_of_the_run():
    config = with_num_steps(preset_config("demo_meanflow"), 400)
    assert (config.num_steps, config.optimizer.cooldown_steps, config.optimizer.warmup_steps) == (400, 120, 100)


def test_all_methods_are_adapted_to_other_data(job):
    before, after = (
        plan_entrants(replace(job, budgets=("steps",), adapt=adapt), flops_of) for adapt in (None, ON_FASHION)
    )
    for old_entrant, new_entrant in zip(before, after, strict=True):
        for old, new in zip(old_entrant.stages, new_entrant.stages, strict=True):
            network = replace(old.config.network, patch_size=4)
            assert new.config == replace(old.config, network=network, mirror=False)
    with pytest.raises(InputError, match="cannot find 'photographs:on_fashion'"):
        plan_entrants(replace(job, adapt="photographs:on_fashion"), flops_of)


def test_unknown_method_is_refused_with_the_known_ones(job):
    with pytest.raises(InputError, match=r"unknown preset 'gan'; known: .*demo_meanflow"):
        plan_entrants(replace(job, methods=("gan",)), flops_of)


def test_results_have_the_spread_over_seeds(report):
    found = {(r["method"], r["solver"], r["nfe"]): r["frechet"] for r in report["results"]}
    assert found["demo_flow_matching", "heun", 2] == {"mean": 5.5, "min": 5.0, "max": 6.0}
    assert found["demo_meanflow", "euler", 1] == {"mean": 9.5, "min": 9.0, "max": 10.0}
    assert len(found) == 5


def test_findings_follow_from_the_results(report):
    [sentence] = findings(report)
    assert sentence == (  # ratios per seed: 9/5 and 10/6, 9/10 and 10/11
        "At equal steps, MeanFlow has the smallest mean distance in one function evaluation, 9.50 (9.00–10.00): 1.73 "
        "(1.67–1.80) times that of flow matching in 2 function evaluations, and 0.90 (0.90–0.91) times its distance in one "
        "function evaluation. The smallest mean distance of all is 4.50 (4.00–5.00), of MeanFlow in 2 function evaluations."
    )
    for result in report["results"]:  # flow matching becomes the best in one evaluation
        if (result["method"], result["nfe"]) == ("demo_flow_matching", 1):
            result["frechet"] = {"mean": 1.0, "min": 1.0, "max": 1.0}
    assert findings(report)[0].startswith(
        "At equal steps, flow matching has the smallest mean distance in one function"
    )
    assert "times" not in findings(report)[0]


def test_table_has_a_row_per_curve_and_the_costs(report):
    text = table(report)
    assert "not FID" in text
    assert "| equal steps | flow matching, Euler | 2 | 10.50 (10.00–11.00) | 5.50 (5.00–6.00) | 0.500 | 0.500 |" in text
    assert "| equal steps | flow matching, Heun | 2 | — | 5.50 (5.00–6.00) | — | 0.500 |" in text
    assert "| MeanFlow | 1.50 M (2.00 M) | 1.0 | 0.500 | 3.0 | 9.0 |" in text


def test_plots_are_drawn(report, tmp_path):
    plot_quality(report, tmp_path / "comparison.png")
    block = np.zeros((8, 64, 64, 3), np.uint8)
    plot_samples({"MeanFlow": {1: block, 2: block}}, tmp_path / "grid.png", num_columns=4, title="")
    draw_velocities(tmp_path / "paths.png")
    sizes = [path.stat().st_size for path in tmp_path.glob("*.png")]
    assert len(sizes) == 3
    assert min(sizes) > 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, "methods must have at least one value"),
        ({"seeds": (1, 1)}, "seeds must have at least one value and no duplicates"),
        ({"nfe": (0, 1)}, "nfe must be at least 1"),
    ],
)
def test_invalid_options_are_refused(job, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(job, **changes)


def test_judge_of_other_classes_is_refused_before_training(job, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    text = (tmp_path / job.data / "manifest.json").read_text()
    (other / "manifest.json").write_text(text.replace('"circle"', '"ellipse"'))
    with pytest.raises(InputError, match=r"was trained on the classes .*circle.*, but the latents have .*ellipse"):
        compare(replace(job, data=str(other)))
    assert not ray.is_initialized()


@pytest.fixture
def _cluster():
    yield
    ray.shutdown()


def points_of(report):
    return {(result["method"], result["solver"], result["nfe"]) for result in report["results"]}


def times_of_writing(job):
    """{file: time of writing} of the records of trainings and of the evaluations."""
    files = [*job.output.glob("runs/*/training.json"), *job.output.glob("evaluations/*.json")]
    return {str(path.relative_to(job.output)): path.stat().st_mtime_ns for path in files}


@pytest.mark.soak
@pytest.mark.cluster
@pytest.mark.usefixtures("_cluster")
def test_comparison_of_one_method_writes_its_report(job):
    report = compare(replace(job, nfe=(1,)))
    assert points_of(report) == {("demo_flow_matching", "euler", 1)}
    assert all((job.output / name).stat().st_size > 0 for name in REPORT_FILES)
    assert report == json.loads((job.output / "report.json").read_text())
    assert (job.output / "table.md").read_text() == table(report)
    assert report["costs"][0]["seconds_per_step"] > 0.0
    assert 0.0 < report["held_out"]["frechet"] < report["results"][0]["frechet"]["mean"]


@pytest.mark.soak
@pytest.mark.cluster
@pytest.mark.usefixtures("_cluster")
def test_comparison_trains_and_measures_only_what_is_missing(job):
    first = replace(job, methods=("demo_flow_matching", "demo_consistency"), budgets=("steps",))
    assert points_of(compare(first)) == {
        ("demo_flow_matching", "euler", 1),
        ("demo_flow_matching", "euler", 2),
        ("demo_flow_matching", "heun", 2),
        ("demo_consistency", "euler", 1),
        ("demo_consistency", "euler", 2),
    }
    before = times_of_writing(job)
    more = compare(replace(first, methods=(*first.methods, "demo_ddpm")))
    assert {(method, nfe) for method, _, nfe in points_of(more)} >= {("demo_ddpm", 1), ("demo_ddpm", 2)}
    after = times_of_writing(job)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2

    client = MlflowClient(f"sqlite:///{job.output}/mlflow.db")
    parent = client.get_run(json.loads((job.output / FILE).read_text())["run_id"])
    assert parent.info.status == "FINISHED"
    assert "evaluate/steps/demo_ddpm/euler/frechet" in parent.data.metrics
    children = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    assert len(client.search_runs([parent.info.experiment_id], children)) == 4
