import json
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from ray.exceptions import RayActorError
from ray.train import Checkpoint, ControllerError, Result, WorkerGroupError

from meanflow_core.autoencoder import weight_hash
from meanflow_core.checkpoint import save_train_state
from meanflow_core.draws import draw_step_record
from meanflow_core.generator import load_network, save_generator
from meanflow_core.presets import PRESETS
from meanflow_core.training import build_train_state
from pipelines.command_line import run_command
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.errors import InputError
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.sample_order import samples_of_step
from pipelines.tracking.provenance import code_identity
from pipelines.tracking.run import MlflowClient, Run
from pipelines.train import run as train_run
from pipelines.train.batches import BatchSource, Prefetcher
from pipelines.train.publishing import _publish
from pipelines.train.record import begin_or_resume_run, read_record, require_same
from pipelines.train.run import parse_arguments
from pipelines.train.worker import sample_grid
from tests.conftest import perturbed
from tests.support.manifests import make_manifest


def manifest(num_samples):
    return make_manifest([num_samples], moments_shape=(8, 8, 8), image_size=64)


REQUIRED = ["--data", "d", "--storage", "s", "--run-name", "r"]


def test_every_number_of_a_preset_can_be_overridden_by_its_dotted_name():
    preset, job = parse_arguments(
        ["demo", *REQUIRED, "--num-workers", "3", "--loss.guidance.kappa", "0.9", "--num-steps", "7"]
    )
    assert preset == "demo"
    assert job.num_workers == 3
    assert job.config.loss.guidance.kappa == 0.9
    assert job.config.num_steps == 7
    assert job.config.network == PRESETS["demo"]().network


def test_unknown_preset_is_one_line_that_lists_the_known(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "x12"])
    with pytest.raises(SystemExit) as stop:
        run_command(train_run.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: unknown preset 'x12'; known: {', '.join(PRESETS)}\n"


def test_help_lists_presets_with_what_they_are(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    assert "FID 3.43" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--loss.guidance.kappa", "1.5", "kappa must lie in"),
        ("--num-steps", "0", "num_steps must be at least 1"),
        ("--rows-per-pass", "0", "rows_per_pass must be at least 1, but got 0"),
        ("--min-workers", "2", "min_workers must be at most num_workers 1, but got 2"),
        ("--num-workers", "0", "num_workers must be at least 1, but got 0"),
        ("--min-workers", "0", "min_workers must be at least 1, but got 0"),
        ("--keep-checkpoints", "0", "keep_checkpoints must be at least 1, but got 0"),
        ("--resize-interval-seconds", "0", "resize_interval_seconds must be above 0, but got 0"),
        ("--skip-nonfinite", "-1", "skip_nonfinite must be at least 0, but got -1"),
        ("--max-failures", "-2", "max_failures must be at least 0, or -1"),
        ("--init-source", "sit", "init_source says what --init-from is"),
        ("--guidance-after-steps", "-1", "guidance_after_steps must be at least 0"),
    ],
)
def test_impossible_override_is_refused(option, value, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "debug", *REQUIRED, option, value])
    with pytest.raises(SystemExit) as stop:
        run_command(train_run.main)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_as_few_workers_as_all_and_failures_without_end_may_be_asked_for():
    _, job = parse_arguments(["debug", *REQUIRED, "--num-workers", "2", "--min-workers", "2", "--max-failures", "-1"])
    assert (job.num_workers, job.min_workers, job.max_failures) == (2, 2, -1)


def test_missing_dataset_is_refused_before_anything_is_written(tmp_path):
    _, job = parse_arguments(
        ["debug", "--data", str(tmp_path / "none"), "--storage", str(tmp_path / "runs"), "--run-name", "r"]
    )
    with pytest.raises(InputError, match="latent dataset .* does not exist"):
        train_run.train("debug", job)
    assert not (tmp_path / "runs").exists()


def test_network_of_another_size_to_begin_with_is_refused_before_anything_is_written(tmp_path, pipeline):
    save_generator(pipeline, tmp_path / "generator")
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "manifest.json").write_text(manifest(1).to_json())
    arguments = ["--data", str(tmp_path / "latents"), "--storage", str(tmp_path / "runs"), "--run-name", "r"]
    _, job = parse_arguments(["debug", *arguments, "--init-from", str(tmp_path / "generator")])
    with pytest.raises(InputError, match=r"--init-from .*hidden_size is 48, wanted 64; .*num_classes is 10, wanted 2"):
        train_run.train("debug", job)
    assert not (tmp_path / "runs").exists()


