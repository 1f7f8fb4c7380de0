"""The Frechet loss against autograd in one process, finite differences and closed forms."""

import math

import pytest
import torch

from meanflow_core.frechet import DISTANCE_FLOOR, FrechetReference, RawMoments, loss_gradient
from meanflow_core.metrics import FeatureStatistics, Gaussian, frechet_distance

SHARE = 0.2
NUM_FEATURES = 6


def random_features(num_images, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(NUM_FEATURES, NUM_FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_images, NUM_FEATURES, generator=generator, dtype=torch.float64)
    return scale * noise @ mixing + torch.arange(NUM_FEATURES, dtype=torch.float64) / 3


def statistics(features):
    return FeatureStatistics.of(features)


REFERENCE_MOMENTS = statistics(random_features(200, 1))
REFERENCE = FrechetReference.of(REFERENCE_MOMENTS)
MOVING = RawMoments.of(statistics(random_features(300, 2, scale=1.5)))


def one_process_loss(features):
    """The loss as one formula of the batch's features, with a general matrix square root."""
    mean = (1 - SHARE) * MOVING.mean + SHARE * features.mean(dim=0)
    second = (1 - SHARE) * MOVING.second + SHARE * features.T @ features / len(features)
    covariance = second - torch.outer(mean, mean)
    product = torch.linalg.eigvals(covariance @ REFERENCE_MOMENTS.covariance).real.clamp(min=0)
    difference = mean - REFERENCE_MOMENTS.mean
    traces = covariance.trace() + REFERENCE_MOMENTS.covariance.trace()
    distance = difference @ difference + traces - 2 * product.sqrt().sum()
    return distance / (distance.detach() + DISTANCE_FLOOR), distance.detach()


def gradient_of(features):
    blended = MOVING.blended(RawMoments.of(statistics(features)), SHARE)
    return loss_gradient(blended, REFERENCE, SHARE, len(features))


def test_the_gradient_is_that_of_one_formula_in_float64():
    features = random_features(16, 3).requires_grad_()
    loss, distance = one_process_loss(features)
    loss.backward()
    gradient = gradient_of(features.detach())
    assert gradient.distance == pytest.approx(float(distance), rel=1e-9)
    torch.testing.assert_close(gradient.by_features(features.detach()), features.grad, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences():
    features, step = random_features(8, 4), 1e-5
    gradient = gradient_of(features)
    for row, column in ((0, 0), (3, 5), (7, 2)):
        ends = []
        for sign in (1, -1):
            moved = features.clone()
            moved[row, column] += sign * step
            ends.append(gradient_of(moved).distance)
        difference = (ends[0] - ends[1]) / (2 * step) / (gradient.distance + DISTANCE_FLOOR)
        assert float(gradient.by_features(features)[row, column]) == pytest.approx(difference, rel=1e-6)


def test_a_batch_in_parts_has_the_same_gradient():
    features = random_features(12, 5)
    parts = [statistics(part) for part in features.split(5)]
    blended = MOVING.blended(RawMoments.of(parts[0] + parts[1] + parts[2]), SHARE)
    gradient = loss_gradient(blended, REFERENCE, SHARE, len(features))
    whole = gradient_of(features)
    torch.testing.assert_close(gradient.slope, whole.slope, rtol=1e-12, atol=1e-15)
    in_parts = torch.cat([gradient.by_features(part) for part in features.split(5)])
    torch.testing.assert_close(in_parts, whole.by_features(features), rtol=1e-12, atol=1e-15)


def test_the_distance_of_gaussians_along_the_axes():
    """|m1 - m2|^2 + sum (s1 - s2)^2 for covariances diag(s^2)."""
    ours, theirs = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([1.5, 1.0, 0.5]).double()
    mean, reference_mean = torch.tensor([0.0, 1.0, -1.0]).double(), torch.tensor([0.5, 1.0, 1.0]).double()
    reference = FrechetReference.of(Gaussian(reference_mean, torch.diag(theirs**2)))
    moments = RawMoments(mean, torch.diag(ours**2) + torch.outer(mean, mean))
    gradient = loss_gradient(moments, reference, 1.0, 1)
    distance = float((mean - reference_mean).square().sum() + (ours - theirs).square().sum())
    assert gradient.distance == pytest.approx(distance, rel=1e-12)
    # d FD / d (s^2) = 1 - s_reference / s, and slope is twice the gradient by M, over FD + 0.01.
    expected = 2 * (1 - theirs / ours) / (distance + DISTANCE_FLOOR)
    torch.testing.assert_close(gradient.slope, torch.diag(expected), rtol=1e-10, atol=1e-12)


def test_the_distance_is_that_of_evaluations():
    moments = RawMoments.of(statistics(random_features(50, 6)))
    gaussian = Gaussian(moments.mean, moments.covariance)
    assert loss_gradient(moments, REFERENCE, 1.0, 1).distance == pytest.approx(
        frechet_distance(gaussian, REFERENCE_MOMENTS), rel=1e-12
    )


def test_directions_without_variance_have_a_finite_gradient():
    flat = Gaussian(
        torch.zeros(NUM_FEATURES).double(), torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]).double())
    )
    gradient = loss_gradient(MOVING, FrechetReference.of(flat), SHARE, 4)
    assert math.isfinite(gradient.distance)
    assert bool(torch.isfinite(gradient.slope).all())


def test_another_number_of_features_is_refused():
    with pytest.raises(ValueError, match="must have 6 features like the reference, but have 3"):
        loss_gradient(RawMoments.zeros(3), REFERENCE, SHARE, 4)
