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
from pipelines.latents import cache
from pipelines.latents.cache import CacheJob, evict, list_copies, open_latents
from pipelines.latents.manifest import read_manifest, shard_name
from pipelines.latents.shards import read_shard_bytes, shard_bytes
from tests.support.manifests import make_manifest


def write_dataset(root, rows=(3, 3, 1), mirrored=True):
    """Rows 0, 1, 2... in shards: row i holds i in its moments and -i in its mirrored ones."""
    (root / "shards").mkdir(parents=True)
    hashes, start = [], 0
    for number, count in enumerate(rows):
        ids = np.arange(start, start + count)
        values = ids.astype(np.float16)[:, None, None, None] + np.zeros((8, 2, 2), np.float16)
        content = shard_bytes(values, -values if mirrored else None, ids % 2, [f"id{row}" for row in ids], [])
        (root / shard_name(number)).write_bytes(content)
        hashes.append(read_shard_bytes(content, "").summary.sha256)
        start += count
    manifest = make_manifest(list(rows), moments_shape=(8, 2, 2), image_size=16, mirrored=mirrored, hashes=hashes)
    (root / "manifest.json").write_text(manifest.to_json())
    return root


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "latents")


@pytest.fixture
def copies(monkeypatch):
    """The shards that are copied, by name."""
    copied = []
    original = cache._checked_shard

    def note(filesystem, path, manifest, number):
        copied.append(number)
        return original(filesystem, path, manifest, number)

    monkeypatch.setattr(cache, "_checked_shard", note)
    return copied


def test_rows_come_in_any_order_and_mirrored_where_asked(dataset, tmp_path):
    store = open_latents(str(dataset), str(tmp_path / "cache"))
    moments, labels = store.rows(np.array([6, 0, 3]), np.array([False, True, True]))
    assert moments[:, 0, 0, 0].tolist() == [6, 0, -3]
    assert labels.tolist() == [0, 0, 1]
    assert (moments.dtype, labels.dtype) == (np.float16, np.int64)
    assert len(store) == 7