def test_grid_of_samples_has_a_row_per_class(pipeline):
    picture = sample_grid(pipeline)
    assert picture.dtype == np.uint8
    assert picture.shape == (10 * 66 - 2, 8 * 66 - 2, 3)
    for num_steps, (row, column) in ((1, (0, 0)), (1, (3, 5)), (2, (3, 5))):
        [expected] = pipeline.images_from_seeds([row], [column], num_steps)
        found = torch.from_numpy(sample_grid(pipeline, num_steps)[66 * row :, 66 * column :][:64, :64])
        assert (found.int() - expected.int()).abs().max() <= 1


def dataset_of(num_samples):
    moments = np.arange(num_samples, dtype=np.float16)[:, None, None, None] + np.zeros((8, 8, 8), np.float16)
    return LatentDataset(manifest(num_samples), [moments], [-moments], np.arange(num_samples) % 7)


@pytest.mark.parametrize("rows_per_pass", [None, 3, 1])
def test_shares_of_a_step_are_the_whole_step_cut_in_order(rows_per_pass):
    config, dataset = PRESETS["debug"](), dataset_of(50)

    def batches(rank, world_size, rows_per_pass=rows_per_pass):
        source = BatchSource(
            dataset, config, rank=rank, world_size=world_size, device=torch.device("cpu"), rows_per_pass=rows_per_pass
        )
        return source.batches(step=2)  # within the first epoch

    [whole] = batches(0, 1, None)
    parts = [batch for rank in range(3) for batch in batches(rank, 3)]
    assert len(parts) == 3 * {None: 1, 3: 2, 1: 5}[rows_per_pass]
    assert torch.equal(torch.cat([part.moments for part in parts]), whole.moments)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert torch.equal(torch.cat([part.record.noise for part in parts]), whole.record.noise)
    rows = whole.moments[:, 0, 0, 0]
    assert torch.equal(rows < 0, whole.record.mirrored & (rows != 0))  # mirrored rows come from the mirrored column
    assert torch.equal(whole.labels, rows.abs().long() % 7)
    assert len(rows.abs().unique()) == 16


@pytest.mark.parametrize(("seed", "step"), [(0, 2), (4, 2), (0, 5)])
def test_rows_and_draws_of_a_step_are_those_of_its_seed_and_its_objective(seed, step):
    config = replace(PRESETS["debug"](), seed=seed, guidance_after_steps=3)
    [batch] = BatchSource(dataset_of(50), config, rank=0, world_size=1, device=torch.device("cpu")).batches(step)
    loss = config.loss_at(step)
    wanted = draw_step_record(loss, seed=seed, step=step, num_rows=16, latent_shape=(4, 8, 8)).rows(0, 16, loss)
    for part in fields(wanted):
        torch.testing.assert_close(getattr(batch.record, part.name), getattr(wanted, part.name), rtol=0, atol=0)
    assert batch.labels.tolist() == [row % 7 for row in samples_of_step(seed, step, 16, 50)]


def test_prefetched_batches_are_those_asked_for_and_none_past_the_end(monkeypatch):
    config = PRESETS["debug"]()
    source = BatchSource(dataset_of(50), config, rank=0, world_size=1, device=torch.device("cpu"))
    wanted = {step: source.batches(step)[0] for step in (3, 4, 9)}
    made, inner = [], source.batches
    monkeypatch.setattr(source, "batches", lambda step: made.append(step) or inner(step))
    prefetcher = Prefetcher(source, num_steps=10)
    for step in (3, 4, 9):  # 9 is not what was made ahead
        [batch] = prefetcher.batches(step)
        assert torch.equal(batch.moments, wanted[step].moments)
        assert torch.equal(batch.record.noise, wanted[step].record.noise)
    prefetcher._maker.shutdown(wait=True)
    assert sorted(made) == [3, 4, 5, 9]


