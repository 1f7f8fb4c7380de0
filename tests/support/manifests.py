"""A small dataset's manifest, for the tests that need one without encoding anything."""

from pipelines.latents.manifest import EncodingRecipe, Manifest


def make_manifest(
    shard_rows: list[int],
    moments_shape: tuple[int, int, int],
    image_size: int,
    mirrored: bool = True,
    hashes: list[str] | None = None,
) -> Manifest:
    """Of the given rows per shard, with hashes that belong to nothing unless given."""
    recipe = EncodingRecipe(
        vae_id="some/vae",
        vae_sha256="0" * 64,
        moments_shape=moments_shape,
        image_size=image_size,
        crop="adm_center_crop",
        source_sha256="1" * 64,
        rows_per_shard=shard_rows[0],
        mirrored=mirrored,
    )
    return Manifest(
        recipe=recipe,
        num_samples=sum(shard_rows),
        num_rejected=0,
        shard_rows=shard_rows,
        shard_sha256=hashes or ["0" * 64] * len(shard_rows),
        class_names=["a", "b"],
        wnids=["a", "b"],
        source="here",
    )
