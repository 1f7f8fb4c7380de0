from dataclasses import replace

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from ray.train import Checkpoint

from meanflow_core.checkpoint import save_train_state
from meanflow_core.latents import LatentNormalization, sample_latents
from meanflow_core.objectives.interface import build_objective
from meanflow_core.presets.demo import debug
from meanflow_core.training import build_train_state
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.encode.job import EncodeJob
from pipelines.errors import InputError
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.cache import open_latents
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.manifest import read_manifest
from pipelines.tracking.run import Run
from pipelines.train import validation
from pipelines.train.job import TrainJob
from tests.conftest import perturbed
from tests.support.latents import encode_without_ray
from tests.support.objectives import draw_record

CONFIG = replace(debug(), ema_decays=(0.9, 0.5))


@pytest.fixture(scope="module")
def latents(tmp_path_factory, image_root):
    """Latents of forty held-out images."""
    output = tmp_path_factory.mktemp("validation") / "latents"
    encode_without_ray(
        EncodeJob(images=str(image_root / "val"), output=str(output), vae=str(SHIPPED_AUTOENCODER), image_size=64)
    )
    return output


def fresh_state():
    return build_train_state(CONFIG, sample_size=8, in_channels=4, num_classes=10, device=torch.device("cpu"))


def without_bins(errors):
    return {name for name in errors if "_by_t/" not in name}


def test_validation_measures_the_moving_average_and_logs_at_the_checkpoints_step(latents, tmp_path, tracking_uri):
    state = fresh_state()
    perturbed(state.ema_network)
    state.step = 7
    for parameter in state.network.parameters():
        state.optimizers[0].state[parameter] = {
            "step": torch.tensor(7.0),
            **{name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")},
        }
    (tmp_path / "checkpoint").mkdir()
    save_train_state(state, CONFIG, tmp_path / "checkpoint")
    run = Run.begin(tracking_uri, "validation", "name", {})
    job = TrainJob(
        data=str(latents), storage="s", run_name="r", validation_data=str(latents), config=CONFIG,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    found = validation.validate(Checkpoint(str(tmp_path / "checkpoint")), job, tracking_uri, run.run_id)

    dataset = open_latents(str(latents), str(tmp_path / "cache"), mirrored=False)
    normalization = LatentNormalization.from_vae_config(open_autoencoder(str(latents)).config)
    expected = validation.held_out_errors(state.ema_network, dataset, normalization, CONFIG, step=7)
    assert found == pytest.approx(expected, rel=1e-4)
    assert without_bins(found) == {"validation/squared_error_r_below_t", "validation/squared_error_r_equals_t"}
    assert "validation/squared_error_by_t/0.4" in found
    client = MlflowClient(tracking_uri)
    for name, value in found.items():
        assert [(m.step, m.value) for m in client.get_metric_history(run.run_id, name)] == [(7, value)]


def test_latents_with_another_autoencoder_classes_or_shape_are_refused(latents):
    ours = read_manifest(str(latents))
    validation.require_comparable(str(latents), ours)
    for what, other in (
        ("autoencoder", replace(ours, recipe=replace(ours.recipe, vae_sha256="0"))),
        ("classes", replace(ours, class_names=ours.class_names[:-1])),
        ("shape", replace(ours, recipe=replace(ours.recipe, moments_shape=(8, 4, 4)))),
    ):
        with pytest.raises(InputError, match=f"differs from --data in {what}"):
            validation.require_comparable(str(latents), other)


@pytest.mark.parametrize(
    ("resources", "device", "expected"),
    [({"CPU": 3}, "cpu", True), ({"CPU": 2}, "cpu", False), ({"CPU": 16, "GPU": 2}, "gpu", False),
     ({"CPU": 16, "GPU": 3}, "gpu", True), ({"CPU": 2, "GPU": 3}, "gpu", False)],
)  # fmt: skip
def test_validation_during_training_requires_a_spare_device_and_cpu(monkeypatch, resources, device, expected):
    monkeypatch.setattr(validation.ray, "cluster_resources", lambda: resources)
    job = TrainJob(data="d", storage="s", run_name="r", num_workers=2, device=device, config=debug())
    assert validation.has_spare_resources(job) == expected


def test_errors_are_means_over_all_images_for_any_batch_size(latents, tmp_path, monkeypatch):
    dataset = open_latents(str(latents), str(tmp_path / "cache"), mirrored=False)
    normalization = LatentNormalization.from_vae_config(open_autoencoder(str(latents)).config)
    network = perturbed(fresh_state().network)
    with torch.no_grad():  # so that a dropped label would change the errors clearly
        network.y_embedder.embedding_table.weight.mul_(100.0)
    loss, below, equal = replace(debug().loss, label_drop_probability=0.0), [], []
    for number, rows in enumerate(np.split(np.arange(40), [16, 32])):
        record = draw_record(loss, seed=validation.SEED, step=number, num_rows=len(rows), latent_shape=(4, 8, 8))
        moments, labels = dataset.read(rows, np.zeros(len(rows), bool))
        errors = build_objective(loss).loss(
            network, network, sample_latents(torch.from_numpy(moments), record.posterior_noise, normalization),
            torch.from_numpy(labels), record, null_label=10, global_num_rows=len(rows),
        ).squared_error.detach()  # fmt: skip
        below.append(errors[record.draws.r < record.draws.t])
        equal.append(errors[record.draws.r == record.draws.t])
    monkeypatch.setattr(validation, "BATCH_SIZE", 16)
    found = validation.held_out_errors(network, dataset, normalization, debug(), step=0)
    assert found["validation/squared_error_r_below_t"] == pytest.approx(float(torch.cat(below).mean()), rel=1e-4)
    assert found["validation/squared_error_r_equals_t"] == pytest.approx(float(torch.cat(equal).mean()), rel=1e-4)


def test_large_dataset_is_sampled_evenly(latents, tmp_path, monkeypatch):
    dataset, taken, inner = open_latents(str(latents), str(tmp_path / "cache"), mirrored=False), [], LatentDataset.read

    def read(self, chosen, mirrored):
        taken.extend(chosen.tolist())
        return inner(self, chosen, mirrored)

    monkeypatch.setattr(LatentDataset, "read", read)
    monkeypatch.setattr(validation, "MAX_SAMPLES", 4)
    flow = replace(debug().loss, times=replace(debug().loss.times, fraction_r_below_t=0.0))
    normalization = LatentNormalization(mean=(0.0,) * 4, std=(1.0,) * 4)
    found = validation.held_out_errors(
        fresh_state().network, dataset, normalization, replace(debug(), loss=flow), step=0
    )
    assert taken == [0, 13, 26, 39]
    assert without_bins(found) == {"validation/squared_error_r_equals_t"}  # flow matching has r = t only


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_validation_task_uses_the_training_device_and_has_a_time_limit(device):
    job = TrainJob(data="d", storage="s", run_name="r", validation_data="v", device=device, config=debug())
    config = validation.ray_config(job, "sqlite:///x", "1a2b")
    assert config.ray_remote_kwargs == {"num_cpus": 1, "num_gpus": int(device == "gpu")}
    assert config.task_config.timeout_s == validation.TIMEOUT_SECONDS
    assert config.fn.keywords == {"job": job, "tracking_uri": "sqlite:///x", "run_id": "1a2b"}
