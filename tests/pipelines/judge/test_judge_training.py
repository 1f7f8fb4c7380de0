"""Training a judge on any images."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.errors import InputError
from pipelines.images.decoding import read_pixels
from pipelines.images.sources import find_images
from pipelines.judge.job import JudgeFit, JudgeJob
from pipelines.judge.network import Judge, load_judge
from pipelines.judge.run import train_judge
from pipelines.judge.training import augment, fit_judge, held_out_accuracy


def numbered(count, height, width):
    """Images in which each pixel's value tells its row and column."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    image = (10 * rows + columns).to(torch.uint8)
    return image[None, :, :, None].repeat(count, 1, 1, 3)


@pytest.fixture
def job(image_root, tmp_path):
    return JudgeJob(
        images=str(image_root / "train"), held_out_images=str(image_root / "val"), output=tmp_path / "judge",
        image_size=28, num_steps=2, batch_size=8, mirror=True,
    )  # fmt: skip


def test_no_augmentation_changes_nothing_and_draws_nothing():
    pixels = numbered(4, 6, 8)
    torch.manual_seed(0)
    assert torch.equal(augment(pixels, mirror=False, max_shift=0), pixels)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)


def test_mirroring_reverses_the_columns_of_about_half_of_the_images():
    torch.manual_seed(0)
    pixels = numbered(200, 6, 8)
    mirrored = augment(pixels, mirror=True, max_shift=0)
    is_mirrored = (mirrored == pixels.flip(2)).flatten(1).all(dim=1)
    assert torch.equal(mirrored[~is_mirrored], pixels[~is_mirrored])
    assert 70 < is_mirrored.sum() < 130


def test_shifts_reach_every_offset_and_repeat_the_edges():
    torch.manual_seed(0)
    values = augment(numbered(400, 6, 8), mirror=False, max_shift=2)[..., 0].int()
    offsets = {(int(centre) // 10 - 3, int(centre) % 10 - 4) for centre in values[:, 3, 4]}
    assert offsets == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}
    assert values[:, 0, 0].unique().tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert (values[:, -1, -1] <= 57).all()
    differences = values.diff(dim=2)  # rows stay rows
    assert set(differences.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("size", [15, 28, 32, 64])
def test_any_side_is_accepted(size):
    judge = Judge(class_names=("a", "b", "c"), image_size=size).eval()
    prediction = judge.predict(torch.zeros(2, size, size, 3, dtype=torch.uint8))
    assert (prediction.features.shape, prediction.logits.shape) == ((2, 64), (2, 3))


def test_the_shipped_judge_has_exactly_the_weights_of_its_file():
    stored = load_file(SHIPPED_JUDGE / "diffusion_pytorch_model.safetensors")
    loaded = load_judge(SHIPPED_JUDGE).state_dict()
    assert set(stored) == set(loaded)
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


def test_a_judge_learns_classes_and_the_seed_determines_it():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    pixels = torch.randint(100, (60, 12, 12, 3), dtype=torch.uint8, generator=generator)
    pixels[labels == 1, :6] += 100  # the upper half is brighter
    judges = []
    for _ in range(2):
        torch.manual_seed(3)
        judge = Judge(class_names=("dark", "bright"), image_size=12)
        judges.append(fit_judge(judge, pixels[:40], labels[:40], JudgeFit(num_steps=25, batch_size=16, max_shift=1)))
    assert held_out_accuracy(judges[0], pixels[40:], labels[40:]) > 0.9
    assert held_out_accuracy(judges[0], pixels[40:], 1 - labels[40:]) < 0.1
    assert not judges[0].training
    for ours, theirs in zip(judges[0].parameters(), judges[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_folder_holds_the_judge_and_a_card_with_its_held_out_accuracy(job, image_root, caplog):
    caplog.set_level("INFO")
    trained = train_judge(job)
    judge = load_judge(job.output)
    source = find_images(str(image_root / "val"))
    pixels, labels = (torch.from_numpy(array) for array in read_pixels(*source, 28))
    assert held_out_accuracy(judge, pixels, labels) == trained.held_out_accuracy
    assert list(judge.config.class_names) == source[2].class_names
    card = (job.output / "README.md").read_text()
    assert f"| held-out accuracy | {trained.held_out_accuracy:.4f} ± " in card
    assert "over 40 images |" in card
    assert "| trained on | 60 images of" in card
    assert "num steps 2, batch size 8" in card
    assert "judge: 2 of 2 steps" in caplog.text


def test_images_that_do_not_fit_are_refused_before_they_are_read(job):
    with pytest.raises(
        InputError, match=r"100 images of 28x28 pixels take 235,200 bytes .* --max-image-bytes is 235,199"
    ):
        train_judge(replace(job, max_image_bytes=235_199))
    with pytest.raises(InputError, match=r"50 images of 28x28 pixels take 117,600 bytes"):
        train_judge(replace(job, num_images=10, max_image_bytes=1))
    assert not job.output.exists()


def test_other_or_too_few_classes_are_refused(job, image_root, tmp_path):
    shutil.copytree(image_root / "val", tmp_path / "val")
    for folder in sorted((tmp_path / "val").iterdir())[1:]:
        shutil.rmtree(folder)
    with pytest.raises(InputError, match="must have exactly the classes of .*, but has"):
        train_judge(replace(job, held_out_images=str(tmp_path / "val")))
    with pytest.raises(InputError, match="at least 2 classes, but .* has .*one sub-folder per class"):
        train_judge(replace(job, images=str(tmp_path / "val")))
    assert not job.output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, but got 0"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"max_shift": -1}, "max_shift must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_invalid_options_are_refused(job, options, message):
    with pytest.raises(ValueError, match=message):
        replace(job, **options)
