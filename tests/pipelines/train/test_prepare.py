from dataclasses import replace
from types import SimpleNamespace

import pytest

from meanflow_core.autoencoder import weight_hash
from meanflow_core.generator import save_generator
from meanflow_core.presets.demo import debug
from pipelines.demo import images
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.errors import InputError
from pipelines.tracking.run import Run
from pipelines.train import run as train_run
from pipelines.train.prepare import prepare, reload_initial_network
from pipelines.train.record import new_record
from pipelines.training import driver
from pipelines.training.driver import require_steps_left, with_workers
from pipelines.training.record import write_record
from tests.support.ray_records import write_checkpoints
from tests.support.training_jobs import job_with_data, small_manifest, training_job, with_config


@pytest.fixture
def job(tmp_path):
    return job_with_data(tmp_path)


@pytest.fixture
def record(job):
    """The record of a started run. It is not written to storage."""
    return new_record(job, "debug", small_manifest(), Run("http://127.0.0.1:9", "1a2b"))


@pytest.mark.parametrize("name", ["", " ", ".", "..", ".hidden", "a/b"])
def test_invalid_run_name_is_refused(job, name):
    with pytest.raises(InputError, match="--run-name must not be empty, contain a slash or start with a dot"):
        prepare(replace(job, run_name=name))


