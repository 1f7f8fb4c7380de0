"""Feature statistics that can be merged across workers, and metrics: distances, scores, precision and recall.

    # N samples, D features, K classes, P pixels

All sums are float64, so the order of merging changes results only by rounding.
"""

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, sum and sum of outer products of feature vectors: they determine mean and covariance, and can be added."""

    count: int
    """N."""
    total: torch.Tensor
    """(D,) float64: sum of the features."""
    outer: torch.Tensor
    """(D, D) float64: sum of f f^T."""

    @classmethod
    def of(cls, features: torch.Tensor) -> "FeatureStatistics":
        """Computes the statistics of features (N, D), any float dtype. Raises ValueError for non-finite values."""
        if features.dim() != 2:
            raise ValueError(f"features must have shape (N, D), but got {tuple(features.shape)}")
        if not bool(torch.isfinite(features).all()):
            raise ValueError("features must be finite")
        values = features.double()
        return cls(len(values), values.sum(dim=0), values.T @ values)

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        return FeatureStatistics(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Removes a part from the statistics."""
        return FeatureStatistics(self.count - other.count, self.total - other.total, self.outer - other.outer)

    @property
    def mean(self) -> torch.Tensor:
        """(D,) float64."""
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """(D, D) float64, unbiased (divided by N - 1), as in common FID implementations."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, but got {self.count}")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set of features, for example from a reference file."""

    mean: torch.Tensor
    """(D,) float64."""
    covariance: torch.Tensor
    """(D, D) float64."""


class Moments(Protocol):
    """The interface that a Frechet distance requires; FeatureStatistics and Gaussian implement it."""

    @property
    def mean(self) -> torch.Tensor:
        """(D,) float64."""

    @property
    def covariance(self) -> torch.Tensor:
        """(D, D) float64."""


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared Frechet distance between the Gaussians of two sets of features.

    (m1 - m2)^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The last trace follows from the eigenvalues of the symmetric matrix
    S2^(1/2) S1 S2^(1/2), without a general matrix square root. With Inception's features it is FID. Raises ValueError if
    the numbers of features differ. Source: Dowson and Landau 1982; Heusel et al. 2017.
    """
    return frechet_distances([first], second)[0]


def frechet_distances(sets: Iterable[Moments], reference: Moments) -> list[float]:
    """The Frechet distance of each set to one reference, whose matrix square root is computed once."""
    covariance = reference.covariance
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    distances = []
    for moments in sets:
        if moments.mean.shape != reference.mean.shape:
            raise ValueError(
                f"samples must have {len(reference.mean)} features like the reference, but have {len(moments.mean)}"
            )
        product = root @ moments.covariance @ root
        trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
        difference = moments.mean - reference.mean
        traces = moments.covariance.trace() + covariance.trace()
        distances.append(float(difference @ difference + traces - 2.0 * trace_root))
    return distances


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error."""

    value: float
    """The value from all samples."""
    standard_error: float
    """Estimated standard deviation of the value between sets of this many samples, for a fixed reference."""


def frechet_estimate(groups: Sequence[FeatureStatistics], reference: Moments) -> Estimate:
    """The Frechet distance of all groups together, with its standard error from a delete-a-group jackknife.

    groups: disjoint parts of the samples, of any sizes. With 20 groups, the standard error itself is accurate to about
    16 %. It describes the variation between sets of N samples, not the distance's bias, which decreases with N. Raises
    ValueError for fewer than two groups. Source: Busing, Meijer and van der Leeden 1999, Eq. 5 (groups of any size).
    """
    if len(groups) < 2:
        raise ValueError(f"a jackknife needs at least 2 groups, but got {len(groups)}")
    whole = merged(groups)
    value, *without = frechet_distances([whole, *(whole - group for group in groups)], reference)
    ratios = [whole.count / group.count for group in groups]
    pseudovalues = [ratio * value - (ratio - 1.0) * distance for ratio, distance in zip(ratios, without, strict=True)]
    centre = sum(pseudovalue / ratio for pseudovalue, ratio in zip(pseudovalues, ratios, strict=True))
    squares = ((value - centre) ** 2 / (ratio - 1.0) for value, ratio in zip(pseudovalues, ratios, strict=True))
    return Estimate(value, (sum(squares) / len(groups)) ** 0.5)


def merged(parts: Sequence[FeatureStatistics]) -> FeatureStatistics:
    """The statistics of all parts together."""
    return functools.reduce(operator.add, parts)


