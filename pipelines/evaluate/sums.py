"""Sums of features over images. The sums of all chunks add up to the sums of the whole set."""

from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from meanflow_core.metrics import FeatureStatistics, ScoreSums, merged

Sums = TypeVar("Sums", FeatureStatistics, ScoreSums)

NUM_GROUPS = 20  # jackknife groups; the relative uncertainty of the standard error is then 1/6
NUM_SPLITS = 10  # splits of the Inception Score, the standard number


@dataclass
class SetSums:
    """Sums over a chunk or a whole set of images, with the features and images kept from it."""

    set_name: str
    groups: dict[int, FeatureStatistics] = field(default_factory=dict)
    """Feature statistics by jackknife group."""
    scores: dict[int, ScoreSums] = field(default_factory=dict)
    """Inception Score sums by group. Empty if the extractor has no logits."""
    spatial: FeatureStatistics | None = None
    """Statistics of the spatial features. None if the extractor has none."""
    num_correct: int | None = None
    """Images that the extractor classified correctly. None if its logits are not for the data set's classes."""
    features: list[torch.Tensor] = field(default_factory=list)
    """Kept features, (n, D) each."""
    feature_labels: list[torch.Tensor] = field(default_factory=list)
    """Labels of the kept features, int64 (n,) each. Empty if the images have none."""
    feature_rows: list[torch.Tensor] = field(default_factory=list)
    """Rows of the kept features' images in their source's index, int64 (n,) each. Empty if the images are not files."""
    images: list[torch.Tensor] = field(default_factory=list)
    """Kept images, uint8 (n, H, W, 3) each."""
    labels: list[torch.Tensor] = field(default_factory=list)
    """Labels of the kept images, int64 (n,) each."""
    seconds: float = 0.0
    """Time spent in the network and the decoder."""
    num_images: int = 0
    num_unreadable: int = 0

    def add(self, chunk: "SetSums") -> None:
        """Adds the sums of the next chunk."""
        for group, statistics in chunk.groups.items():
            _add_to(self.groups, group, statistics)
        for group, score in chunk.scores.items():
            _add_to(self.scores, group, score)
        if chunk.spatial is not None:
            self.spatial = chunk.spatial if self.spatial is None else self.spatial + chunk.spatial
        if chunk.num_correct is not None:
            self.num_correct = chunk.num_correct + (self.num_correct or 0)
        self.features += chunk.features
        self.feature_labels += chunk.feature_labels
        self.feature_rows += chunk.feature_rows
        self.images += chunk.images
        self.labels += chunk.labels
        self.seconds += chunk.seconds
        self.num_images += chunk.num_images
        self.num_unreadable += chunk.num_unreadable

    def split(self) -> tuple["SetSums", "SetSums"]:
        """The counts with the kept features and images, and the sums of the features."""
        sums = SetSums(self.set_name, groups=self.groups, scores=self.scores, spatial=self.spatial)
        return replace(self, groups={}, scores={}, spatial=None), sums

    @property
    def statistics(self) -> FeatureStatistics:
        """Feature statistics of the whole set."""
        return merged([self.groups[group] for group in sorted(self.groups)])

    @property
    def splits(self) -> list[ScoreSums]:
        """Inception Score sums of NUM_SPLITS consecutive parts; fewer if there are fewer groups."""
        per_split: dict[int, ScoreSums] = {}
        for group in sorted(self.scores):
            _add_to(per_split, group * NUM_SPLITS // NUM_GROUPS, self.scores[group])
        return list(per_split.values())


def _add_to(sums: dict[int, Sums], key: int, part: Sums) -> None:
    sums[key] = sums[key] + part if key in sums else part


def add_sums(*parts: SetSums) -> SetSums:
    """The sums of consecutive parts of a set."""
    total = SetSums(parts[0].set_name)
    for part in parts:
        total.add(part)
    return total
