import os
import shutil
import sys
import threading
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.command_line import run_command
from pipelines.errors import InputError
from pipelines.latents import cache, cache_command
from pipelines.latents.cache import delete_copies, list_copies, open_latents
from pipelines.latents.manifest import MANIFEST, read_manifest, shard_name, write_manifest
from pipelines.latents.shards import read_shard_bytes, shard_bytes
from tests.support.manifests import write_dataset


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "latents")


@pytest.fixture
def copied(monkeypatch):
    """Numbers of the shards that were copied, in order."""
    numbers = []
    original = cache._checked_content

    def record(filesystem, path, manifest, number):
        numbers.append(number)
        return original(filesystem, path, manifest, number)

    monkeypatch.setattr(cache, "_checked_content", record)
    return numbers


def test_samples_are_read_in_any_order_and_mirrored_as_requested(dataset, tmp_path):
    latents = open_latents(str(dataset), str(tmp_path / "cache"))
    moments, labels = latents.read(np.array([6, 0, 3]), np.array([False, True, True]))
    assert moments[:, 0, 0, 0].tolist() == [6, 0, -3]
    assert labels.tolist() == [0, 0, 1]
    assert (moments.dtype, labels.dtype) == (np.float16, np.int64)
    assert len(latents) == 7


def test_shards_are_mapped_instead_of_read(dataset, tmp_path):
    before = pa.total_allocated_bytes()
    latents = open_latents(str(dataset), str(tmp_path / "cache"))
    assert not any(array.flags.owndata or array.flags.writeable for array in latents.moments)
    folder = next(path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    mapped = {Path(line.path).name for line in psutil.Process().memory_maps() if line.path.startswith(str(folder))}
    assert mapped == {f"shard-0000{number}.arrow" for number in range(3)}
    assert pa.total_allocated_bytes() - before < 1000


def test_concurrent_callers_share_one_copy(dataset, tmp_path, copied):
    threads = [threading.Thread(target=open_latents, args=(str(dataset), str(tmp_path / "cache"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    open_latents(str(dataset), str(tmp_path / "cache"))
    assert sorted(copied) == [0, 1, 2]


def test_interrupted_copy_resumes_with_the_missing_shards(dataset, tmp_path, copied, monkeypatch):
    write = storage.write_bytes

    def fail_at_shard_1(filesystem, path, content):
        if path.endswith(shard_name(1)):
            raise OSError(28, "No space left on device")
        write(filesystem, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", fail_at_shard_1)
        with pytest.raises(OSError, match="No space left"):
            open_latents(str(dataset), str(tmp_path / "cache"))
    [folder] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    (folder / "shards" / "shard-00001.arrow.0123.partial").write_bytes(b"half")
    copied.clear()
    assert len(open_latents(str(dataset), str(tmp_path / "cache"))) == 7
    assert 1 in copied
    assert 0 not in copied
    assert sorted(path.name for path in (folder / "shards").iterdir()) == [f"shard-0000{n}.arrow" for n in range(3)]


def test_copy_can_leave_out_mirror_images(dataset, tmp_path):
    latents = open_latents(str(dataset), str(tmp_path / "cache"), mirrored=False)
    assert latents.moments_mirrored is None
    assert latents.read(np.array([6, 2]), np.array([True, True]))[0][:, 0, 0, 0].tolist() == [6, 2]
    assert open_latents(str(dataset), str(tmp_path / "cache")).moments_mirrored is not None
    sizes = {copy.key: copy.num_bytes for copy in list_copies(tmp_path / "cache")}
    assert len(sizes) == 2
    assert all(key.endswith("-unmirrored") == (size == min(sizes.values())) for key, size in sizes.items())


def test_dataset_without_mirror_images_ignores_mirroring(tmp_path):
    dataset = write_dataset(tmp_path / "plain", mirrored=False)
    latents = open_latents(str(dataset), str(tmp_path / "cache"))
    assert latents.moments_mirrored is None
    assert latents.read(np.array([5]), np.array([True]))[0][0, 0, 0, 0] == 5


def test_mounted_dataset_can_be_mapped_without_a_copy(dataset, copied):
    latents = open_latents(str(dataset), "none")
    assert latents.read(np.array([4]), np.array([True]))[0][0, 0, 0, 0] == -4
    assert copied == []
    filesystem, root = storage.open_storage("memory://latents")
    storage.write_bytes(filesystem, f"{root}/{MANIFEST}", (dataset / MANIFEST).read_bytes())
    with pytest.raises(InputError, match="requires latents on mounted storage, but got memory://latents"):
        open_latents("memory://latents", "none")


def test_full_disk_is_reported_before_copying(dataset, tmp_path, copied, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**30))
    with pytest.raises(
        InputError, match=r"needs 0\.0 GB more, but .*cache has 1\.1 GB free; choose another --cache-dir"
    ):
        open_latents(str(dataset), str(tmp_path / "cache"))
    assert copied == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "shard-00001.arrow is missing; restore it"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "shard-00001.arrow is damaged"),
        (lambda path: shutil.copy(path.with_name("shard-00000.arrow"), path), "does not match the hash"),
    ],
    ids=["missing", "truncated", "another shard"],
)
def test_shard_that_does_not_match_the_manifest_is_refused(dataset, tmp_path, damage, message):
    damage(dataset / shard_name(1))
    with pytest.raises(
        InputError, match=f"{message}.*; otherwise delete it and manifest.json and run `meanflow encode` again"
    ):
        open_latents(str(dataset), str(tmp_path / "cache"))


def test_invalid_values_are_refused_even_if_the_hash_matches(dataset, tmp_path):
    moments = np.full((3, 8, 2, 2), np.nan, np.float16)
    content = shard_bytes(moments, moments, np.zeros(3), ["a", "b", "c"], [])
    (dataset / shard_name(1)).write_bytes(content)
    manifest = read_manifest(str(dataset))
    hashes = [*manifest.shard_sha256]
    hashes[1] = read_shard_bytes(content, "").summary.sha256
    write_manifest(str(dataset), replace(manifest, shard_sha256=hashes))
    with pytest.raises(InputError, match="moments of a are not finite"):
        open_latents(str(dataset), str(tmp_path / "cache"))


def test_copies_are_listed_and_deleted_by_key_and_age(dataset, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "cache"
    latents = open_latents(str(dataset), str(folder))
    open_latents(str(write_dataset(tmp_path / "other", rows=(2, 2))), str(folder))
    old, recent = (f"v3-{read_manifest(str(tmp_path / name)).content_sha256[:16]}" for name in ("latents", "other"))
    two_weeks_ago = time.time() - 14 * 86_400
    os.utime(folder / old / "used", (two_weeks_ago, two_weeks_ago))
    assert [copy.key for copy in list_copies(folder)] == [old, recent]
    with pytest.raises(InputError, match=f"no copy abc in .*; known: {old}, {recent}"):
        delete_copies(folder, ("abc",))
    arguments = ["latent_cache", "--cache-dir", str(folder), "--evict", "all", "--unused-days", "7"]
    monkeypatch.setattr(sys, "argv", arguments)
    run_command(cache_command.main)
    assert "1 copies, 0.00 GB; 1 evicted" in capsys.readouterr().out
    assert [copy.key for copy in list_copies(folder)] == [recent]
    assert (
        latents.read(np.array([6]), np.array([False]))[0][0, 0, 0, 0] == 6
    )  # mapped files stay readable after deletion
    delete_copies(folder, (recent,))
    assert list_copies(folder) == []


def test_missing_cache_folder_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["latent_cache", "--cache-dir", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stop:
        run_command(cache_command.main)
    assert stop.value.code == 2
