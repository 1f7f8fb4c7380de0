"""Statistics of features that can be merged across workers, and distances between them.

N samples, D features, P pixels. All sums are float64: the order of merging changes results by rounding alone.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, sum and sum of outer products of feature vectors: what a mean and a covariance need, and addable."""

    count: int
    """N."""
    total: torch.Tensor
    """(D,) float64: sum of the features."""
    outer: torch.Tensor
    """(D, D) float64: sum of f f^T."""

    @classmethod
    def of(cls, features: torch.Tensor) -> "FeatureStatistics":
        """The statistics of features (N, D), any float dtype. Raises ValueError for another shape or non-finite values."""
        if features.dim() != 2:
            raise ValueError(f"features must have shape (N, D), but got {tuple(features.shape)}")
        if not bool(torch.isfinite(features).all()):
            raise ValueError("features must be finite")
        values = features.double()
        return cls(len(values), values.sum(dim=0), values.T @ values)

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        return FeatureStatistics(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> torch.Tensor:
        """(D,) float64."""
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """(D, D) float64, unbiased (over N - 1), as the field's FID implementations have it."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, but got {self.count}")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Frechet distance between the Gaussians of two sets of features.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the last trace by the eigenvalues of S1^(1/2) S2 S1^(1/2), which is
    symmetric: no general matrix square root is needed. Source: Dowson and Landau 1982; Heusel et al. 2017.
    """
    s1, s2 = first.covariance, second.covariance
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ s2 @ root
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    difference = first.mean - second.mean
    return float(difference @ difference + s1.trace() + s2.trace() - 2.0 * trace_root)


def mean_pairwise_distance(vectors: torch.Tensor) -> float:
    """Mean Euclidean distance over all unordered pairs of rows (N, P), N >= 2."""
    if len(vectors) < 2:
        raise ValueError(f"a pairwise distance needs at least 2 rows, but got {len(vectors)}")
    return float(torch.pdist(vectors.float()).double().mean())


def mean_within_class_distance(images: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over classes of the mean pairwise Euclidean pixel distance: images (N, ...) in any dtype, labels (N,)."""
    flat = images.flatten(1).float()
    return sum(mean_pairwise_distance(flat[labels == label]) for label in labels.unique()) / len(labels.unique())


def nearest_distances(queries: torch.Tensor, references: torch.Tensor, chunk: int = 256) -> torch.Tensor:
    """For each query (N, P) the Euclidean distance to its nearest reference (M, P): float32 (N,)."""
    # cdist multiplies matrices: a difference of large squares, which in float32 leaves copies apart.
    wanted = references.double()
    return torch.cat([torch.cdist(rows.double(), wanted).amin(dim=1) for rows in queries.split(chunk)]).float()


def peak_signal_to_noise(images: torch.Tensor, reference: torch.Tensor, peak: float = 255.0) -> float:
    """PSNR in dB over all values of two tensors of one shape, of range `peak`: 255 for uint8. Infinite where they agree.

    Raises ValueError where the shapes differ.
    """
    if images.shape != reference.shape:
        raise ValueError(
            f"images must have the reference's shape {tuple(reference.shape)}, but got {tuple(images.shape)}"
        )
    return float(10.0 * torch.log10(peak**2 / (images.double() - reference.double()).square().mean()))
