"""Statistics, distances and scores against their definitions."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg

from meanflow_core.metrics import (
    FeatureStatistics,
    Gaussian,
    Manifold,
    ScoreSums,
    frechet_distance,
    frechet_distances,
    frechet_estimate,
    inception_score,
    mean_within_class_distance,
    nearest_distances,
    peak_signal_to_noise,
    precision_and_recall,
)


def normal(count, seed, mean=0.0, scale=1.0, size=6):
    generator = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(count, size, generator=generator, dtype=torch.float64)


def test_merged_statistics_equal_those_of_the_whole():
    features = normal(100, 0)
    whole = FeatureStatistics.of(features)
    merged = (
        FeatureStatistics.of(features[:7]) + FeatureStatistics.of(features[7:60]) + FeatureStatistics.of(features[60:])
    )
    assert merged.count == 100
    torch.testing.assert_close(merged.mean, features.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.covariance, torch.cov(features.T), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-10, atol=1e-12)


def test_distance_of_a_set_to_itself_is_zero():
    statistics = FeatureStatistics.of(normal(500, 1))
    assert frechet_distance(statistics, statistics) == pytest.approx(0.0, abs=1e-9)


def test_distance_between_diagonal_gaussians_has_its_closed_form():
    # Statistics given exactly: |m1 - m2|^2 + sum (s1 - s2)^2 for standard deviations s.
    def exact(mean, std):
        count = 1000
        covariance = torch.diag(std.square())
        outer = (count - 1) * covariance + count * torch.outer(mean, mean)
        return FeatureStatistics(count, count * mean, outer)

    m1, m2 = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    s1, s2 = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 0.0]).double()
    expected = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    assert frechet_distance(exact(m1, s1), exact(m2, s2)) == pytest.approx(expected, rel=1e-9)


def test_distance_agrees_with_a_general_matrix_square_root():
    mixing = normal(6, 3)
    first, second = FeatureStatistics.of(normal(400, 4) @ mixing), FeatureStatistics.of(normal(300, 5, mean=0.3))
    root = linalg.sqrtm((first.covariance @ second.covariance).numpy()).real
    difference = first.mean - second.mean
    expected = float(difference @ difference + (first.covariance + second.covariance).trace()) - 2 * root.trace()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)


def test_invalid_features_are_refused():
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        FeatureStatistics.of(torch.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        FeatureStatistics.of(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="at least 2"):
        _ = FeatureStatistics.of(torch.zeros(1, 2)).covariance


def test_pixel_distances_are_euclidean():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    images = points.view(3, 1, 1, 2).to(torch.uint8)
    assert mean_within_class_distance(images, torch.tensor([0, 0, 0])) == pytest.approx(10 / 3)
    torch.testing.assert_close(nearest_distances(points, points[1:2]), torch.tensor([5.0, 0.0, 5.0]))


def test_psnr_of_a_known_error():
    black, grey = torch.zeros(2, 3, 3, 3, dtype=torch.uint8), torch.full((2, 3, 3, 3), 51, dtype=torch.uint8)
    assert peak_signal_to_noise(black, grey) == pytest.approx(20 * math.log10(5.0))
    assert peak_signal_to_noise(black / 255.0, grey / 255.0, peak=1.0) == pytest.approx(20 * math.log10(5.0))
    with pytest.raises(ValueError, match=r"the reference's shape \(3, 3, 3\)"):
        peak_signal_to_noise(black, grey[0])


def test_distance_of_fewer_samples_than_features_is_finite():
    statistics = FeatureStatistics.of(normal(5, 1, size=12))  # rounding makes some eigenvalues negative
    assert frechet_distance(statistics, statistics) == pytest.approx(0.0, abs=1e-5)


def test_within_class_distance_is_the_mean_over_classes():
    points = torch.tensor([[0.0], [2.0], [10.0], [16.0], [13.0]])
    labels = torch.tensor([7, 7, 3, 3, 3])
    assert mean_within_class_distance(points, labels) == pytest.approx((2.0 + 4.0) / 2)
    labels[:2] = torch.tensor([1, 2])  # classes with one image each have no pair
    assert mean_within_class_distance(points, labels) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="at least one class must have 2 images, but none of 5 has"):
        mean_within_class_distance(points, torch.arange(5))


def test_nearest_distance_of_a_copy_is_zero():
    images = torch.randint(256, (64, 3 * 64 * 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    near = images.float()
    near[:, 0] += 3.0
    assert torch.equal(nearest_distances(images, images), torch.zeros(64))
    torch.testing.assert_close(nearest_distances(near, images), torch.full((64,), 3.0))


def test_statistics_minus_a_part_are_those_of_the_rest():
    features = normal(90, 6)
    whole, part, rest = (FeatureStatistics.of(rows) for rows in (features, features[:20], features[20:]))
    left = whole - part
    assert left.count == 70
    torch.testing.assert_close(left.mean, rest.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left.covariance, rest.covariance, rtol=1e-10, atol=1e-12)


def test_distance_to_moments_equals_the_distance_to_statistics():
    first, second = FeatureStatistics.of(normal(80, 7)), FeatureStatistics.of(normal(80, 8, mean=0.5))
    expected = frechet_distance(first, second)
    moments = Gaussian(second.mean, second.covariance)
    assert frechet_distance(first, moments) == expected
    assert frechet_distances([second, first], moments)[1] == expected
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="must have 6 features like the reference, but have 4"):
        frechet_distance(FeatureStatistics.of(normal(80, 7, size=4)), moments)


@pytest.mark.soak
def test_standard_error_covers_the_distances_of_other_samples():
    # A jackknife of 20 groups has 19 degrees of freedom, and 2.093 is the 97.5 % quantile of Student's t for them.
    size, num_samples, repeats = 8, 1000, 150
    reference = Gaussian(torch.full((size,), 0.3).double(), 1.5 * torch.eye(size, dtype=torch.float64))
    estimates = [
        frechet_estimate([FeatureStatistics.of(rows) for rows in samples.tensor_split(20)], reference)
        for samples in (normal(num_samples, 100 + seed, size=size) for seed in range(repeats))
    ]
    values = torch.tensor([estimate.value for estimate in estimates])
    errors = torch.tensor([estimate.standard_error for estimate in estimates])
    covered = ((values - values.mean()).abs() <= 2.093 * errors).double().mean()
    assert 0.90 <= covered <= 0.99
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.15)


def test_inception_score_matches_its_definition():
    logits = 3.0 * normal(60, 9, size=7)

    def score(rows):  # exp(E KL(p(y|x) || p(y))), term by term
        p = np.exp(rows.numpy()) / np.exp(rows.numpy()).sum(axis=1, keepdims=True)
        return math.exp(
            np.mean([sum(q * math.log(q / m) for q, m in zip(row, p.mean(axis=0), strict=True)) for row in p])
        )

    whole = ScoreSums.of(logits[:13]) + ScoreSums.of(logits[13:])
    assert whole.score == pytest.approx(score(logits), rel=1e-12)
    expected = [score(rows) for rows in logits.split(20)]
    mean, deviation = inception_score([ScoreSums.of(rows) for rows in logits.split(20)])
    assert (mean, deviation) == (pytest.approx(np.mean(expected)), pytest.approx(np.std(expected)))


def test_inception_score_lies_between_one_and_the_number_of_classes():
    sure = torch.eye(5).log().repeat(8, 1)  # probabilities of 0 and 1
    assert ScoreSums.of(sure).score == pytest.approx(5.0)
    assert ScoreSums.of(sure[:1].repeat(40, 1)).score == pytest.approx(1.0)


def test_precision_and_recall_match_their_definition():
    samples, reference = normal(70, 10, mean=0.4, size=3), normal(50, 11, size=3)

    def share_inside(points, manifold, k):
        def radius(index):
            return sorted((manifold[index] - other).norm().item() for other in manifold)[k]  # itself comes first

        radii = [radius(index) for index in range(len(manifold))]
        inside = [
            any((point - centre).norm().item() <= r for centre, r in zip(manifold, radii, strict=True))
            for point in points
        ]
        return sum(inside) / len(inside)

    for k in (1, 3):
        ours = precision_and_recall(Manifold.of(samples, k, chunk=16), Manifold.of(reference, k), chunk=16)
        expected = share_inside(samples, reference, k), share_inside(reference, samples, k)
        assert ours == pytest.approx(expected)
        assert 0.1 < expected[0] < 0.98


def test_precision_and_recall_of_equal_distant_and_collapsed_sets():
    points = normal(40, 12)
    manifold = Manifold.of(points)
    assert precision_and_recall(manifold, manifold) == (1.0, 1.0)
    assert precision_and_recall(manifold, Manifold.of(points + 100.0)) == (0.0, 0.0)
    one_mode = Manifold.of(points[:1] + 1e-3 * normal(40, 13))
    precision, recall = precision_and_recall(one_mode, manifold)
    assert precision == 1.0
    assert recall < 0.1
    with pytest.raises(ValueError, match="more than 3 points, but got 3"):
        Manifold.of(points[:3])


def test_jackknife_weights_groups_by_their_sizes():
    reference, parts = FeatureStatistics.of(normal(300, 7)), normal(120, 8, mean=0.4).split([10, 30, 80])
    value = frechet_distance(FeatureStatistics.of(torch.cat(parts)), reference)
    without = [
        frechet_distance(FeatureStatistics.of(torch.cat([*parts[:i], *parts[i + 1 :]])), reference) for i in range(3)
    ]
    # Busing et al.: theta_J = g theta - sum (1 - m_j / n) theta_(-j), variance = sum (p_j - theta_J)^2 / (h_j - 1) / g.
    centre = 3 * value - sum((1 - len(part) / 120) * distance for part, distance in zip(parts, without, strict=True))
    variance = 0.0
    for part, distance in zip(parts, without, strict=True):
        ratio = 120 / len(part)
        variance += (ratio * value - (ratio - 1) * distance - centre) ** 2 / (ratio - 1) / 3
    found = frechet_estimate([FeatureStatistics.of(part) for part in parts], reference)
    assert found.value == pytest.approx(value, rel=1e-9)
    assert found.standard_error == pytest.approx(variance**0.5, rel=1e-6)
    with pytest.raises(ValueError, match="at least 2 groups, but got 1"):
        frechet_estimate([reference], reference)
