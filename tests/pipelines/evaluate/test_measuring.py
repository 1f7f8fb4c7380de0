"""Workers: the sums of a chunk, and of a set on a cluster."""

import pickle
import random
from dataclasses import dataclass, replace

import numpy as np
import psutil
import pytest
import torch

from meanflow_core.autoencoder import allow_tf32
from meanflow_core.metrics import FeatureStatistics
from pipelines.cluster import start_ray
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.evaluate import workers
from pipelines.evaluate.chunks import Kept, generated_chunks, image_file_chunks, make_chunks, sample_file_chunks, spans
from pipelines.evaluate.job import MeasuringOptions
from pipelines.evaluate.measuring import Measurer, WorkerConfig
from pipelines.evaluate.samples import SampleRule, Setting
from pipelines.evaluate.sources import ImageBatch
from pipelines.evaluate.sums import SetSums
from pipelines.evaluate.workers import SumTree, Workers, measure_sets
from pipelines.extractors.opening import Features
from pipelines.images.sources import find_images
from pipelines.judge.network import load_judge

RULE = SampleRule(base_seed=3, labels="balanced")
CONFIG = WorkerConfig(options=MeasuringOptions(extractor=str(SHIPPED_JUDGE), batch_size=4))


@pytest.fixture
def config(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "generator")
    return replace(CONFIG, model=str(tmp_path / "generator"))


def test_waiting_for_the_first_worker_is_logged(config, monkeypatch, caplog):
    class Remote:
        def __init__(self, result):
            self.remote = lambda *_: result
            self.options = lambda **_: self

    class Actor:
        load, measure = Remote("loaded"), Remote(("kept", "sums"))

    answers = iter([([], ["loaded"]), (["loaded"], []), (["kept"], [])])
    monkeypatch.setattr(workers.ray, "remote", lambda _: Remote(Actor()))
    monkeypatch.setattr(workers.ray, "wait", lambda references, *, num_returns, timeout: next(answers))
    monkeypatch.setattr(workers.ray, "get", lambda reference: reference)
    monkeypatch.setattr(workers, "describe_waiting", lambda number, *, use_gpu: f"waiting for {number}, {use_gpu}")
    [result] = workers.WorkerPool(config, Workers(2, True), num_chunks=1).measure(["chunk"])
    assert (result.kept, result.sums) == ("kept", "sums")
    assert caplog.text.count("waiting for 1, True") == 1


def measure(worker, chunks):
    sums = SetSums("samples")
    for chunk in chunks:
        sums.add(worker.measure(chunk))
    return sums


def test_samples_and_sums_match_those_computed_from_the_sample_indices(config, pipeline):
    chunks = generated_chunks("samples", Setting(num_steps=2), RULE, 30, Kept(30, 30))
    sums = measure(Measurer(config, "cpu"), chunks)
    seeds, labels = [3 * 2**32 + index for index in range(30)], [index % 10 for index in range(30)]
    expected = pipeline.images_from_seeds(labels, seeds, 2)
    samples = torch.cat(sums.images)
    assert (samples.int() - expected.int()).abs().max() <= 1
    assert torch.cat(sums.labels).tolist() == labels
    prediction = load_judge(SHIPPED_JUDGE).predict(samples)
    statistics = FeatureStatistics.of(prediction.features)
    torch.testing.assert_close(sums.statistics.mean, statistics.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.statistics.covariance, statistics.covariance, rtol=1e-3, atol=1e-3)
    assert sums.num_correct == int((prediction.labels == torch.tensor(labels)).sum())
    assert (sums.num_images, len(sums.groups), len(sums.splits)) == (30, 20, 10)
    assert sum(split.count for split in sums.splits) == 30
    assert sums.seconds > 0


def test_a_chunk_returns_only_the_features_and_images_to_keep(config):
    chunk, *_ = generated_chunks("x", Setting(num_steps=1), RULE, 200, Kept(20, 20))
    sums = Measurer(replace(config, options=replace(config.options, batch_size=20)), "cpu").measure(chunk)
    assert (sums.num_images, sums.features[0].shape, sums.images[0].shape) == (10, (1, 64), (1, 64, 64, 3))
    received = pickle.loads(pickle.dumps(sums))
    for kept in (received.features[0], received.images[0]):
        assert kept.untyped_storage().nbytes() == kept.nbytes


def test_spatial_features_and_score_splits_add_up_over_batches_and_chunks():
    def extractor(images):
        values = images[:, 0, 0].float()
        return Features(values, values, values * 2)

    @dataclass(frozen=True)
    class Given:
        pixels: torch.Tensor

        def batches(self, models, batch_size):
            return (ImageBatch(part) for part in self.pixels.split(batch_size))

    extractor.class_names = None
    worker = Measurer(CONFIG, "cpu")
    worker.extractor = extractor
    pixels = torch.randint(256, (120, 1, 1, 3), dtype=torch.uint8).expand(-1, 2, 2, 3)
    parts = [(span, Given(pixels[span.start : span.stop])) for span in spans(120)]
    sums = measure(worker, make_chunks("samples", parts))
    values = pixels[:, 0, 0].double()
    torch.testing.assert_close(sums.spatial.outer, 4 * values.T @ values)
    assert sums.spatial.count == 120
    for split, part in zip(sums.splits, values.split(12), strict=True):
        torch.testing.assert_close(split.total, part.softmax(dim=1).sum(dim=0))


