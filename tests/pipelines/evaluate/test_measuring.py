import contextlib
import pickle
import random
from dataclasses import dataclass, replace

import numpy as np
import psutil
import pytest
import torch

from meanflow_core.autoencoder import allow_tf32
from meanflow_core.generator import build_pipeline
from meanflow_core.metrics import FeatureStatistics
from pipelines.cluster import start_ray
from pipelines.demo import images
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.evaluate import measuring
from pipelines.evaluate.extractors import Features
from pipelines.evaluate.judge import load_judge
from pipelines.evaluate.measuring import Drawn, Images, Measurer, MeasuringPlan, Stored
from pipelines.evaluate.reference import image_chunks
from pipelines.evaluate.samples import SampleRule, Setting
from pipelines.images.sources import find_images

RULE = SampleRule(base_seed=3, labels="balanced")
PLAN = MeasuringPlan(
    extractor=str(SHIPPED_JUDGE), extractor_weights=None, model=None, tracking_uri=None, batch_size=4, cpu_threads=1
)


@pytest.fixture
def generator(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "generator")
    return str(tmp_path / "generator")


def sample_chunks(num_samples, setting, **kept):
    return measuring.cut(
        "samples",
        measuring.spans(num_samples),
        lambda start, stop: Drawn(setting, RULE, np.arange(start, stop)),
        **kept,
    )


def measured_whole(worker, chunks):
    whole = measuring.Measured("samples")
    for chunk in chunks:
        whole.add(worker.measure(chunk))
    return whole


