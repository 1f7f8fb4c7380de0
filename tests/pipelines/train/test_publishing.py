import json
from dataclasses import replace

import pytest
import torch
from ray.train import Checkpoint

from meanflow_core.autoencoder import weight_hash
from meanflow_core.checkpoint import save_train_state
from meanflow_core.generator import load_network, load_pipeline
from meanflow_core.generator_folder import read_provenance
from meanflow_core.training import build_train_state
from pipelines.errors import RunError
from pipelines.tracking.run import MlflowClient, Run
from pipelines.train import run as train_run
from pipelines.train.publishing import FinishedTraining, publish_generators, write_generator
from pipelines.train.record import new_record
from pipelines.training import publishing
from pipelines.training.publishing import upload
from pipelines.training.record import read_record
from tests.conftest import perturbed
from tests.support.training_jobs import job_with_data, small_manifest, with_config


@pytest.fixture
def training(tmp_path, vae):
    """A finished run of 20 steps with two moving averages, and the networks of these averages."""
    vae.save_pretrained(tmp_path / "latents/vae")
    job = with_config(job_with_data(tmp_path, model_name=tmp_path.name), ema_decays=(0.9, 0.5))
    state = build_train_state(job.config, sample_size=8, in_channels=4, num_classes=2, device=torch.device("cpu"))
    for scale, network in enumerate(state.ema_networks.values(), start=1):
        perturbed(network)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(scale)
    (tmp_path / "checkpoint").mkdir()
    save_train_state(state, job.config, tmp_path / "checkpoint")
    checkpoint = Checkpoint(str(tmp_path / "checkpoint"))
    finished = FinishedTraining(job=job, preset="debug", manifest=small_manifest(), checkpoint=checkpoint, step=20)
    return finished, state.ema_networks


@pytest.fixture
def run(tracking_uri):
    return Run.begin(tracking_uri, "publishing", "r", {})


def test_every_average_is_published_and_the_first_is_registered_once(training, run, tmp_path):
    finished, averages = training
    record = new_record(finished.job, "debug", small_manifest(), run)
    after = train_run._publish(finished, run, record, is_validated=True)
    published = after.published
    assert (published.step, published.generator) == (20, f"{tmp_path}/runs/r/generator")
    assert published.model == f"models:/{tmp_path.name}@candidate"
    for decay, name in ((0.9, "generator"), (0.5, "generator-ema-0.5")):
        folder = tmp_path / "runs/r" / name
        weights = load_network(folder).state_dict()
        assert all(torch.equal(weights[key], value) for key, value in averages[decay].state_dict().items())
        assert read_provenance(folder) == {
            "run_id": run.run_id, "tracking_uri": run.tracking_uri, "preset": "debug", "step": 20, "ema_decay": decay,
            "data": finished.job.data, "data_sha256": small_manifest().content_sha256,
        }  # fmt: skip
        assert f"moving average with decay {decay:g}" in (folder / "README.md").read_text()
        assert load_pipeline(folder).class_names == {0: "a", 1: "b"}
    assert read_record(finished.job) == after == replace(record, published=published)
    assert train_run._publish(finished, run, after, is_validated=True) == after
    [version] = MlflowClient(run.tracking_uri).search_model_versions(f"name='{tmp_path.name}'")
    assert version.tags["transformer_sha256"] == weight_hash(load_network(tmp_path / "runs/r/generator"))
    assert (version.tags["step"], version.tags["generator"]) == ("20", published.generator)


def test_generator_is_kept_if_mlflow_does_not_register_it(training, run, monkeypatch):
    def refuse(*arguments):
        raise OSError("no space")

    monkeypatch.setattr(publishing, "register_generator", refuse)
    with pytest.raises(
        RunError, match=r"the generator is in .*/runs/r/generator, but MLflow did not register it: no space"
    ):
        publish_generators(training[0], run)


def test_provenance_and_card_hide_credentials(training, run, tmp_path):
    finished, _ = training
    run.tracking_uri = "https://user:SECRET@mlflow.example"
    job = replace(finished.job, init_from="s3://AKIA:SECRET@b/generator?x=SECRET")
    (tmp_path / "generator").mkdir()
    write_generator(replace(finished, job=job), 0.9, run, tmp_path / "generator")
    text = (tmp_path / "generator/provenance.json").read_text() + (tmp_path / "generator/README.md").read_text()
    assert "https://mlflow.example" in text
    assert "SECRET" not in text


def test_half_uploaded_generator_cannot_be_opened(tmp_path):
    target = tmp_path / "runs/r/generator"
    target.mkdir(parents=True)
    (target / "model_index.json").write_text("old")
    (target / "vae").write_text("blocks the folder")
    (tmp_path / "new/vae").mkdir(parents=True)
    for name in ("model_index.json", "vae/config.json"):
        (tmp_path / "new" / name).write_text(json.dumps("new"))
    with pytest.raises(OSError, match="vae"):
        upload(tmp_path / "new", str(target))
    assert not (target / "model_index.json").exists()
    (target / "vae").unlink()
    assert upload(tmp_path / "new", str(target)) == str(target)
    assert json.loads((target / "model_index.json").read_text()) == "new"
