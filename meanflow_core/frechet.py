"""The Frechet loss: trains a generator so that the moments of its images' features match those of real images.

    # B global batch, D features of an extractor

The features of one batch are too few for a covariance. So the loss takes moving moments, of which the current batch is a
small part, and only that part has a gradient:

    m = b m_moving + (1 - b) mean(a),  M = b M_moving + (1 - b) mean(a a^T),  loss = FD / (stop_gradient(FD) + 0.01)

with FD the Frechet distance between N(m, M - m m^T) and the reference. m and M are sums over images. So the gradient by one
image's features depends on the other images through m and M alone: `loss_gradient` computes it from the global moments, and
any worker can apply it to its own images, a few at a time. Source: Yang et al. 2026 (arXiv 2604.28190).
"""

from dataclasses import dataclass

import torch

from meanflow_core.metrics import FeatureStatistics, Moments

# Distances below this no longer have a larger weight. Source: fd_fid_norm_eps in the authors' code.
DISTANCE_FLOOR = 0.01


@dataclass(frozen=True)
class FrechetReference:
    """The moments of real images, prepared for distances to them."""

    mean: torch.Tensor
    """(D,) float64."""
    root: torch.Tensor
    """(D, D) float64: square root of the covariance."""
    trace: torch.Tensor
    """Scalar float64: trace of the covariance."""

    @classmethod
    def of(cls, moments: Moments, device: torch.device | str = "cpu") -> "FrechetReference":
        """Prepares moments, on `device`."""
        covariance = moments.covariance.to(device)
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        return cls(moments.mean.to(device), root, covariance.trace())

    def distance(self, moments: Moments) -> float:
        """The Frechet distance of moments, on the reference's device, to the reference."""
        return float(self._distance_and_spectrum(moments)[0])

    def _distance_and_spectrum(self, moments: Moments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The distance, and the eigenvalues (D,) and eigenvectors (D, D) of root covariance root."""
        if moments.mean.shape != self.mean.shape:
            raise ValueError(
                f"samples must have {len(self.mean)} features like the reference, but have {len(moments.mean)}"
            )
        product = self.root @ moments.covariance @ self.root
        values, vectors = torch.linalg.eigh((product + product.T) / 2)
        difference = moments.mean - self.mean
        traces = moments.covariance.trace() + self.trace
        distance = difference @ difference + traces - 2.0 * values.clamp(min=0).sqrt().sum()
        return distance, values, vectors


@dataclass(frozen=True)
class RawMoments:
    """Means over images of the features a and of their outer products. Unlike a covariance, these can be blended."""

    mean: torch.Tensor
    """(D,) float64: mean of a."""
    second: torch.Tensor
    """(D, D) float64: mean of a a^T."""

    @classmethod
    def zeros(cls, num_features: int, device: torch.device | str = "cpu") -> "RawMoments":
        """Moments of no images yet."""
        return cls(
            torch.zeros(num_features, dtype=torch.float64, device=device),
            torch.zeros(num_features, num_features, dtype=torch.float64, device=device),
        )

    @classmethod
    def of(cls, statistics: FeatureStatistics) -> "RawMoments":
        """The moments of these images."""
        return cls(statistics.total / statistics.count, statistics.outer / statistics.count)

    def blended(self, other: "RawMoments", share: float) -> "RawMoments":
        """(1 - share) self + share other."""
        return RawMoments(self.mean.lerp(other.mean, share), self.second.lerp(other.second, share))

    def copy_(self, other: "RawMoments") -> None:
        """Replaces the values in place."""
        self.mean.copy_(other.mean)
        self.second.copy_(other.second)

    @property
    def covariance(self) -> torch.Tensor:
        """(D, D) float64, divided by the number of images (not by one less)."""
        return self.second - torch.outer(self.mean, self.mean)


@dataclass(frozen=True)
class LossGradient:
    """The gradient of the loss by the features of each image of the current batch: offset + slope a."""

    distance: float
    """Frechet distance of the blended moments."""
    offset: torch.Tensor
    """(D,) float64."""
    slope: torch.Tensor
    """(D, D) float64, symmetric."""

    def by_features(self, features: torch.Tensor) -> torch.Tensor:
        """The gradient by features (b, D) of any float dtype, in that dtype."""
        return (self.offset + features.double() @ self.slope).to(features.dtype)


def loss_gradient(
    moments: RawMoments, reference: FrechetReference, batch_share: float, batch_size: int
) -> LossGradient:
    """The gradient of FD / (stop_gradient(FD) + 0.01) by the features of the batch's images.

    moments: blended, with the current batch. batch_share: the batch's share 1 - b in them. batch_size: images in the global
    batch. Raises ValueError if the numbers of features differ.
    """
    distance, values, vectors = reference._distance_and_spectrum(moments)
    roots = values.clamp(min=0).sqrt()
    # d tr(P^(1/2)) = tr(P^(-1/2) dP) / 2. Directions without variance have no such term: the loss then shrinks what the
    # reference does not have, and cannot grow what the samples do not have.
    is_positive = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    inverse_roots = torch.where(is_positive, 1.0 / torch.where(is_positive, roots, 1.0), 0.0)
    half = reference.root @ vectors
    by_covariance = torch.eye(len(values), dtype=torch.float64, device=values.device) - half * inverse_roots @ half.T
    by_mean = 2.0 * (moments.mean - reference.mean) - 2.0 * by_covariance @ moments.mean  # the covariance is M - m m^T
    scale = batch_share / batch_size / (distance.clamp(min=0.0) + DISTANCE_FLOOR)
    return LossGradient(float(distance), scale * by_mean, 2.0 * scale * by_covariance)