@pytest.mark.parametrize("num_rows", [1, 7, 20, 999, 50_000])
def test_chunks_hold_every_row_once_in_equal_groups(num_rows):
    parts = measuring.spans(num_rows)
    assert [row for _, start, stop in parts for row in range(start, stop)] == list(range(num_rows))
    assert max(stop - start for _, start, stop in parts) <= measuring.CHUNK_SIZE
    sizes = np.bincount([group for group, _, _ in parts], [stop - start for _, start, stop in parts])
    assert sizes[sizes > 0].max() - sizes[sizes > 0].min() <= 1
    kept = [chunk.num_features for chunk in measuring.cut("x", parts, lambda a, b: None, num_features=30)]
    assert sum(kept) == min(30, num_rows)
    assert max(kept) <= -(-30 // len(parts)) + 1  # spread, and not the first ones


def test_images_and_sums_are_those_of_the_sample_indices(generator, pipeline):
    setting = Setting(num_steps=2)
    worker = Measurer(replace(PLAN, model=generator), "cpu")
    measured = measured_whole(worker, sample_chunks(30, setting, num_features=30, num_images=30))
    seeds, labels = [3 * 2**32 + index for index in range(30)], [index % 10 for index in range(30)]
    expected = pipeline.images_from_seeds(labels, seeds, 2)
    drawn = torch.cat(measured.images)
    assert (drawn.int() - expected.int()).abs().max() <= 1
    assert torch.cat(measured.labels).tolist() == labels
    seen = load_judge(SHIPPED_JUDGE).look_at(drawn)
    wanted = FeatureStatistics.of(seen.features)
    torch.testing.assert_close(measured.statistics.mean, wanted.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(measured.statistics.covariance, wanted.covariance, rtol=1e-3, atol=1e-3)
    assert measured.num_right == int((seen.predictions == torch.tensor(labels)).sum())
    assert (measured.num_rows, len(measured.groups), len(measured.splits)) == (30, 20, 10)
    assert sum(split.count for split in measured.splits) == 30
    assert measured.seconds > 0


def test_a_chunk_sends_no_more_than_it_was_asked_for(generator):
    (chunk, *_) = sample_chunks(400, Setting(num_steps=1), num_features=20, num_images=20)
    measured = Measurer(replace(PLAN, model=generator, batch_size=20), "cpu").measure(chunk)
    assert (measured.num_rows, measured.features[0].shape, measured.images[0].shape) == (20, (1, 64), (1, 64, 64, 3))
    sent = pickle.loads(pickle.dumps(measured))
    for rows in (sent.features[0], sent.images[0]):
        assert rows.untyped_storage().nbytes() == rows.nbytes


def test_spatial_features_are_summed_over_batches_and_chunks_and_splits_follow_the_order():
    def extractor(images):
        rows = images[:, 0, 0].float()
        return Features(rows, rows, rows * 2)

    extractor.class_names = None
    worker = Measurer(replace(PLAN, batch_size=4), "cpu")
    worker._extractor = extractor
    pixels = torch.randint(256, (120, 1, 1, 3), dtype=torch.uint8).expand(-1, 2, 2, 3)

    @dataclass(frozen=True)
    class Given:
        rows: torch.Tensor

        def batches(self, worker, batch_size):
            return (Images(part, None) for part in self.rows.split(batch_size))

    chunks = measuring.cut("samples", measuring.spans(120), lambda start, stop: Given(pixels[start:stop]))
    measured = measured_whole(worker, chunks)
    rows = pixels[:, 0, 0].double()
    torch.testing.assert_close(measured.spatial.outer, 4 * rows.T @ rows)
    assert measured.spatial.count == 120
    for split, part in zip(measured.splits, rows.split(12), strict=True):
        torch.testing.assert_close(split.total, part.softmax(dim=1).sum(dim=0))


def test_rows_of_a_file_are_measured_once(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", pixels)
    chunks = measuring.cut(
        "samples", measuring.spans(40), lambda start, stop: Stored(tmp_path / "samples.npz", slice(start, stop)),
        num_images=40,
    )  # fmt: skip
    measured = measured_whole(Measurer(PLAN, "cpu"), chunks)
    assert measured.num_rows == 40
    np.testing.assert_array_equal(torch.cat(measured.images), pixels)


def test_gpus_measure_in_the_float32_that_the_protocol_names():
    allow_tf32()
    Measurer(PLAN, "cpu")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_random_labels_are_a_function_of_seed_and_index():
    rule = SampleRule(base_seed=5, labels="random")
    labels = rule.labels_of(np.arange(4000), 10)
    np.testing.assert_array_equal(rule.labels_of(np.array([3999, 17]), 10), labels[[3999, 17]])
    assert np.bincount(labels, minlength=10) == pytest.approx(400, rel=0.2)
    assert (SampleRule(base_seed=6, labels="random").labels_of(np.arange(4000), 10) != labels).mean() > 0.8


@pytest.mark.parametrize(
    "setting",
    [
        Setting(num_steps=3),
        Setting(num_steps=2, solver="heun"),
        Setting(num_steps=4, guidance_scale=2.0),
        Setting(num_steps=4, guidance_scale=2.0, guidance_interval=(0.3, 0.8)),
        Setting(num_steps=4, guidance_scale=2.0, guidance_interval=(0.3, 0.8), solver="heun"),
    ],
    ids=lambda setting: setting.title,
)
def test_network_calls_are_the_rows_that_the_network_sees(network, vae, setting):
    pipeline = build_pipeline(network.eval(), vae, images.CLASS_NAMES, is_flow_matching=True)
    rows = []
    network.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    pipeline.sample_latents(
        [1], torch.zeros(1, 4, 8, 8), setting.num_steps,
        guidance_scale=setting.guidance_scale, guidance_interval=setting.guidance_interval, solver=setting.solver,
    )  # fmt: skip
    assert setting.network_calls(pipeline) == sum(rows)


def test_unreadable_images_are_left_out_and_counted(image_root, tmp_path):
    found = find_images(str(image_root / "val"))
    whole = measured_whole(Measurer(PLAN, "cpu"), image_chunks("samples", found, 64, num_images=40))
    torn = image_root / "val" / "d0000004"
    path = sorted(torn.iterdir())[1]
    content = path.read_bytes()
    try:
        path.write_bytes(content[:300])
        part = measured_whole(Measurer(PLAN, "cpu"), image_chunks("samples", found, 64))
    finally:
        path.write_bytes(content)
    assert (whole.num_rows, whole.num_unreadable, part.num_rows, part.num_unreadable) == (40, 0, 39, 1)
    assert whole.num_right == 40
    missing = whole.statistics - part.statistics
    assert missing.count == 1


def assert_same(ours, theirs):
    assert torch.equal(torch.cat(ours.images), torch.cat(theirs.images))
    assert ours.num_right == theirs.num_right
    for ours_of, theirs_of in zip(ours.groups.values(), theirs.groups.values(), strict=True):
        torch.testing.assert_close(ours_of.outer, theirs_of.outer, rtol=1e-10, atol=0.0)
        torch.testing.assert_close(ours_of.total, theirs_of.total, rtol=1e-10, atol=1e-10)


@pytest.mark.soak
@pytest.mark.cluster
def test_killing_one_of_four_workers_changes_nothing(generator, tmp_path_factory):
    chunks = sample_chunks(240, Setting(num_steps=1), num_features=240, num_images=240)
    plan = replace(PLAN, model=generator)
    alone = measured_whole(Measurer(plan, "cpu"), chunks)
    killed = []

    def kill_one(measured):
        if killed:
            return
        workers = [
            process
            for process in psutil.Process().children(recursive=True)
            if process.name().startswith("ray::") and "MapWorker" in " ".join([process.name(), *process.cmdline()])
        ]
        killed.append(random.choice(workers))
        killed[0].kill()

    start_ray(needed_cpus=6)
    measured = measuring.measure_sets(chunks, plan, num_workers=4, use_gpu=False, on_chunk=kill_one)["samples"]
    assert killed
    with contextlib.suppress(psutil.NoSuchProcess):
        assert killed[0].status() == psutil.STATUS_ZOMBIE
    assert_same(measured, alone)
    two = measuring.measure_sets(chunks, plan, num_workers=2, use_gpu=False)["samples"]
    assert_same(two, alone)
