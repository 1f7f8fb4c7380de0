from dataclasses import replace

import pytest

from pipelines.errors import InputError
from pipelines.tracking.run import MlflowClient
from pipelines.train.record import begin_run, identity, new_record
from pipelines.training.record import (
    TRAINING_RECORD,
    Published,
    read_record,
    require_same_experiment,
    resume_run,
    write_record,
)
from tests.support.training_jobs import small_manifest, training_job, with_config


def require_same(job, manifest, record):
    require_same_experiment(job, job.config, identity(job, manifest), record)


@pytest.fixture(scope="module")
def started(tmp_path_factory, tracking_uri):
    """A job whose run has started."""
    job = training_job(tmp_path_factory.mktemp("runs"), device="cpu")
    run = begin_run(job, "debug", small_manifest(5), tracking_uri)
    write_record(job, new_record(job, "debug", small_manifest(5), run, "abc"))
    run.end("KILLED")
    return job


def test_record_and_mlflow_run_describe_the_training(started, tracking_uri):
    record = read_record(started)
    assert (record.preset, record.num_steps, record.init_sha256) == ("debug", 30, "abc")
    assert (record.device, record.tracking_uri, record.published) == ("cpu", tracking_uri, None)
    client = MlflowClient(tracking_uri)
    files = {file.path for file in client.list_artifacts(record.mlflow_run_id)}
    assert {"configuration.json", "data_manifest.json"} <= files
    assert client.get_run(record.mlflow_run_id).data.params["data.num_samples"] == "5"
    assert client.get_run(record.mlflow_run_id).info.status == "KILLED"
    resume_run(record)
    assert client.get_run(record.mlflow_run_id).info.status == "RUNNING"


def test_record_round_trips_through_storage(started, tmp_path):
    job = training_job(tmp_path)
    published = Published(step=30, generator="somewhere", model="models:/m@champion")
    record = replace(read_record(started), published=published)
    write_record(job, record)
    assert read_record(job) == record


@pytest.mark.parametrize("content", ["{", "[]", '{"preset": "debug"}', '{"published": null, "other": 1}'])
def test_damaged_or_foreign_record_is_refused(tmp_path, content):
    (tmp_path / "runs/r").mkdir(parents=True)
    (tmp_path / "runs/r" / TRAINING_RECORD).write_text(content)
    with pytest.raises(
        InputError, match=r"training.json is damaged or from another release .*; choose another --run-name"
    ):
        read_record(training_job(tmp_path))


def test_folder_that_is_not_a_run_is_refused_and_kept(tmp_path):
    (tmp_path / "runs/r/checkpoint_1000").mkdir(parents=True)
    with pytest.raises(InputError, match=r"r is not a training run \(it has no training.json\)"):
        read_record(training_job(tmp_path))
    assert (tmp_path / "runs/r/checkpoint_1000").is_dir()


def test_run_resumes_if_only_resumable_settings_have_changed(started):
    changed = with_config(
        replace(started, data="elsewhere", num_workers=4, samples_per_pass=2),
        num_steps=99, log_interval_steps=1, checkpoint_interval_steps=3, sample_interval_steps=3, compile=True,
        activation_checkpointing=True,
    )  # fmt: skip
    require_same(changed, small_manifest(5), read_record(started))


@pytest.mark.parametrize(
    ("options", "config", "words"),
    [
        ({}, {"global_batch_size": 32}, "config.global_batch_size was 16, is now 32"),
        ({}, {"seed": 5, "ema_decays": (0.5,)}, r"config.ema_decays was .*, is now .*; config.seed was 0, is now 5"),
        ({}, {"mirror": False}, "config.mirror was True, is now False"),
        ({"init_from": "g"}, {}, "init_from was None, is now g"),
    ],
)
def test_other_settings_are_refused_with_the_differences(started, options, config, words):
    changed = with_config(replace(started, **options), **config)
    with pytest.raises(
        InputError, match=f"run r .* other settings or data \\({words}\\); .* choose another --run-name"
    ):
        require_same(changed, small_manifest(5), read_record(started))


def test_other_data_is_refused(started):
    record, manifest = read_record(started), small_manifest(5)
    with pytest.raises(InputError, match="data_sha256 was .*, is now .*"):
        require_same(started, replace(manifest, shard_sha256=["2" * 64]), record)
    with pytest.raises(InputError, match="vae_sha256 was 0+, is now 3+"):
        require_same(started, replace(manifest, recipe=replace(manifest.recipe, vae_sha256="3" * 64)), record)


@pytest.mark.parametrize("cooldown_steps", [0, 5])
def test_changed_code_and_a_moved_cooldown_log_warnings(started, caplog, cooldown_steps):
    job = with_config(started, optimizer=replace(started.config.optimizer, cooldown_steps=cooldown_steps))
    record = read_record(started)
    record.identity["config"]["optimizer"]["cooldown_steps"] = cooldown_steps
    require_same(job, small_manifest(5), record)
    assert caplog.text == ""
    require_same(with_config(job, num_steps=99), small_manifest(5), record)
    assert ("num_steps was 30, is now 99: the learning rate's cool-down moves" in caplog.text) == (cooldown_steps > 0)
    assert "the code has changed" not in caplog.text
    require_same(job, small_manifest(5), replace(record, code=record.code | {"torch": "1.0"}))
    assert "so results may differ: torch was 1.0, is now" in caplog.text
