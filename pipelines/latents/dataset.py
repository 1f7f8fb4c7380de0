"""Random access to the samples of a latent dataset."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.latents.manifest import Manifest, shard_name
from pipelines.latents.shards import map_shard


@dataclass(frozen=True)
class LatentDataset:
    """Random access to samples through memory-mapped shards."""

    manifest: Manifest
    """Contents of the dataset."""
    moments: Sequence[np.ndarray]
    """float16 (n, 2C, H, W) of each shard: means, then standard deviations, of n latents; not normalized."""
    moments_mirrored: Sequence[np.ndarray] | None
    """Moments of the mirror images; None if they are absent or left out."""
    labels: np.ndarray
    """(N,) int32."""

    @classmethod
    def map(cls, folder: Path, manifest: Manifest, *, mirrored: bool = True) -> "LatentDataset":
        """Maps the shards in a local folder. Raises InputError for a damaged shard."""
        shards = [map_shard(folder / shard_name(number)) for number in range(manifest.num_shards)]
        moments_mirrored = [shard.moments_mirrored for shard in shards if shard.moments_mirrored is not None]
        return cls(
            manifest,
            [shard.moments for shard in shards],
            moments_mirrored if mirrored and manifest.recipe.mirrored else None,
            np.concatenate([shard.labels for shard in shards]),
        )

    def __len__(self) -> int:
        return self.manifest.num_samples

    @functools.cached_property
    def _shard_edges(self) -> np.ndarray:
        return np.cumsum([0, *self.manifest.shard_num_samples])

    def read(self, indices: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads samples by index.

        indices: int (B,). mirrored: bool (B,), True for the mirror image; ignored in a dataset without mirror images.
        Returns moments float16 (B, 2C, H, W) and labels int64 (B,).
        """
        shards = np.searchsorted(self._shard_edges, indices, side="right") - 1
        rows = indices - self._shard_edges[shards]
        moments = np.empty((len(indices), *self.manifest.recipe.moments_shape), dtype=np.float16)
        sources = (self.moments, self.moments if self.moments_mirrored is None else self.moments_mirrored)
        # One copy per sample: a sample is contiguous in its file, so numpy copies it at memory speed.
        samples = zip(moments, shards.tolist(), rows.tolist(), np.asarray(mirrored, dtype=int).tolist(), strict=True)
        for target, shard, row, is_mirrored in samples:
            target[...] = sources[is_mirrored][shard][row]
        return moments, self.labels[indices].astype(np.int64)