def test_latents_of_another_autoencoder_than_the_named_one_are_refused(tmp_path, vae):
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "manifest.json").write_text(manifest(1).to_json())
    arguments = ["--data", str(tmp_path / "latents"), "--storage", str(tmp_path / "runs"), "--run-name", "r"]
    _, job = parse_arguments(["debug", *arguments, "--vae", str(SHIPPED_AUTOENCODER)])
    with pytest.raises(InputError, match=r"were made with autoencoder some/vae .*, not with .*autoencoder_weights"):
        train_run.train("debug", job)
    assert not (tmp_path / "runs").exists()
    train_run._check_vae(job, replace(manifest(1), recipe=replace(manifest(1).recipe, vae_sha256=weight_hash(vae))))


def begin(folder, *options, of=None):
    _, job = parse_arguments(["debug", "--data", "d", "--storage", str(folder), "--run-name", "r", *options])
    begun = read_record(job)
    if begun is not None:
        require_same(job, of or manifest(5), begun)
    return begin_or_resume_run(job, "debug", of or manifest(5), f"sqlite:///{folder}/mlflow.db", begun)[0]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder of runs with one that has begun, and that run."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, begin(folder)


def test_run_goes_on_where_only_what_may_change_has_changed(begun):
    folder, run = begun
    options = [
        "--num-steps",
        "99",
        "--log-interval-steps",
        "1",
        "--compile",
        "--num-workers",
        "4",
        "--rows-per-pass",
        "2",
        "--checkpoint-interval-steps",
        "3",
        "--sample-interval-steps",
        "3",
        "--activation-checkpointing",
    ]
    assert begin(folder, "--data", "elsewhere", *options).run_id == run.run_id


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--global-batch-size", "32"], "config.global_batch_size was 16, is 32"),
        (["--network.depth", "3"], "config.network.depth was 2, is 3"),
        (["--seed", "5"], "config.seed was 0, is 5"),
        (["--no-mirror"], "mirror was True, is False"),
        (["--init-from", "g"], "init_from was None, is g"),
        (["--guidance-after-steps", "10"], "config.guidance_after_steps was None, is 10"),
    ],
)
def test_run_of_another_experiment_is_refused_by_name(begun, options, words):
    with pytest.raises(InputError, match=f"run r in .* is another experiment \\({words}\\); choose another --run-name"):
        begin(begun[0], *options)


def test_run_on_other_data_is_refused_by_name(begun):
    with pytest.raises(InputError, match="data_sha256 was .*, is .*"):
        begin(begun[0], of=replace(manifest(5), shard_sha256=["2" * 64]))
    with pytest.raises(InputError, match="vae_sha256 was 0+, is 3+"):
        begin(begun[0], of=replace(manifest(5), recipe=replace(manifest(5).recipe, vae_sha256="3" * 64)))


@pytest.mark.parametrize("name", ["", " ", ".", "..", ".hidden", "a/b"])
def test_name_that_is_no_folder_of_its_own_is_refused(name):
    _, job = parse_arguments(["debug", "--data", "d", "--storage", "s", f"--run-name={name}"])
    with pytest.raises(InputError, match="--run-name must be a name without slashes and no dot first"):
        train_run.prepared(job)


def test_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "r/checkpoint_1000").mkdir(parents=True)
    with pytest.raises(InputError, match=r"r holds something else than a run of pipelines.train"):
        begin(tmp_path)
    assert (tmp_path / "r/checkpoint_1000").is_dir()


def test_decision_about_guidance_is_kept_when_the_run_becomes_longer(tmp_path):
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "manifest.json").write_text(manifest(400).to_json())
    places = ["--data", str(tmp_path / "latents"), "--storage", str(tmp_path / "runs")]
    _, job = parse_arguments(["debug", *places, "--run-name", "r"])
    decided = replace(job, config=replace(job.config, guidance_after_steps=15))
    begin_or_resume_run(decided, "debug", manifest(400), f"sqlite:///{tmp_path}/mlflow.db")
    longer = replace(job, config=replace(job.config, num_steps=1000))
    again, _, begun = train_run.prepared(longer)
    assert again.config.guidance_after_steps == 15
    assert begun["num_steps"] == 30
    with pytest.raises(InputError, match="config.guidance_after_steps was 15, is 3"):
        train_run.prepared(replace(job, config=replace(job.config, guidance_after_steps=3)))


