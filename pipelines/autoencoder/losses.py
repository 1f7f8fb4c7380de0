"""The autoencoder's loss: absolute error, distance in a frozen network's features, KL divergence."""

# B batch, C channels, H W size

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Features = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""Images float (B, 3, H, W) in [-1, 1] -> feature maps, each (B, C, H', W')."""

EPSILON = 1e-10  # of the squared norm of a feature vector; LPIPS's


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, averaged over all latent values; a scalar.

    mean, logvar: (B, C, H, W). Source: Kingma and Welling 2013, appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def perceptual_distance(features: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared distance of feature vectors of unit length, averaged over positions, images and maps; a scalar in [0, 4].

    features, targets: maps of one network, each (B, C, H, W). Source: Zhang et al. 2018 (LPIPS), Eq. 1 with all weights
    1. Raises ValueError for different numbers of maps, or none.
    """
    if len(features) != len(targets) or not features:
        raise ValueError(
            f"features and targets must have equally many maps, but got {len(features)} and {len(targets)}"
        )
    distances = [
        (_unit_vectors(x) - _unit_vectors(y)).square().sum(dim=1).mean() for x, y in zip(features, targets, strict=True)
    ]
    return torch.stack(distances).mean()


def _unit_vectors(feature_map: torch.Tensor) -> torch.Tensor:
    """Divides the vector of every position by its length; (B, C, H, W)."""
    # EPSILON, because the root of a sum of squares has no gradient at 0.
    return feature_map * (feature_map.square().sum(dim=1, keepdim=True) + EPSILON).rsqrt()


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The loss of a batch and its terms; scalars."""

    total: torch.Tensor
    """The weighted sum."""
    l1: torch.Tensor
    """Mean absolute error of pixels in [-1, 1]."""
    squared: torch.Tensor
    """Mean squared error, without a gradient: for the PSNR."""
    perceptual: torch.Tensor
    """`perceptual_distance`; 0 without a feature network."""
    kl: torch.Tensor
    """`kl_divergence`."""

    def terms(self) -> torch.Tensor:
        """All of them without a gradient, float32 (5,), in the order of `TERMS`."""
        return torch.stack([getattr(self, name).detach() for name in TERMS])


TERMS = ("total", "l1", "squared", "perceptual", "kl")


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """l1 + perceptual_weight * perceptual + kl_weight * kl."""

    kl_weight: float
    """Per latent value."""
    perceptual_weight: float = 0.0
    """0: the features are not computed."""
    features: Features | None = None
    """Frozen network; required for a perceptual weight above 0."""

    def __post_init__(self) -> None:
        if self.perceptual_weight > 0 and self.features is None:
            raise ValueError(f"perceptual_weight {self.perceptual_weight} requires a network of features")

    def __call__(
        self, images: torch.Tensor, reconstruction: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor
    ) -> Losses:
        """images, reconstruction: float32 (B, 3, H, W), nominally in [-1, 1]. mean, logvar: float32 (B, C, H', W')."""
        l1 = F.l1_loss(reconstruction, images)
        kl = kl_divergence(mean, logvar)
        perceptual = torch.zeros_like(l1)
        if self.features is not None and self.perceptual_weight > 0:
            with torch.no_grad():
                targets = self.features(images)
            perceptual = perceptual_distance(self.features(reconstruction), targets)
        return Losses(
            total=l1 + self.perceptual_weight * perceptual + self.kl_weight * kl,
            l1=l1,
            squared=(reconstruction.detach() - images).square().mean(),
            perceptual=perceptual,
            kl=kl,
        )