def test_shards_are_mapped_and_not_read(dataset, tmp_path):
    before = pa.total_allocated_bytes()
    store = open_latents(str(dataset), str(tmp_path / "cache"))
    assert not any(array.flags.owndata or array.flags.writeable for array in store.moments)
    folder = next(path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    mapped = {Path(line.path).name for line in psutil.Process().memory_maps() if line.path.startswith(str(folder))}
    assert mapped == {f"shard-0000{number}.arrow" for number in range(3)}
    assert pa.total_allocated_bytes() - before < 1000


def test_copy_is_made_once_and_shared_by_all_who_ask_at_once(dataset, tmp_path, copies):
    threads = [threading.Thread(target=open_latents, args=(str(dataset), str(tmp_path / "cache"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    open_latents(str(dataset), str(tmp_path / "cache"))
    assert sorted(copies) == [0, 1, 2]


def test_copy_that_was_cut_short_goes_on_where_it_stopped(dataset, tmp_path, copies, monkeypatch):
    write = storage.write_bytes

    def full(filesystem, path, content):
        if path.endswith(shard_name(1)):
            raise OSError(28, "No space left on device")
        write(filesystem, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            open_latents(str(dataset), str(tmp_path / "cache"))
    [folder] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    (folder / "shards" / "shard-00001.arrow.0123.partial").write_bytes(b"half")
    copies.clear()
    assert len(open_latents(str(dataset), str(tmp_path / "cache"))) == 7
    assert 1 in copies
    assert 0 not in copies
    assert sorted(path.name for path in (folder / "shards").iterdir()) == [f"shard-0000{n}.arrow" for n in range(3)]


def test_mirror_images_may_be_left_out_of_the_copy(dataset, tmp_path):
    store = open_latents(str(dataset), str(tmp_path / "cache"), mirrored=False)
    assert store.moments_mirrored is None
    assert store.rows(np.array([6, 2]), np.array([True, True]))[0][:, 0, 0, 0].tolist() == [6, 2]
    whole = open_latents(str(dataset), str(tmp_path / "cache"))
    assert whole.moments_mirrored is not None
    sizes = {copy.key: copy.num_bytes for copy in list_copies(tmp_path / "cache")}
    assert len(sizes) == 2
    assert all(key.endswith("-unmirrored") == (size == min(sizes.values())) for key, size in sizes.items())


def test_dataset_without_mirror_images_is_copied_as_it_is(tmp_path):
    dataset = write_dataset(tmp_path / "plain", mirrored=False)
    store = open_latents(str(dataset), str(tmp_path / "cache"))
    assert store.moments_mirrored is None
    assert store.rows(np.array([5]), np.array([True]))[0][0, 0, 0, 0] == 5


def test_mounted_storage_may_be_mapped_where_it_lies(dataset, tmp_path, copies):
    store = open_latents(str(dataset), "none")
    assert store.rows(np.array([4]), np.array([True]))[0][0, 0, 0, 0] == -4
    assert copies == []
    with pytest.raises(InputError, match="is no mounted folder; name a folder on each node's own disk"):
        _none_of_an_object_store(dataset)


def _none_of_an_object_store(dataset):
    filesystem, root = storage.open_storage("memory://latents-of-cache")
    storage.write_bytes(filesystem, f"{root}/manifest.json", (dataset / "manifest.json").read_bytes())
    open_latents("memory://latents-of-cache", "none")


def test_disk_without_room_is_noticed_before_anything_is_copied(dataset, tmp_path, copies, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**30))
    with pytest.raises(InputError, match=r"needs 0\.0 GB more, but .*cache has 1\.1 GB free; name another --cache-dir"):
        open_latents(str(dataset), str(tmp_path / "cache"))
    assert copies == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "shard-00001.arrow is missing; put it back"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "shard-00001.arrow is damaged"),
        (lambda path: shutil.copy(path.with_name("shard-00002.arrow"), path), "has 1 rows, but its manifest says 3"),
        (lambda path: shutil.copy(path.with_name("shard-00000.arrow"), path), "is not what its manifest says"),
    ],
)
def test_shards_that_are_not_what_the_manifest_says_are_refused(dataset, tmp_path, damage, words):
    damage(dataset / shard_name(1))
    with pytest.raises(InputError, match=f"{words}.*; else delete it and manifest.json and run pipelines.encode again"):
        open_latents(str(dataset), str(tmp_path / "cache"))


def test_values_that_cannot_be_are_refused_though_the_manifest_has_them(dataset, tmp_path):
    moments = np.full((3, 8, 2, 2), np.nan, np.float16)
    content = shard_bytes(moments, moments, np.zeros(3), ["a", "b", "c"], [])
    (dataset / shard_name(1)).write_bytes(content)
    manifest = read_manifest(str(dataset))
    hashes = [*manifest.shard_sha256]
    hashes[1] = read_shard_bytes(content, "").summary.sha256
    (dataset / "manifest.json").write_text(replace(manifest, shard_sha256=hashes).to_json())
    with pytest.raises(InputError, match="moments of a are not finite"):
        open_latents(str(dataset), str(tmp_path / "cache"))


def test_other_content_has_another_copy(dataset, tmp_path):
    open_latents(str(dataset), str(tmp_path / "cache"))
    open_latents(str(write_dataset(tmp_path / "other", rows=(2, 2))), str(tmp_path / "cache"))
    assert len({copy.key for copy in list_copies(tmp_path / "cache")}) == 2


def test_copies_are_listed_and_evicted_by_key_and_by_age(dataset, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    store = open_latents(str(dataset), str(cache))
    open_latents(str(write_dataset(tmp_path / "other", rows=(2, 2))), str(cache))
    old, young = (read_manifest(str(tmp_path / name)).content_sha256[:16] for name in ("latents", "other"))
    weeks_ago = time.time() - 14 * 86_400
    os.utime(cache / old / "used", (weeks_ago, weeks_ago))
    assert [copy.key for copy in list_copies(cache)] == [old, young]
    assert evict(CacheJob(cache_dir=cache)) == []
    with pytest.raises(InputError, match=f"no copy abc in .*; there are: {old}, {young}"):
        evict(CacheJob(cache_dir=cache, evict=("abc",)))
    monkeypatch.setattr(
        sys, "argv", ["latent_cache", "--cache-dir", str(cache), "--evict", "all", "--unused-days", "7"]
    )
    run_command(cache.main)
    assert "1 copies, 0.00 GB; 1 evicted" in capsys.readouterr().out
    assert [copy.key for copy in list_copies(cache)] == [young]
    assert store.rows(np.array([6]), np.array([False]))[0][0, 0, 0, 0] == 6  # what is mapped stays
    evict(CacheJob(cache_dir=cache, evict=(young,)))
    assert list_copies(cache) == []


def test_cache_folder_that_is_not_there_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["latent_cache", "--cache-dir", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stop:
        run_command(cache.main)
    assert stop.value.code == 2
