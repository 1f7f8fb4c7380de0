import math

import pytest
import torch

from meanflow_core.metrics import (
    FeatureStatistics,
    frechet_distance,
    mean_pairwise_distance,
    mean_within_class_distance,
    nearest_distances,
    peak_signal_to_noise,
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
    linalg = pytest.importorskip("scipy.linalg")
    mixing = normal(6, 3)
    first, second = FeatureStatistics.of(normal(400, 4) @ mixing), FeatureStatistics.of(normal(300, 5, mean=0.3))
    root = linalg.sqrtm((first.covariance @ second.covariance).numpy()).real
    difference = first.mean - second.mean
    expected = float(difference @ difference + (first.covariance + second.covariance).trace()) - 2 * root.trace()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)


def test_unfit_features_are_refused():
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        FeatureStatistics.of(torch.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        FeatureStatistics.of(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="at least 2"):
        _ = FeatureStatistics.of(torch.zeros(1, 2)).covariance


def test_pixel_distances_are_euclidean():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert mean_pairwise_distance(points) == pytest.approx(10 / 3)
    images = points.view(3, 1, 1, 2).to(torch.uint8)
    assert mean_within_class_distance(images, torch.tensor([0, 0, 0])) == pytest.approx(10 / 3)
    torch.testing.assert_close(nearest_distances(points, points[1:2]), torch.tensor([5.0, 0.0, 5.0]))


def test_psnr_of_a_known_error():
    black, grey = torch.zeros(2, 3, 3, 3, dtype=torch.uint8), torch.full((2, 3, 3, 3), 51, dtype=torch.uint8)
    assert peak_signal_to_noise(black, grey) == pytest.approx(20 * math.log10(5.0))
    assert peak_signal_to_noise(black / 255.0, grey / 255.0, peak=1.0) == pytest.approx(20 * math.log10(5.0))
    with pytest.raises(ValueError, match=r"the reference's shape \(3, 3, 3\)"):
        peak_signal_to_noise(black, grey[0])


def test_distance_of_fewer_samples_than_features_is_a_number():
    statistics = FeatureStatistics.of(normal(5, 1, size=12))  # rounding makes some eigenvalues negative
    assert frechet_distance(statistics, statistics) == pytest.approx(0.0, abs=1e-5)


def test_within_class_distance_is_the_mean_over_classes():
    points = torch.tensor([[0.0], [2.0], [10.0], [16.0], [13.0]])
    labels = torch.tensor([7, 7, 3, 3, 3])
    assert mean_within_class_distance(points, labels) == pytest.approx((2.0 + 4.0) / 2)


def test_one_row_has_no_pairwise_distance():
    with pytest.raises(ValueError, match="at least 2 rows, but got 1"):
        mean_pairwise_distance(torch.zeros(1, 3))


def test_a_copy_is_at_no_distance():
    images = torch.randint(256, (64, 3 * 64 * 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    near = images.float()
    near[:, 0] += 3.0
    assert torch.equal(nearest_distances(images, images), torch.zeros(64))
    torch.testing.assert_close(nearest_distances(near, images), torch.full((64,), 3.0))
