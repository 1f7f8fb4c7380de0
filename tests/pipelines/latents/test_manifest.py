import json

import pytest

from pipelines.errors import InputError
from pipelines.latents.manifest import SCHEMA_VERSION, Manifest, read_manifest
from tests.support.manifests import make_manifest, write_dataset


def test_manifest_round_trips_through_json():
    manifest = make_manifest([3, 3, 1], moments_shape=(8, 2, 2), image_size=16)
    assert Manifest.from_json(manifest.to_json(), "here") == manifest
    assert manifest.latent_shape == (4, 2, 2)


def test_dataset_without_a_manifest_is_refused(tmp_path):
    dataset = write_dataset(tmp_path / "latents")
    (dataset / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no manifest\.json in .*; run `meanflow encode"):
        read_manifest(str(dataset))


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_other_schema_versions_are_refused(tmp_path, version):
    path = write_dataset(tmp_path / "latents") / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": version}))
    message = (
        f"schema version {version}, but this release reads version {SCHEMA_VERSION}; encode again into another folder"
    )
    with pytest.raises(InputError, match=message):
        read_manifest(str(tmp_path / "latents"))