def test_every_image_of_a_sample_file_is_measured_once(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", pixels)
    chunks = sample_file_chunks("samples", tmp_path / "samples.npz", 40)
    sums = measure(Measurer(CONFIG, "cpu"), [replace(chunk, kept=Kept(images=500)) for chunk in chunks])
    assert sums.num_images == 40
    np.testing.assert_array_equal(torch.cat(sums.images), pixels)


def test_unreadable_images_are_skipped_and_counted(image_root, caplog):
    images = find_images(str(image_root / "val"))
    worker = Measurer(CONFIG, "cpu")
    whole = measure(worker, image_file_chunks("samples", images, 64))
    path = sorted((image_root / "val" / "d0000004").iterdir())[1]
    content = path.read_bytes()
    try:
        path.write_bytes(content[:300])
        part = measure(worker, image_file_chunks("samples", images, 64))
    finally:
        path.write_bytes(content)
    assert (whole.num_images, whole.num_unreadable, part.num_images, part.num_unreadable) == (40, 0, 39, 1)
    assert "skipped 1 unreadable images: d0000004/" in caplog.text
    assert "has changed since the images were listed" in caplog.text
    assert whole.num_correct == 40
    assert (whole.statistics - part.statistics).count == 1


def test_workers_compute_in_float32_without_tf32():
    allow_tf32()
    Measurer(CONFIG, "cpu")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def assert_equal_bits(ours, theirs):
    assert torch.equal(torch.cat(ours.images), torch.cat(theirs.images))
    assert torch.equal(torch.cat(ours.features), torch.cat(theirs.features))
    assert torch.equal(torch.cat(ours.labels), torch.cat(theirs.labels))
    assert ours.num_correct == theirs.num_correct
    assert (ours.groups.keys(), ours.scores.keys()) == (theirs.groups.keys(), theirs.scores.keys())
    assert (ours.spatial is None) == (theirs.spatial is None)
    spatial = [] if ours.spatial is None else [(ours.spatial, theirs.spatial)]
    for our_part, their_part in [*((ours.groups[group], theirs.groups[group]) for group in ours.groups), *spatial]:
        assert our_part.count == their_part.count
        assert torch.equal(our_part.outer, their_part.outer)
        assert torch.equal(our_part.total, their_part.total)
    for group, score in ours.scores.items():
        assert torch.equal(score.total, theirs.scores[group].total)
        assert (score.count, score.negative_entropy) == (
            theirs.scores[group].count,
            theirs.scores[group].negative_entropy,
        )


def test_sums_are_added_in_a_tree_whose_shape_depends_on_their_number_alone():
    def total(num_chunks):
        tree = SumTree(tuple)  # shows what is added together
        for number in range(num_chunks):
            tree.add(number)
        return tree.total()

    assert total(1) == (0,)
    assert total(9) == (tuple(range(8)), 8)
    assert total(19) == (tuple(range(8)), tuple(range(8, 16)), 16, 17, 18)
    assert total(64) == (tuple(tuple(range(first, first + 8)) for first in range(0, 64, 8)),)


def test_a_part_of_a_set_keeps_its_images_apart_from_the_sums_of_its_features(config):
    [chunk, *_] = generated_chunks("samples", Setting(num_steps=1), RULE, 60, Kept(60, 60))
    whole = Measurer(config, "cpu").measure(chunk)
    assert whole.scores
    whole.spatial = FeatureStatistics.of(torch.rand(12, 7))  # the demo's judge has no spatial features
    kept, sums = whole.split()
    assert (kept.groups, kept.scores, kept.spatial) == ({}, {}, None)
    assert (kept.num_images, len(torch.cat(kept.images)), sums.num_images, sums.images) == (3, 3, 0, [])
    kept.add(sums)
    assert_equal_bits(kept, whole)


@pytest.mark.soak
@pytest.mark.cluster
def test_results_match_bit_for_bit_with_one_two_or_four_workers_even_if_one_is_killed(config):
    chunks = generated_chunks("samples", Setting(num_steps=1), RULE, 120, Kept(120, 120))
    killed = []

    def kill_one(sums):
        if killed:
            return
        processes = [
            process
            for process in psutil.Process().children(recursive=True)
            if process.name().startswith("ray::") and "ChunkWorker" in " ".join([process.name(), *process.cmdline()])
        ]
        killed.append(random.choice(processes))
        killed[0].kill()

    start_ray(needed_cpus=6)
    one = measure_sets(chunks, config, Workers(1, use_gpu=False))["samples"]
    four = measure_sets(chunks, config, Workers(4, use_gpu=False), on_chunk=kill_one)["samples"]
    assert killed
    assert not killed[0].is_running() or killed[0].status() == psutil.STATUS_ZOMBIE
    assert_equal_bits(four, one)
    assert_equal_bits(measure_sets(chunks, config, Workers(2, use_gpu=False))["samples"], one)
