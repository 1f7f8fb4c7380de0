"""Compares the Frechet distance with torchmetrics' on one extractor's features: run with the path of a judge.

Prints one JSON object of figures.
"""

import json
import sys

import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from meanflow_core.metrics import FeatureStatistics, frechet_distance
from pipelines.demo import images
from pipelines.evaluate.extractors import open_extractor


class Pooled(torch.nn.Module):
    """An extractor as torchmetrics wants it: uint8 (B, 3, H, W) to features (B, num_features)."""

    num_features = 64

    def __init__(self, extractor):
        super().__init__()
        self._extractor = extractor

    def forward(self, pixels):
        """Pooled features."""
        return self._extractor(pixels.permute(0, 2, 3, 1)).pooled


def main() -> None:
    """The command."""
    extractor = open_extractor(sys.argv[1], None, "cpu")
    real = torch.from_numpy(images.draw_many("train", 0, 300)[0])
    noise = torch.randint(-40, 41, real.shape, generator=torch.Generator().manual_seed(0))
    worse = (torch.from_numpy(images.draw_many("val", 0, 300)[0]) + noise).clamp(0, 255).to(torch.uint8)
    metric = FrechetInceptionDistance(feature=Pooled(extractor))
    totals = []
    for pixels, is_real in ((real, True), (worse, False)):
        batches = pixels.split(100)
        for batch in batches:
            metric.update(batch.permute(0, 3, 1, 2), real=is_real)
        first, *rest = [FeatureStatistics.of(extractor(batch).pooled) for batch in batches]
        totals.append(sum(rest, first))
    ours, theirs = frechet_distance(*totals), float(metric.compute())
    print(json.dumps({"ours": ours, "theirs": theirs, "difference": abs(ours - theirs) / theirs}))


if __name__ == "__main__":
    main()
