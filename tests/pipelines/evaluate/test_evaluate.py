"""Options of an evaluation, checks of its inputs, and whole evaluations on a cluster."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch

from meanflow_core.generator import build_pipeline
from meanflow_core.generator_folder import write_provenance
from pipelines.cluster import start_ray
from pipelines.demo import images
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.errors import InputError
from pipelines.evaluate.chunks import Kept, generated_chunks
from pipelines.evaluate.inputs import open_inputs
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.plan import REFERENCE_IMAGES, plan_chunks, samples_set
from pipelines.evaluate.real_images import find_real_images, read_evenly
from pipelines.evaluate.report import protocol
from pipelines.evaluate.run import SampleSaver, _train_pixels, evaluate
from pipelines.evaluate.sample_files import open_sample_file
from pipelines.evaluate.samples import SampleRule, Setting
from pipelines.evaluate.sums import SetSums
from pipelines.evaluate.table import report_table
from pipelines.extractors.reference import read_reference
from pipelines.images import decoding
from tests.support.counted_storage import count_storage
from tests.support.latents import encode_job, encode_without_ray


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": (1, 2, 1)}, "settings must differ, but steps, guidance and solvers give 1step, 2steps, 1step"),
        ({"guidance_scales": (0.5,)}, "at least 1"),
        ({"guidance_intervals": ((0.8, 0.2),)}, "0 <= start <= end <= 1"),
        ({"num_samples": 2}, "num_samples must be at least 3"),
        ({"num_workers": 0}, "num_workers must be at least 1"),
        ({"steps": ()}, "steps must be"),
        ({"solvers": ()}, "solvers must be"),
        ({"seed": 2**31}, "seed must be"),
        ({"samples": Path("x.npz")}, "either --model or --samples"),
        ({"train_images": None}, "give --reference, or --train-images"),
        ({"train_images": None, "reference": "r.npz", "labels": "training"}, "labels training requires --train-images"),
    ],
)
def test_invalid_options_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        EvaluateJob(**{"model": "m", "train_images": "t", "output": tmp_path, **options})


def test_real_images_of_other_or_too_few_classes_are_refused(image_root, tmp_path):
    shutil.copytree(image_root / "val", tmp_path / "val")
    names = [path.name for path in sorted((tmp_path / "val").iterdir())]
    source = find_real_images(str(tmp_path / "val"), names)
    pixels, labels = read_evenly(source, 64, 1000)
    assert pixels.shape == (40, 64, 64, 3)
    assert labels.bincount().tolist() == [4] * 10
    some, some_labels = read_evenly(source, 64, 20)
    assert torch.equal(some, pixels[::2])
    assert torch.equal(some_labels, labels[::2])
    for path in sorted((tmp_path / "val" / names[4]).iterdir())[1:]:
        path.unlink()
    with pytest.raises(InputError, match=f"at least 2 images per class, but has 1 of {names[4]}"):
        find_real_images(str(tmp_path / "val"), names)
    shutil.rmtree(tmp_path / "val" / names[4])
    assert len(find_real_images(str(tmp_path / "val"), None)[1].files) == 36
    with pytest.raises(InputError, match="must have images of exactly the generator's classes"):
        find_real_images(str(tmp_path / "val"), names)


@pytest.mark.parametrize("limit", [None, 20])
def test_images_of_a_latent_dataset_are_found_without_listing_them(image_root, tmp_path, monkeypatch, limit):
    latents = str(tmp_path / "latents")
    encode_without_ray(encode_job(image_root / "val", latents, limit=limit))
    expected = read_evenly(find_real_images(str(image_root / "val"), None), 64, limit or 1000)
    counted = count_storage(monkeypatch)
    source = find_real_images(latents, images.CLASS_NAMES)
    assert counted.listed == []
    assert source[1].location == str(image_root / "val")
    assert len(source[2]) == (limit or 40)
    for ours, theirs in zip(read_evenly(source, 64, 1000), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_latent_dataset_whose_images_have_moved_is_refused(image_root, tmp_path):
    shutil.copytree(image_root / "val", tmp_path / "val")
    encode_without_ray(encode_job(tmp_path / "val", tmp_path / "latents"))
    (tmp_path / "val").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="image folder .*/val does not exist"):
        find_real_images(str(tmp_path / "latents"), None)


@pytest.mark.cluster
def test_training_images_for_pixel_distances_are_decoded_by_tasks_of_the_cluster(image_root, monkeypatch):
    train = find_real_images(str(image_root / "train"), None)
    expected, _ = read_evenly(train, 64, 60)
    inputs = SimpleNamespace(train=train, held_out=train, generator=object(), image_size=64)
    monkeypatch.setattr(decoding, "decode_image", None)  # in this process
    start_ray(needed_cpus=2)
    try:
        assert torch.equal(_train_pixels(inputs), expected)
    finally:
        ray.shutdown()


@pytest.fixture
def job(pipeline, tmp_path, image_root):
    pipeline.save_pretrained(tmp_path / "generator")
    return EvaluateJob(
        model=str(tmp_path / "generator"),
        train_images=str(image_root / "train"),
        held_out_images=str(image_root / "val"),
        extractor=str(SHIPPED_JUDGE),
        output=tmp_path / "report",
        steps=(1, 2),
        num_samples=40,
        num_workers=1,
    )


def test_unsupported_options_are_refused_before_anything_is_written(job, pipeline, tmp_path):
    with pytest.raises(InputError, match="guidance is fixed in its weights"):
        evaluate(replace(job, guidance_scales=(2.0,)))
    with pytest.raises(InputError, match="which predicts velocity, but this one predicts average velocity"):
        evaluate(replace(job, solvers=("heun",)))
    with pytest.raises(InputError, match=r"at least 20 \(2 for each of the 10 classes\), but got 19"):
        evaluate(replace(job, num_samples=19, labels="balanced"))
    with pytest.raises(InputError, match="--output must be a folder on a mounted disk, but got s3:"):
        evaluate(replace(job, output=Path("s3://bucket/report")))
    pipeline.register_to_config(id2label={str(label): f"other {label}" for label in range(10)})
    pipeline.save_pretrained(tmp_path / "generator")
    with pytest.raises(InputError, match="was trained on the classes arrow, circle"):
        evaluate(job)
    assert not (tmp_path / "report").exists()


def test_the_report_states_the_decay_of_the_moving_average(job, tmp_path):
    assert open_inputs(job).generator.ema_decay is None
    write_provenance(tmp_path / "generator", {"ema_decay": 0.9995})
    assert open_inputs(job).generator.ema_decay == 0.9995


def test_features_for_precision_and_recall_are_computed_from_the_images_of_a_reference(job, tmp_path):
    adm = tmp_path / "adm.npz"
    np.savez(adm, mu=np.zeros(64), sigma=np.eye(64), arr_0=np.zeros((30, 64, 64, 3), np.uint8))
    job = replace(job, reference=str(adm), train_images=None, held_out_images=None)
    chunks = plan_chunks(job, open_inputs(job))
    assert sum(chunk.kept.features for chunk in chunks if chunk.set_name == REFERENCE_IMAGES) == 30


def test_classes_of_samples_are_counted_in_the_training_images(job, image_root, tmp_path):
    shutil.copytree(image_root, tmp_path / "images")
    third_class = sorted((tmp_path / "images/val").iterdir())[2]
    for path in sorted(third_class.iterdir())[:2]:
        path.unlink()
    job = replace(job, train_images=str(tmp_path / "images/val"), labels="training")
    chunks = plan_chunks(job, open_inputs(job))
    [rule] = {chunk.source.rule for chunk in chunks if chunk.set_name == samples_set(0)}
    assert rule.class_counts == (4, 4, 2, 4, 4, 4, 4, 4, 4, 4)


def test_labels_of_a_sample_file_need_no_class_counts(job, tmp_path):
    adm, samples = tmp_path / "adm.npz", tmp_path / "samples.npz"
    np.savez(adm, mu=np.zeros(64), sigma=np.eye(64))
    np.savez(samples, arr_0=np.zeros((3, 64, 64, 3), np.uint8))
    job = replace(job, model=None, samples=samples, held_out_images=None, reference=str(adm), labels="training")
    content = protocol(job, open_inputs(job), read_reference(str(adm)))
    assert content["labels"] == "those of the file"
    assert "class_counts" not in content


def test_saving_samples_keeps_only_the_images_for_pixel_distances_in_memory(job, tmp_path):
    job = replace(job, steps=(1, 2), num_samples=2000, save_samples=tmp_path / "saved")
    saver, rule = SampleSaver(job, 1), SampleRule(job.seed, job.labels)
    for number, setting in enumerate(job.settings):
        kept = []
        for chunk in generated_chunks(samples_set(number), setting, rule, 2000, Kept(images=1000)):
            indices = torch.from_numpy(chunk.source.indices)
            pixels = (indices % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 1, 3)
            sums = SetSums(chunk.set_name, images=[pixels], labels=[indices])
            saver(sums)
            assert torch.cat(sums.labels).tolist() == indices[: chunk.kept.images].tolist()
            kept += sums.images
        assert len(torch.cat(kept)) == 1000
    assert list(job.save_samples.glob("*.npz")) == []  # until they are complete
    saver.close()
    for path in (tmp_path / "saved/samples-1step.npz", tmp_path / "saved/samples-2steps.npz"):
        assert open_sample_file(path)[:, 0, 0, 0].tolist() == [index % 256 for index in range(2000)]


@pytest.mark.soak
@pytest.mark.cluster
def test_guided_samples_are_saved_and_their_file_gives_the_same_metrics(job, network, vae, tmp_path):
    velocity = build_pipeline(network, vae, images.CLASS_NAMES, prediction="velocity")
    velocity.save_pretrained(tmp_path / "generator")
    guided = replace(
        job, steps=(2,), guidance_scales=(1.0, 3.0), guidance_intervals=((0.2, 0.9),), solvers=("euler", "heun"),
        labels="random", save_samples=tmp_path / "saved",
    )  # fmt: skip
    report = evaluate(guided)
    last = Setting(num_steps=2, guidance_scale=3.0, guidance_interval=(0.2, 0.9), solver="heun")
    assert guided.settings[-1] == last
    assert report["samples"][3]["title"] == "2 steps, omega 3, in [0.2, 0.9], Heun"
    # Euler evaluates t = 1 and 0.5, Heun 0.5 and 0 as well. Guidance adds an evaluation for each t in the interval.
    assert [entry["num_function_evaluations"] for entry in report["samples"]] == [2, 3, 4, 6]
    for setting in guided.settings:
        saved = open_sample_file(tmp_path / "saved" / f"samples-{setting.slug}.npz")
        assert saved.shape == (40, 64, 64, 3)
    labels = SampleRule(guided.seed, guided.labels).labels_of(np.arange(40), 10)
    expected = velocity.images_from_seeds(
        labels.tolist(), list(range(40)), 2, guidance_scale=3.0, guidance_interval=(0.2, 0.9), solver="heun"
    )
    assert np.abs(saved.astype(int) - expected.numpy().astype(int)).max() <= 1
    for name in (
        "samples.png",
        "quality_against_steps.png",
        "quality_against_guidance.png",
        "table.md",
        "reference.npz",
    ):
        assert (job.output / name).stat().st_size > 500, name
    assert json.loads((job.output / "report.json").read_text())["protocol"]["labels"] == "random"
    assert "| samples, 2 steps, omega 3, in [0.2, 0.9], Heun | 6 |" in report_table(report)
    assert "is not FID" in report_table(report)

    from_file = EvaluateJob(
        samples=tmp_path / "saved" / f"samples-{last.slug}.npz",
        reference=str(job.output / "reference.npz"),
        extractor=str(SHIPPED_JUDGE),
        output=tmp_path / "again",
        num_workers=1,
    )
    ours, theirs = evaluate(from_file)["samples"][0], report["samples"][3]
    for key in ("frechet", "frechet_standard_error", "inception_score", "precision", "recall"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key  # other strides round differently