def test_cause_of_a_failure_is_the_error_that_is_no_echo_of_it():
    broken = RuntimeError("Connection closed by peer [10.0.0.1]")
    own = OSError(28, "No space left on device")
    assert train_run._first_cause(WorkerGroupError("", {0: broken, 3: own})) == (3, own)
    assert train_run._first_cause(WorkerGroupError("", {0: broken})) == (0, broken)
    died = RayActorError()
    assert train_run._first_cause(WorkerGroupError("", {0: broken, 1: died})) == (1, died)
    assert train_run._first_cause(ControllerError(own)) == (None, own)


def test_dry_run_says_what_it_would_cost_and_writes_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "manifest.json").write_text(manifest(400).to_json())
    arguments = [
        "train",
        "debug",
        "--data",
        str(tmp_path / "latents"),
        "--storage",
        str(tmp_path / "runs"),
        "--run-name",
        "r",
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "--dry-run", "--num-workers", "2", "--rows-per-pass", "3"])
    run_command(train_run.main)
    text = capsys.readouterr().out
    assert "optimizer.learning_rate" in text
    assert "2: 8 rows each, in 3 passes" in text
    assert "an epoch      25.0 steps" in text
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(sys, "argv", [*arguments, "--dry-run", "--num-workers", "17"])
    with pytest.raises(SystemExit):
        run_command(train_run.main)
    assert "global_batch_size 16 is less than num_workers 17" in capsys.readouterr().err


def test_record_and_mlflow_say_what_was_begun_and_that_it_goes_on(tmp_path):
    _, job = parse_arguments(["debug", "--data", "d", "--storage", str(tmp_path), "--run-name", "r", "--device", "cpu"])
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run, record = begin_or_resume_run(job, "debug", manifest(5), uri, None, "abc")
    told = {"preset": "debug", "num_steps": 30, "init_sha256": "abc", "device": "cpu", "tracking_uri": uri}
    assert told.items() <= record.items()
    assert record["mlflow_run_id"] == run.run_id
    assert read_record(job) == json.loads(json.dumps(record))
    run.end("KILLED")
    client = MlflowClient(uri)
    files = {file.path for file in client.list_artifacts(run.run_id)}
    assert {"configuration.json", "data_manifest.json"} <= files
    assert client.get_run(run.run_id).data.params["data.num_samples"] == "5"
    assert client.get_run(run.run_id).info.status == "KILLED"
    begin_or_resume_run(job, "debug", manifest(5), uri, read_record(job))
    assert client.get_run(run.run_id).info.status == "RUNNING"


@pytest.mark.parametrize("cooldown_steps", [0, 5])
def test_other_code_and_a_moved_cool_down_are_told(caplog, cooldown_steps):
    _, job = parse_arguments(["debug", *REQUIRED, "--optimizer.cooldown-steps", str(cooldown_steps)])
    code = code_identity()
    then = json.loads(json.dumps({"identity": job.identity(manifest(5)), "num_steps": 30, "code": code}))
    require_same(job, manifest(5), then)
    assert caplog.text == ""
    require_same(replace(job, config=replace(job.config, num_steps=99)), manifest(5), then)
    assert ("num_steps was 30, is 99: the last steps' falling rate moves" in caplog.text) == (cooldown_steps > 0)
    assert "other code" not in caplog.text
    require_same(job, manifest(5), then | {"code": code | {"torch": "1.0"}})
    assert "begun with other code, and may not repeat itself: torch was 1.0, is" in caplog.text


