"""The distance from features of the demo's judge, and the pixel distances."""

import pytest
import torch

from meanflow_core.metrics import FeatureStatistics, frechet_distance
from pipelines.demo import images
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.evaluate.pixel_distances import PixelDistances, downsample
from pipelines.judge.network import load_judge


def draw(split, count):
    return tuple(torch.from_numpy(array) for array in images.draw_many(split, 0, count))


@pytest.fixture(scope="module")
def train():
    return draw("train", 1000)


@pytest.fixture(scope="module")
def held_out():
    return draw("val", 500)


def test_judge_classifies_images_and_its_distance_grows_with_missing_variation(train, held_out):
    judge = load_judge(SHIPPED_JUDGE)
    reference = FeatureStatistics.of(judge.predict(train[0]).features)
    pixels, labels = held_out
    prediction = judge.predict(pixels)
    assert (prediction.labels == labels).double().mean() >= 0.97

    def distance(features):
        return frechet_distance(FeatureStatistics.of(features), reference)

    floor = distance(prediction.features)
    half = distance(prediction.features[labels < 5])
    one = distance(prediction.features[labels == 3])
    assert floor < half / 5 < one / 10
    # Ten repeated images: features trained only to classify would not detect them.
    assert distance(prediction.features[:10].repeat(50, 1)) > 20 * floor


def test_pixel_distances_detect_copies_and_repeats(train, held_out):
    pixels, labels = (tensor[:300] for tensor in held_out)
    distances = PixelDistances(train[0][:600], pixels, labels)
    own = distances.measure(pixels, labels)
    assert own == {"diversity": pytest.approx(1.0), "nearest_train_ratio": pytest.approx(1.0)}
    assert distances.measure(train[0][:300], labels)["nearest_train_ratio"] < 0.01
    assert distances.measure(pixels[:10].repeat(30, 1, 1, 1), labels)["diversity"] < 0.05


def test_undefined_pixel_distances_are_omitted(train, held_out):
    pixels, labels = (tensor[:100] for tensor in held_out)
    other = train[0][:100]
    assert set(PixelDistances(other, pixels, labels).measure(pixels[:3], torch.arange(3))) == {"nearest_train_ratio"}
    assert set(PixelDistances(pixels, pixels, labels).measure(other, labels)) == {"diversity"}


def test_large_images_are_averaged_for_pixel_distances():
    small = torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(downsample(small), small)
    assert torch.equal(downsample(small.repeat_interleave(4, 1).repeat_interleave(4, 2)), small)
