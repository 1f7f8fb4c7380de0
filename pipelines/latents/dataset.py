"""Random access to the samples of a latent dataset."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass
from pipelines.latents.manifest import Manifest, shard_name
from pipelines.latents.shards import map_shard


@dataclass(frozen=True)
class LatentDataset:
    """Random access to a dataset's rows through memory-mapped shards."""

    manifest: Manifest
    """What it is."""
    moments: Sequence[np.ndarray]
    """Of every shard, float16 (n, 2C, H, W)."""
    moments_mirrored: Sequence[np.ndarray] | None
    """The same of the mirror images; None where they were not encoded, or are left out."""
    labels: np.ndarray
    """(N,) int32."""

    @classmethod
    def map(cls, folder: Path, manifest: Manifest, *, mirrored: bool = True) -> "LatentDataset":
        """Maps the shards below a local folder, which are of this schema version. Raises InputError for one that is none."""
        shards = [map_shard(folder / shard_name(number)) for number in range(len(manifest.shard_rows))]
        has_mirrored = mirrored and manifest.recipe.mirrored
        return cls(
            manifest,
            [shard.moments for shard in shards],
            [shard.moments_mirrored for shard in shards if shard.moments_mirrored is not None]
            if has_mirrored
            else None,
            np.concatenate([shard.labels for shard in shards]),
        )

    def __len__(self) -> int:
        return self.manifest.num_samples

    @functools.cached_property
    def _edges(self) -> np.ndarray:
        return np.cumsum([0, *self.manifest.shard_rows])

    def rows(self, indices: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Moments float16 (B, 2C, H, W), of the mirror image where `mirrored` (B,), and labels int64 (B,).

        Without mirror images nothing is mirrored.
        """
        shards = np.searchsorted(self._edges, indices, side="right") - 1
        offsets = indices - self._edges[shards]
        moments = np.empty((len(indices), *self.manifest.recipe.moments_shape), dtype=np.float16)
        of_kind = (self.moments, self.moments if self.moments_mirrored is None else self.moments_mirrored)
        # Row by row: every row is a run of bytes in a file of its own, and numpy copies it at the speed of memory.
        places = zip(moments, shards.tolist(), offsets.tolist(), np.asarray(mirrored, dtype=int).tolist(), strict=True)
        for target, shard, offset, is_mirrored in places:
            target[...] = of_kind[is_mirrored][shard][offset]
        return moments, self.labels[indices].astype(np.int64)
