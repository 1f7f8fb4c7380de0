"""Reading from and writing to an object store: an S3 server on this machine."""

import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from pipelines import storage
from pipelines.check.job import CheckJob
from pipelines.check.run import check
from pipelines.encode.run import encode
from pipelines.errors import InputError
from pipelines.latents.cache import open_latents
from pipelines.latents.manifest import shard_name
from tests.support.image_formats import images_of, webdataset_members, write_tar
from tests.support.latents import assert_same, encode_job, encode_without_ray
from tests.support.object_store import s3_bucket


@pytest.fixture(scope="module")
def bucket():
    """The URI of an empty bucket."""
    with s3_bucket() as uri:
        yield uri


def upload(folder, uri):
    """Copies the files of a folder into the store."""
    filesystem, root = storage.open_storage(uri)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        storage.write_bytes(filesystem, f"{root}/{path.relative_to(folder)}", path.read_bytes())


@pytest.fixture(scope="module")
def local(image_root, tmp_path_factory):
    """The same images encoded on a local disk."""
    output = tmp_path_factory.mktemp("local") / "latents"
    encode_without_ray(encode_job(image_root / "val", output, limit=10))
    return output


@pytest.mark.parametrize("form", ["folders", "webdataset"])
def test_object_store_is_read_and_written_like_a_folder(bucket, image_root, tmp_path, local, form):
    if form == "folders":
        upload(image_root / "val", f"{bucket}/{form}/images")
    else:
        write_tar(tmp_path / "tars/train-0.tar", webdataset_members(images_of(image_root / "val")))
        upload(tmp_path / "tars", f"{bucket}/{form}/images")
    output = f"{bucket}/{form}/latents"
    manifest = encode_without_ray(encode_job(f"{bucket}/{form}/images", output, images_per_shard=4, limit=10))
    assert manifest.shard_num_samples == [4, 4, 2]
    latents = open_latents(output, str(tmp_path / "cache"))
    assert_same(output, local)
    filesystem, root = storage.open_storage(output)
    assert len(latents) == 10
    assert pq.read_table(f"{root}/rejected.parquet", filesystem=filesystem).num_rows == 0
    report = check(CheckJob(data=output, figure=tmp_path / "check.png", num_samples=1))
    assert report.problems == []

    # Only missing files are written again.
    filesystem.delete_file(f"{root}/manifest.json")
    filesystem.delete_file(f"{root}/{shard_name(1)}")
    before = filesystem.get_file_info(f"{root}/{shard_name(0)}").mtime
    assert encode_without_ray(encode_job(f"{bucket}/{form}/images", output, images_per_shard=4, limit=10)) == manifest
    assert filesystem.get_file_info(f"{root}/{shard_name(0)}").mtime == before


def test_object_store_is_listed_as_by_one_recursive_listing(bucket, tmp_path):
    for name in ("a/1", "a/b/2", "c/d/3", "4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    upload(tmp_path, f"{bucket}/listed")
    filesystem, root = storage.open_storage(f"{bucket}/listed")

    def described(infos):
        return sorted((info.path, info.type, info.size) for info in infos)

    expected = described(filesystem.get_file_info(fs.FileSelector(root, recursive=True)))
    assert described(storage.list_folder(filesystem, root)) == expected
    assert len(expected) == 4 + 4


def test_a_missing_bucket_is_an_input_error(bucket, tmp_path):
    with pytest.raises(InputError, match="s3://nosuch-bucket/x"):
        encode(encode_job("s3://nosuch-bucket/x", tmp_path / "latents"))
