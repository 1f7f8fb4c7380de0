"""Labels and function evaluations of samples, and how a set of images is split into chunks."""

import itertools

import numpy as np
import pytest
import torch

from meanflow_core.generator import build_pipeline
from pipelines.demo import images
from pipelines.evaluate.chunks import CHUNK_SIZE, Kept, image_file_chunks, make_chunks, spans
from pipelines.evaluate.plan import grid_indices
from pipelines.evaluate.samples import SampleRule, Setting
from pipelines.images.sources import find_images


def test_random_labels_are_a_function_of_seed_and_index():
    rule = SampleRule(base_seed=5, labels="random")
    labels = rule.labels_of(np.arange(2000), 10)
    np.testing.assert_array_equal(rule.labels_of(np.array([1999, 17]), 10), labels[[1999, 17]])
    assert np.bincount(labels, minlength=10) == pytest.approx(200, rel=0.25)
    assert (SampleRule(base_seed=6, labels="random").labels_of(np.arange(2000), 10) != labels).mean() > 0.8


def test_labels_as_in_training_follow_its_class_counts():
    rule = SampleRule(base_seed=5, labels="training", class_counts=(100, 0, 300))
    labels = rule.labels_of(np.arange(2000), 3)
    np.testing.assert_array_equal(rule.labels_of(np.array([1999, 17]), 3), labels[[1999, 17]])
    assert np.bincount(labels, minlength=3) == pytest.approx([500, 0, 1500], rel=0.1)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(num_steps=3),
        Setting(num_steps=4, guidance_scale=2.0),
        Setting(num_steps=4, guidance_scale=2.0, guidance_interval=(0.3, 0.8), solver="heun"),
    ],
    ids=lambda setting: setting.title,
)
def test_number_of_function_evaluations_matches_the_sampler(network, vae, setting):
    pipeline = build_pipeline(network.eval(), vae, images.CLASS_NAMES, prediction="velocity")
    batch_sizes = []
    network.register_forward_pre_hook(lambda module, arguments: batch_sizes.append(len(arguments[0])))
    pipeline.sample_latents(
        [1], torch.zeros(1, 4, 8, 8), setting.num_steps,
        guidance_scale=setting.guidance_scale, guidance_interval=setting.guidance_interval, solver=setting.solver,
    )  # fmt: skip
    assert setting.num_function_evaluations(pipeline) == sum(batch_sizes)


@pytest.mark.parametrize("num_images", [1, 7, 999, 50_000])
def test_chunks_contain_every_image_once_in_equal_groups(num_images):
    parts = spans(num_images)
    assert [index for span in parts for index in range(span.start, span.stop)] == list(range(num_images))
    assert max(span.stop - span.start for span in parts) <= CHUNK_SIZE
    sizes = np.bincount([span.group for span in parts], [span.stop - span.start for span in parts])
    assert sizes[sizes > 0].max() - sizes[sizes > 0].min() <= 1
    chunks = make_chunks("x", [(span, None) for span in parts], Kept(features=30))
    kept = [chunk.kept.features for chunk in chunks]
    assert sum(kept) == min(30, num_images)
    assert max(kept) <= -(-30 // len(parts)) + 1  # spread over the chunks, not taken from the first ones only


def test_shuffled_image_files_mix_the_classes_in_every_group(image_root):
    source = find_images(str(image_root / "val"))
    chunks = image_file_chunks("x", source, 64, shuffle=True)
    labels = [chunk.source.images.entries["label"].to_pylist() for chunk in chunks]
    assert sorted(itertools.chain(*labels)) == sorted(source[2].entries["label"].to_pylist())
    assert sum(len(set(group)) > 1 for group in labels) > len(labels) / 2
    assert image_file_chunks("x", source, 64)[0].source.images.entries["label"].to_pylist() == [0, 0]


@pytest.mark.parametrize("num_classes", [3, 10, 1000])
def test_grid_rows_have_equal_length_with_random_labels(num_classes):
    labels = SampleRule(base_seed=0, labels="random").labels_of(np.arange(1000), num_classes)
    labels = labels[grid_indices(labels)]
    _, counts = np.unique(labels, return_counts=True)
    assert len(counts) == min(num_classes, 10)
    assert len(set(counts)) == 1
    assert (np.diff(labels) >= 0).all()