def test_relative_locations_become_absolute_and_registry_uris_stay(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.train.prepare.load_initial_network", lambda job, manifest: None)
    relative = replace(job, data="latents", storage="runs/", cache_dir="cache", validation_data="latents")
    found = prepare(replace(relative, init_from="generator")).job
    assert (found.data, found.validation_data) == (f"{tmp_path}/latents", f"{tmp_path}/latents")
    assert (found.storage, found.cache_dir) == (f"{tmp_path}/runs", f"{tmp_path}/cache")
    assert found.init_from == f"{tmp_path}/generator"
    for name in ("models:/meanflow-xl2@champion", "runs:/1a2b/generator"):
        found = prepare(replace(relative, cache_dir="none", init_from=name)).job
        assert (found.cache_dir, found.init_from) == ("none", name)


def test_invalid_data_is_refused(job, tmp_path):
    other = replace(small_manifest(4), class_names=["a", "x"])
    (tmp_path / "held-out").mkdir()
    (tmp_path / "held-out/manifest.json").write_text(other.to_json())
    with pytest.raises(InputError, match="--validation-data .*held-out differs from --data in classes"):
        prepare(replace(job, validation_data=str(tmp_path / "held-out")))
    with pytest.raises(InputError, match="the latent size must be a multiple of the patch size, but got 8 and 3"):
        prepare(with_config(job, network=replace(job.config.network, patch_size=3)))
    with pytest.raises(InputError, match="latent dataset .* does not exist"):
        prepare(replace(job, data=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("num_gpus", "options", "device", "num_workers"),
    [
        (0, {}, "cpu", 1),
        (8, {}, "gpu", 8),
        (8, {"num_workers": 2}, "gpu", 2),
        (8, {"device": "cpu"}, "cpu", 1),
        (0, {"min_workers": 4}, "cpu", 4),
    ],
)
def test_training_uses_all_gpus_by_default(job, monkeypatch, num_gpus, options, device, num_workers):
    monkeypatch.setattr(driver, "num_gpus", lambda: num_gpus)
    monkeypatch.setattr(driver, "choose_gpus", lambda device, num_processes: device != "cpu" and num_gpus > 0)
    found = with_workers(replace(job, **{"num_workers": None, **options}), 16, None)
    assert (found.device, found.num_workers) == (device, num_workers)


@pytest.mark.parametrize(
    ("recorded", "requested", "device"), [("cpu", "auto", "cpu"), ("cpu", "gpu", "gpu"), ("gpu", "auto", "gpu")]
)
def test_a_resumed_run_keeps_its_device(job, monkeypatch, recorded, requested, device):
    monkeypatch.setattr(driver, "num_gpus", lambda: 8)
    monkeypatch.setattr(driver, "choose_gpus", lambda device, num_processes: device != "cpu")
    record = SimpleNamespace(device=recorded)
    assert with_workers(replace(job, num_workers=None, device=requested), 16, record).device == device


def test_more_workers_than_samples_in_a_batch_are_refused(job, monkeypatch):
    monkeypatch.setattr(driver, "choose_gpus", lambda device, num_processes: False)
    with pytest.raises(
        InputError, match="global_batch_size 16 must be at least the number of workers, but there are 17"
    ):
        with_workers(replace(job, num_workers=17, device="cpu"), 16, None)


def test_latents_of_another_autoencoder_are_refused(tmp_path, vae):
    vae_of_data = replace(small_manifest().recipe, vae_sha256=weight_hash(vae))
    prepare(job_with_data(tmp_path, replace(small_manifest(), recipe=vae_of_data), vae=str(SHIPPED_AUTOENCODER)))
    with pytest.raises(InputError, match=r"were encoded with autoencoder some/vae .*, not with .*autoencoder_weights"):
        prepare(job_with_data(tmp_path, vae=str(SHIPPED_AUTOENCODER)))


def test_refused_initial_network_leaves_no_files(job, tmp_path, pipeline):
    save_generator(pipeline, tmp_path / "generator")
    job = replace(job, init_from=str(tmp_path / "generator"))
    with pytest.raises(
        InputError, match=r"--init-from .*hidden_size is 48, expected 64; .*num_classes is 10, expected 2"
    ):
        train_run.train("debug", job)
    assert not (tmp_path / "runs").exists()


def test_longer_run_keeps_the_delay_of_guidance(job, record):
    record.identity["config"]["guidance_after_steps"] = 15
    write_record(job, record)
    ready = prepare(with_config(job, num_steps=1000))
    assert ready.job.config.guidance_after_steps == 15
    assert ready.record == record
    with pytest.raises(InputError, match="config.guidance_after_steps was 15, is now 3"):
        prepare(with_config(job, guidance_after_steps=3))


def test_run_with_more_steps_than_num_steps_is_refused(job, tmp_path, record):
    write_checkpoints(tmp_path / "runs/r", steps=[10, 20])
    assert reload_initial_network(job, small_manifest(), record) is None
    require_steps_left(job, 20)
    with pytest.raises(InputError, match="already has 20 steps, but num_steps is 19"):
        require_steps_left(job, 19)


def test_run_without_a_checkpoint_starts_again_with_the_same_initial_network(tmp_path, record, pipeline, vae):
    save_generator(pipeline, tmp_path / "generator")
    vae.save_pretrained(tmp_path / "latents/vae")
    network = replace(debug().network, hidden_size=48, num_heads=3, patch_size=2)
    job = with_config(training_job(tmp_path, init_from=str(tmp_path / "generator")), network=network)
    manifest = replace(small_manifest(), class_names=list(images.CLASS_NAMES))
    sha256 = weight_hash(pipeline.transformer)
    found = reload_initial_network(job, manifest, replace(record, init_sha256=sha256))
    assert weight_hash(found.network) == sha256
    with pytest.raises(InputError, match="the weights of --init-from .* have changed since run r was started"):
        reload_initial_network(job, manifest, replace(record, init_sha256="0" * 64))


def test_dry_run_describes_the_training_and_writes_nothing(job, tmp_path):
    job = replace(job, num_workers=4, min_workers=2, parallelism="fsdp2", samples_per_pass=4)
    text = train_run.dry_run("debug", job)
    assert "optimizer.learning_rate" in text
    assert "an epoch      25.0 steps" in text
    assert "2: 8 samples each, in 2 passes of 4" in text
    assert "float32, one of 2 shards" in text  # shards are largest with the fewest workers
    assert not (tmp_path / "runs").exists()
