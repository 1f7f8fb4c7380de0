"""Distances to the nearest training images in feature space: whether samples copy what the extractor sees.

N images, M training images, D features.
"""

import torch

from meanflow_core.metrics import nearest_distances

NUM_QUERIES = 1000  # samples of a set to search neighbours for, spread evenly over the kept features


class FeatureDistances:
    """Distances to the nearest training features, relative to those of held-out images."""

    def __init__(self, train: torch.Tensor, held_out: torch.Tensor) -> None:
        """train: (M, D); held_out: (N, D); any float dtype."""
        self._train = train
        self._held_out = self._median_nearest(held_out)

    def measure(self, features: torch.Tensor) -> dict[str, float]:
        """Metrics of features (N, D).

        nearest_train_feature_ratio: median distance to the nearest training feature, divided by that of held-out images.
        A value far below 1 indicates copies. It is omitted if the held-out images score 0.
        """
        if not self._held_out:
            return {}
        return {"nearest_train_feature_ratio": self._median_nearest(features) / self._held_out}

    def _median_nearest(self, features: torch.Tensor) -> float:
        count = min(len(features), NUM_QUERIES)
        chosen = features[torch.arange(count) * len(features) // count]
        return float(nearest_distances(chosen, self._train).median())


def nearest_indices(queries: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Index of the nearest reference (M, D) of each query (N, D) by Euclidean distance: int64 (N,)."""
    return torch.cdist(queries.double(), references.double()).argmin(dim=1)
