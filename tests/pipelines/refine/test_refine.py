"""Refinements of a tiny generator on real workers, and what is refused before they start."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from mlflow import MlflowClient

from meanflow_core.config import OptimizerConfig, RefineConfig
from meanflow_core.frechet import RawMoments
from meanflow_core.generator import load_network, load_pipeline, save_generator
from meanflow_core.generator_folder import read_provenance, write_provenance
from meanflow_core.metrics import FeatureStatistics
from meanflow_core.refinement import FrechetTerm, draw_batch, refine_step
from meanflow_core.training import new_train_state
from pipelines.demo import images
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.errors import InputError
from pipelines.evaluate.make_reference import reference_bytes
from pipelines.evaluate.sums import SetSums
from pipelines.extractors.opening import open_extractor
from pipelines.extractors.reference import reference_protocol
from pipelines.judge.network import Judge
from pipelines.refine import run as refine_run
from pipelines.refine.inputs import open_generator, open_metrics
from pipelines.refine.job import RefineJob, parse_arguments
from pipelines.refine.plots import plot_distances
from pipelines.training.stopping import NAMESPACE

NUM_STEPS = 5
CONFIG = RefineConfig(
    optimizer=OptimizerConfig(learning_rate=1e-3),
    ema_decays=(0.5, 0.9),
    global_batch_size=6,
    moments_decay=0.5,
    fill_steps=2,
    num_steps=NUM_STEPS,
    log_interval_steps=2,
    measure_interval_steps=3,
    measure_samples=8,
)


def write_reference(extractor, file, num_images=100):
    drawn = torch.from_numpy(images.draw_many("train", 0, num_images)[0])
    statistics = FeatureStatistics.of(extractor(drawn).pooled)
    sums = SetSums("reference", groups={0: statistics})
    file.write_bytes(reference_bytes(sums, reference_protocol(extractor.identity, {}, 64, num_images)))
    return str(file)


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Folders of two judges, each with a reference."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(1)
    Judge(images.CLASS_NAMES).save_pretrained(folder / "other")
    names = (str(SHIPPED_JUDGE), str(folder / "other"))
    return [
        (name, write_reference(open_extractor(name, None, "cpu"), folder / f"{number}.npz"))
        for number, name in enumerate(names)
    ]


@pytest.fixture
def job(pipeline, judges, tmp_path):
    save_generator(pipeline, tmp_path / "generator")
    write_provenance(tmp_path / "generator", {"data": "latents", "ema_decay": 0.9})
    (ours, our_reference), (other, other_reference) = judges
    return RefineJob(
        model=str(tmp_path / "generator"),
        extractors=(ours,),
        references=(our_reference,),
        held_out_extractors=(other,),
        held_out_references=(other_reference,),
        storage=str(tmp_path / "runs"),
        run_name="refined",
        cpu_threads=1,
        device="cpu",
        config=CONFIG,
    )


@pytest.fixture
def _cluster_ends():
    """Other tests start clusters with other environment variables."""
    yield
    ray.shutdown()


def refined_in_this_process(job):
    """The first moving average after all steps, without Ray and without an interruption."""
    generator, [metric, _] = open_generator(job), open_metrics(job, 64)
    state = new_train_state(generator.network.requires_grad_(True), CONFIG, device=torch.device("cpu"))
    term = FrechetTerm(
        name="judge",
        features=metric.extractor.pooled,
        reference=metric.frechet_reference(torch.device("cpu")),
        moments=RawMoments.zeros(64),
    )
    while state.step < NUM_STEPS:
        batch = draw_batch(CONFIG, [1] * 10, state.step, 0, CONFIG.global_batch_size, (4, 8, 8))
        refine_step(state, generator.renderer(1), [term], [batch], CONFIG)
    return state.ema_network.state_dict()


@pytest.mark.cluster
@pytest.mark.usefixtures("_cluster_ends", "one_thread")
@pytest.mark.timeout(300)
def test_a_refinement_resumes_to_the_same_bits_and_marks_its_generator(job, tracking_uri, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    refine_run.refine("demo", replace(job, config=replace(CONFIG, num_steps=3)))
    with contextlib.suppress(ValueError):  # it ends with its last handle, which this process may have dropped already
        ray.kill(ray.get_actor(f"training {job.run_location}", namespace=NAMESPACE))  # as at the end of the command
    record = refine_run.refine("demo", job)
    generator = Path(record.published.generator)
    assert generator == tmp_path / "runs/refined/generator"
    pipeline = load_pipeline(generator)
    assert pipeline.images_from_seeds([0, 9], [0, 1]).shape == (2, 64, 64, 3)
    after = load_network(generator).state_dict()
    assert all(torch.equal(after[name], value) for name, value in refined_in_this_process(job).items())
    before = load_network(Path(job.model)).state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    provenance = read_provenance(generator)
    assert [identity["name"] for identity in provenance["refined_on"]] == ["judge"]
    assert (provenance["refined_from"], provenance["data"], provenance["step"]) == (job.model, "latents", NUM_STEPS)
    card = (generator / "README.md").read_text()
    assert "**Trained on** the features of judge_weights" in card
    assert "**Held out**: other" in card
    assert (generator.parent / "distances.png").stat().st_size > 5000
    client = MlflowClient(tracking_uri)
    for key in ("trained_on/judge_weights", "held_out/other"):
        steps = [point.step for point in client.get_metric_history(record.mlflow_run_id, key)]
        assert sorted(steps) == [1, 3, 5]
    tags = [version.tags for version in client.search_model_versions("name='refined'")]
    assert {(tag["step"], tag["refined_on"]) for tag in tags} == {("3", "judge_weights"), ("5", "judge_weights")}
    with pytest.raises(InputError, match="was started with other settings or data .*moments_decay was 0.5, is now 0.4"):
        refine_run.refine("demo", replace(job, config=replace(CONFIG, moments_decay=0.4)))


def test_references_that_do_not_fit_are_refused(job, judges, tmp_path):
    few = write_reference(open_extractor(judges[0][0], None, "cpu"), tmp_path / "few.npz", num_images=64)
    with pytest.raises(InputError, match="must be of more images than the extractor has features, 64, .* but is of 64"):
        open_metrics(replace(job, references=(few,)), 64)
    swapped = replace(job, references=job.held_out_references)
    with pytest.raises(InputError, match="does not match this evaluation .*weights_sha256"):
        open_metrics(swapped, 64)
    with pytest.raises(InputError, match="image size: 64 in the reference, 32 here|trained on images of 64x64"):
        open_metrics(job, 32)
    same = replace(job, held_out_extractors=job.extractors, held_out_references=job.references)
    with pytest.raises(InputError, match="are the same; one that is trained on cannot be held out"):
        open_metrics(same, 64)


def test_generators_of_many_steps_are_turned_or_refused(job, flow_pipeline, caplog):
    save_generator(flow_pipeline, Path(job.model))
    ready = refine_run.prepare(job)
    assert "turns it into a one-step generator" in caplog.text
    assert ready.generator.pipeline.config.prediction == "average_velocity"
    network = ready.generator.network
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sampled = ready.generator.pipeline.sample_latents([0, 1], z)
    expected = flow_pipeline.sample_latents([0, 1], z, guidance_scale=1.0)
    torch.testing.assert_close(sampled, expected)
    assert type(network).__name__ == "MeanFlowDiT"
    index = Path(job.model) / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "prediction": "epsilon"}))
    with pytest.raises(InputError, match="predicts noise for sampling in many steps, and cannot take one step"):
        open_generator(job)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"references": ()}, "extractors and references need .* but got 1 and 0"),
        ({"held_out_extractors": (), "held_out_references": ()}, "held_out_extractors and held_out_references need"),
        ({"loss_weights": (1.0, 2.0)}, "loss_weights must be one per extractor, 1, but got 2"),
        ({"loss_weights": (float("nan"),)}, "loss_weights must be above 0"),
    ],
)
def test_invalid_options_are_refused(job, options, message):
    with pytest.raises(ValueError, match=message):
        replace(job, **options)


def test_a_dry_run_counts_one_image(job):
    text = refine_run.dry_run("demo", replace(job, num_workers=2, samples_per_pass=2))
    assert "trained on    judge_weights, 64 features" in text
    assert "held out      other, 64 features" in text
    assert "6 images on 2 workers, 2 passes of 2" in text
    assert "fill the moments (12 images)" in text
    assert not Path(job.storage).exists()


def test_the_command_line_lists_the_presets(capsys):
    preset, job = parse_arguments(
        ["demo", "--model", "g", "--extractors", "a", "--references", "a.npz", "--held-out-extractors", "b",
         "--held-out-references", "b.npz", "--storage", "runs", "--run-name", "r", "--moments-decay", "0.95"]
    )  # fmt: skip
    assert (preset, job.extractors, job.config.moments_decay) == ("demo", ("a",), 0.95)
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    assert "imf_xl2" in capsys.readouterr().out
    with pytest.raises(InputError, match="unknown preset 'tiny'; known: .*clothing"):
        parse_arguments(["tiny"])


def test_the_plot_is_a_picture(tmp_path):
    plot_distances({"trained_on/judge": {1: 4.0, 10: 1.0}, "held_out/lite": {1: 9.0, 10: 8.0}}, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