@dataclass(frozen=True)
class ScoreSums:
    """Sums of class probabilities p (N, K): they determine the Inception Score, and can be added."""

    count: int
    """N."""
    total: torch.Tensor
    """(K,) float64: sum of p."""
    negative_entropy: float
    """Sum of p log p over samples and classes."""

    @classmethod
    def of(cls, logits: torch.Tensor) -> "ScoreSums":
        """Computes the sums of logits (N, K), any float dtype."""
        log_p = torch.log_softmax(logits.double(), dim=1)
        p = log_p.exp()
        # If a probability underflows to 0, its term is 0, although its logarithm may be minus infinity.
        return cls(len(p), p.sum(dim=0), float(torch.where(p > 0, p * log_p, 0.0).sum()))

    def __add__(self, other: "ScoreSums") -> "ScoreSums":
        return ScoreSums(
            self.count + other.count, self.total + other.total, self.negative_entropy + other.negative_entropy
        )

    @property
    def score(self) -> float:
        """exp of the mean KL divergence of the samples' probabilities from their mean, in [1, K]."""
        mean = self.total / self.count
        marginal = float(torch.special.xlogy(mean, mean).sum())
        return math.exp(self.negative_entropy / self.count - marginal)


def inception_score(splits: Sequence[ScoreSums]) -> tuple[float, float]:
    """Mean and standard deviation (with divisor N) of the splits' scores.

    Ten splits are usual; smaller splits have lower scores. With the 1,008 logits of Inception without bias it is the
    Inception Score. Source: Salimans et al. 2016.
    """
    scores = torch.tensor([split.score for split in splits], dtype=torch.float64)
    return float(scores.mean()), float(scores.std(correction=0))


@dataclass(frozen=True)
class Manifold:
    """A union of balls around points, each with the distance to the k-th nearest neighbour as radius."""

    points: torch.Tensor
    """(N, D) float64."""
    radii: torch.Tensor
    """(N,) float64."""

    @classmethod
    def of(cls, points: torch.Tensor, num_neighbours: int = 3, chunk: int = 1024) -> "Manifold":
        """Builds the manifold of points (N, D), any float dtype, with `chunk` rows of distances at a time.

        k = 3 as in ADM's evaluation. Raises ValueError for k points or fewer.
        """
        if len(points) <= num_neighbours:
            raise ValueError(f"a manifold must have more than {num_neighbours} points, but got {len(points)}")
        points = points.double()
        radii = [  # the nearest neighbour of a point is the point itself
            torch.cdist(rows, points).topk(num_neighbours + 1, dim=1, largest=False).values[:, -1]
            for rows in points.split(chunk)
        ]
        return cls(points, torch.cat(radii))


def precision_and_recall(samples: Manifold, reference: Manifold, chunk: int = 1024) -> tuple[float, float]:
    """Precision, the fraction of samples in the reference's manifold; recall, of reference points in the samples'.

    Computed in float64, with `chunk` rows of distances at a time. Source: Kynkaanniemi et al. 2019.
    """
    is_inside = []
    reference_covered = torch.zeros(len(reference.points), dtype=torch.bool, device=reference.points.device)
    for rows, radii in zip(samples.points.split(chunk), samples.radii.split(chunk), strict=True):
        distances = torch.cdist(rows, reference.points)
        is_inside.append((distances <= reference.radii).any(dim=1))
        reference_covered |= (distances <= radii[:, None]).any(dim=0)
    return float(torch.cat(is_inside).double().mean()), float(reference_covered.double().mean())


def mean_within_class_distance(images: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over classes of the mean pairwise Euclidean pixel distance; images (N, ...) of any dtype, labels (N,).

    Classes with one image are skipped. Raises ValueError if no class has two.
    """
    flat = images.flatten(1).float()
    classes, counts = labels.unique(return_counts=True)
    classes = classes[counts > 1]
    if len(classes) == 0:
        raise ValueError(f"at least one class must have 2 images, but none of {len(counts)} has")
    return float(sum(torch.pdist(flat[labels == label]).double().mean() for label in classes) / len(classes))


def nearest_distances(queries: torch.Tensor, references: torch.Tensor, chunk: int = 256) -> torch.Tensor:
    """Euclidean distance of each query (N, P) to its nearest reference (M, P), float32 (N,)."""
    # In float64, because cdist subtracts large squares, and in float32 a copy would not be at distance 0.
    points = references.double()
    return torch.cat([torch.cdist(rows.double(), points).amin(dim=1) for rows in queries.split(chunk)]).float()


def peak_signal_to_noise(images: torch.Tensor, reference: torch.Tensor, peak: float = 255.0) -> float:
    """PSNR in dB over all values of two tensors with range `peak` (255 for uint8); infinite if they are equal.

    Raises ValueError if the shapes differ.
    """
    if images.shape != reference.shape:
        raise ValueError(
            f"images must have the reference's shape {tuple(reference.shape)}, but got {tuple(images.shape)}"
        )
    return float(10.0 * torch.log10(peak**2 / (images.double() - reference.double()).square().mean()))
