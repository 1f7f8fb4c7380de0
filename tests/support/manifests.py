"""Makes manifests and small latent datasets without encoding images."""

from pathlib import Path

import numpy as np

from pipelines.latents.manifest import EncodingRecipe, Manifest, shard_name, write_manifest
from pipelines.latents.shards import read_shard_bytes, shard_bytes


def make_manifest(
    shard_num_samples: list[int],
    moments_shape: tuple[int, int, int],
    image_size: int,
    mirrored: bool = True,
    hashes: list[str] | None = None,
) -> Manifest:
    """A manifest with the given number of samples per shard. By default, all hashes are zeros."""
    recipe = EncodingRecipe(
        vae_id="some/vae",
        vae_sha256="0" * 64,
        moments_shape=moments_shape,
        image_size=image_size,
        crop="adm_center_crop",
        source_sha256="1" * 64,
        images_per_shard=shard_num_samples[0],
        mirrored=mirrored,
    )
    return Manifest(
        recipe=recipe,
        num_samples=sum(shard_num_samples),
        num_rejected=0,
        shard_num_samples=shard_num_samples,
        shard_sha256=hashes or ["0" * 64] * len(shard_num_samples),
        class_names=["a", "b"],
        wnids=["a", "b"],
        source="here",
    )


def write_dataset(root: Path, rows: tuple[int, ...] = (3, 3, 1), mirrored: bool = True) -> Path:
    """Writes a dataset of 8x2x2 moments without an autoencoder.

    Sample i has moments i, mirrored moments -i, label i % 2 and id "id<i>".
    """
    (root / "shards").mkdir(parents=True)
    hashes, start = [], 0
    for number, count in enumerate(rows):
        indices = np.arange(start, start + count)
        moments = indices.astype(np.float16)[:, None, None, None] + np.zeros((8, 2, 2), np.float16)
        ids = [f"id{index}" for index in indices]
        content = shard_bytes(moments, -moments if mirrored else None, indices % 2, ids, [])
        (root / shard_name(number)).write_bytes(content)
        hashes.append(read_shard_bytes(content, "").summary.sha256)
        start += count
    manifest = make_manifest(list(rows), moments_shape=(8, 2, 2), image_size=16, mirrored=mirrored, hashes=hashes)
    write_manifest(str(root), manifest)
    return root
