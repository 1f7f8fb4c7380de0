import shutil

import numpy as np
import pytest
import torch

from pipelines.command import InputError
from pipelines.demo import images
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.evaluate import (
    EvaluateJob,
    Reference,
    Sampler,
    evaluate,
    read_real_images,
    reconstruct,
    table,
)
from pipelines.judge import load_judge


@pytest.fixture(scope="module")
def reference():
    train, _ = images.draw_many("train", 0, 600)
    held_out, labels = images.draw_many("val", 0, 300)
    tensors = [torch.from_numpy(array) for array in (train, held_out, labels)]
    return Reference(load_judge(SHIPPED_JUDGE), *tensors), tensors


def test_judge_knows_held_out_images():
    pixels, labels = (torch.from_numpy(array) for array in images.draw_many("val", 0, 1000))
    assert (load_judge(SHIPPED_JUDGE).look_at(pixels).predictions == labels).double().mean() >= 0.97


def test_held_out_images_are_the_floor_and_worse_images_score_worse(reference, pipeline):
    measure, (_, held_out, labels) = reference
    floor = measure.measure(held_out, labels)
    assert floor.diversity == pytest.approx(1.0)
    assert floor.nearest_train_ratio == pytest.approx(1.0)
    reconstruction = measure.measure(reconstruct(pipeline, held_out), labels)
    noise = torch.randint(0, 256, held_out.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noisy = measure.measure(noise, labels)
    assert floor.frechet < noisy.frechet / 10
    assert reconstruction.frechet < noisy.frechet / 10
    assert reconstruction.accuracy > 0.95 > 0.3 > noisy.accuracy


def test_copies_and_repeats_are_caught(reference):
    measure, (train, held_out, labels) = reference
    assert measure.measure(train[:300], labels).nearest_train_ratio < 0.01
    repeated = held_out[:10].repeat(30, 1, 1, 1)
    assert measure.measure(repeated, labels).diversity < 0.05
    assert measure.measure(held_out, (labels + 1) % 10).accuracy < 0.1


def test_samples_do_not_depend_on_how_they_are_cut(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    sampler = Sampler(str(tmp_path), None, base_seed=3, num_threads=1)
    whole = sampler({"index": np.arange(12), "steps": np.full(12, 2)})
    part = sampler({"index": np.array([11, 4]), "steps": np.array([2, 2])})
    difference = np.abs(whole["image"][[11, 4]].astype(int) - part["image"].astype(int))
    assert difference.max() <= 1
    expected = pipeline.images_from_seeds([4], [3 * 2**32 + 4], 2)[0].numpy()
    assert np.abs(expected.astype(int) - part["image"][1].astype(int)).max() <= 1


def test_generator_of_other_classes_is_refused(pipeline, tmp_path, image_root):
    pipeline.register_to_config(id2label={str(label): f"other {label}" for label in range(10)})
    pipeline.save_pretrained(tmp_path / "generator")
    job = EvaluateJob(
        model=str(tmp_path / "generator"),
        train_images=str(image_root / "train"),
        held_out_images=str(image_root / "val"),
        output=tmp_path / "report",
    )
    with pytest.raises(InputError, match="knows the classes arrow, circle"):
        evaluate(job)
    assert not (tmp_path / "report").exists()


def test_real_images_of_other_or_too_few_classes_are_refused(image_root, tmp_path):
    shutil.copytree(image_root / "val", tmp_path / "val")
    names = [path.name for path in sorted((tmp_path / "val").iterdir())]
    assert read_real_images(str(tmp_path / "val"), names, 64)[0].shape == (40, 64, 64, 3)
    for path in sorted((tmp_path / "val" / names[4]).iterdir())[1:]:
        path.unlink()
    with pytest.raises(InputError, match=f"1 readable images of class {names[4]}, but 2 are needed"):
        read_real_images(str(tmp_path / "val"), names, 64)
    shutil.rmtree(tmp_path / "val" / names[4])
    with pytest.raises(InputError, match="every class needs images"):
        read_real_images(str(tmp_path / "val"), names, 64)


def test_table_says_that_it_is_not_fid():
    quality = {"accuracy": 0.5, "frechet": 1.0, "diversity": 1.0, "nearest_train_ratio": 1.0}
    report = {
        "model": "m",
        "num_samples": 10,
        "num_train_images": 20,
        "held_out": quality,
        "reconstruction": quality,
        "samples": [{"steps": 1, **quality}],
    }
    assert "it is not FID" in table(report)
    assert "| 1-step samples | 0.500 | 1.000 |" in table(report)