@pytest.fixture
def job_here(tmp_path, monkeypatch):
    """A job on a dataset's manifest in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents/manifest.json").write_text(manifest(400).to_json())
    return parse_arguments(["debug", "--data", "latents", "--storage", "runs/", "--run-name", "r"])[1]


def test_places_become_absolute_and_names_of_models_stay(job_here, tmp_path):
    found, *_ = train_run.prepared(
        replace(job_here, cache_dir="cache", init_from="generator", validation_data="latents")
    )
    assert (found.data, found.validation_data) == (f"{tmp_path}/latents", f"{tmp_path}/latents")
    assert (found.storage, found.cache_dir) == (f"{tmp_path}/runs", f"{tmp_path}/cache")
    assert found.init_from == f"{tmp_path}/generator"
    for name in ("models:/meanflow-xl2@champion", "runs:/1a2b/generator"):
        found, *_ = train_run.prepared(replace(job_here, cache_dir="none", init_from=name))
        assert (found.cache_dir, found.init_from) == ("none", name)


def test_input_that_cannot_be_trained_on_is_refused_at_the_beginning(job_here, tmp_path):
    other = replace(manifest(4), class_names=["a", "x"])
    (tmp_path / "held-out").mkdir()
    (tmp_path / "held-out/manifest.json").write_text(other.to_json())
    with pytest.raises(InputError, match="--validation-data .*held-out has another classes"):
        train_run.prepared(replace(job_here, validation_data="held-out"))
    config = replace(job_here.config, network=replace(job_here.config.network, patch_size=3))
    with pytest.raises(InputError, match="patch_size 3 does not divide the latents' side 8"):
        train_run.prepared(replace(job_here, config=config))


def test_generator_that_is_half_published_cannot_be_opened(tmp_path, job_here):
    (tmp_path / "runs/r/generator").mkdir(parents=True)
    (tmp_path / "runs/r/generator/model_index.json").write_text("old")
    (tmp_path / "runs/r/generator/vae").write_text("in the way")
    (tmp_path / "new/vae").mkdir(parents=True)
    for name in ("model_index.json", "vae/config.json"):
        (tmp_path / "new" / name).write_text("new")
    with pytest.raises(OSError, match="vae"):
        _publish(job_here, tmp_path / "new")
    assert not (tmp_path / "runs/r/generator/model_index.json").exists()
    (tmp_path / "runs/r/generator/vae").unlink()
    assert _publish(job_here, tmp_path / "new") == "runs//r/generator"
    assert (tmp_path / "runs/r/generator/model_index.json").read_text() == "new"


def test_generator_of_a_step_is_made_of_the_first_average_and_registered_once(job_here, tmp_path, vae):
    vae.save_pretrained(tmp_path / "latents/vae")
    job, *_ = train_run.prepared(
        replace(job_here, config=replace(job_here.config, ema_decays=(0.9, 0.5)), device="cpu")
    )
    state = build_train_state(job.config, sample_size=8, in_channels=4, num_classes=2, device=torch.device("cpu"))
    perturbed(state.ema_network)
    (tmp_path / "checkpoint").mkdir()
    save_train_state(state, job.config, tmp_path / "checkpoint")
    result = Result({"step": 20}, Checkpoint(str(tmp_path / "checkpoint")), error=None, path="")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = Run.begin(uri, "experiment", "r", {})
    before = {"preset": "debug", "published": {"step": 10, "generator": "old", "model": "old"}}
    found = train_run._finish(job, "debug", manifest(400), result, run, before, validates=False)
    assert found == (f"{tmp_path}/runs/r/generator", "models:/meanflow-debug@champion")
    network = load_network(tmp_path / "runs/r/generator/transformer")
    for name, value in network.state_dict().items():
        assert torch.equal(value, state.ema_network.state_dict()[name])
    after = read_record(job)
    assert after == {"preset": "debug", "published": {"step": 20, "generator": found[0], "model": found[1]}}
    assert train_run._finish(job, "debug", manifest(400), result, run, after, validates=False) == found
    assert len(MlflowClient(uri).search_model_versions("name='meanflow-debug'")) == 1


def test_dry_run_counts_on_the_fewest_workers(job_here):
    job = replace(job_here, num_workers=4, min_workers=2, parallelism="fsdp2", rows_per_pass=4)
    text = train_run.dry_run("debug", job)
    assert "float32, one of 2 shards" in text
    assert "2: 8 rows each, in 2 passes of 4" in text
    assert "shards" not in train_run.dry_run("debug", replace(job, parallelism="ddp"))
    assert "float32, one of 4 shards" in train_run.dry_run("debug", replace(job, min_workers=None))
    at_once = train_run.dry_run("debug", replace(job, rows_per_pass=None))  # the fewest workers take most rows
    assert "2: 8 rows each, at once" in at_once
    assert "of 8 rows in float32" in at_once
