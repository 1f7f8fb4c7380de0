import io
import tarfile

import fsspec
import numpy as np
import pytest

from pipelines.errors import InputError
from pipelines.images.sources import ImageSlice, find_images
from tests.support.counted_storage import count_storage
from tests.support.image_formats import write_tar


def test_samples_are_keyed_up_to_the_first_dot(tmp_path):
    members = [("a/x.1.JPG", b"no"), ("a/x.jpg", b"yes"), ("a/x.cls", b"4\n"), ("a/.x.jpg", b"hidden"), ("README", b"")]
    write_tar(tmp_path / "t.tar", members)
    filesystem, listing, index = find_images(str(tmp_path))
    assert index.entries["sample_id"].to_pylist() == ["a/x"]
    assert index.entries["label"].to_pylist() == [4]
    assert list(ImageSlice.of(filesystem, listing, index).read()) == [b"yes"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"1")], r"a in t\.tar has no label: add a\.cls with a number"),
        ([("a.jpg", b"1"), ("a.cls", b"cat")], r"a in t\.tar has no label"),
        ([("a.jpg", b"1"), ("a.cls", b"-1")], r"a in t\.tar has no label"),
        ([("a.jpg", b"1"), ("a.json", b"[3]")], r"a in t\.tar has no label"),
        ([("a.cls", b"1"), ("b.jpg", b"1"), ("b.cls", b"1")], r"a in t\.tar has a label but no image"),
        ([("a.jpg", b"1"), ("a.png", b"1"), ("a.cls", b"1")], r"a in t\.tar has two images"),
        ([("notes.txt", b"1")], "its 1 files are empty"),
    ],
)
def test_incomplete_samples_are_refused_and_named(tmp_path, members, message):
    write_tar(tmp_path / "t.tar", members)
    with pytest.raises(InputError, match=message):
        find_images(str(tmp_path))


@pytest.mark.parametrize("scheme", ["", "memory://"])
@pytest.mark.parametrize("damage", ["within a file", "between files", "in a header", "near the start"])
def test_truncated_or_damaged_tar_is_refused(tmp_path, damage, scheme):
    samples = [
        (f"{row}.{extension}", content)
        for row in range(8)
        for extension, content in (("jpg", b"x" * 600), ("cls", b"1"))
    ]
    write_tar(tmp_path / "whole/t.tar", samples)
    content = bytearray((tmp_path / "whole/t.tar").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        member = tar.getmembers()[8]
    if damage == "in a header":
        content[member.offset + 150] ^= 1  # its checksum
    cuts = {"within a file": member.offset_data + 5, "between files": member.offset, "near the start": 100}
    content = content[: cuts.get(damage)]  # a tar damaged in a header is not cut
    location = f"{scheme}{tmp_path}/damaged"
    filesystem = fsspec.filesystem("memory" if scheme else "file", auto_mkdir=True)
    filesystem.pipe(f"{tmp_path}/damaged/t.tar", bytes(content))
    with pytest.raises(InputError, match=r"t\.tar is (not a readable tar|truncated or damaged at byte)"):
        find_images(location)


def test_sparse_images_of_a_tar_are_read_without_what_lies_between(tmp_path, monkeypatch):
    images = [bytes([row]) * 300_000 for row in range(24)]
    members = [
        (f"{row}.{end}", content)
        for row, image in enumerate(images)
        for end, content in (("jpg", image), ("cls", b"0"))
    ]
    write_tar(tmp_path / "t.tar", members)
    counted = count_storage(monkeypatch)
    filesystem, listing, index = find_images(str(tmp_path))
    counted.num_bytes = counted.num_reads = 0
    rows = np.array([0, 1, 2, 9, 23])
    assert list(ImageSlice.of(filesystem, listing, index, rows).read()) == [images[row] for row in rows]
    assert 5 * 300_000 <= counted.num_bytes < 5 * 300_000 + 4096  # all, with the labels of neighbours
    assert counted.num_reads == 3  # neighbours in one request


def test_images_are_read_in_the_order_of_the_samples_not_of_the_tar(tmp_path):
    write_tar(tmp_path / "t.tar", [("a.cls", b"1"), ("b.jpg", b"second"), ("b.cls", b"1"), ("a.jpg", b"first")])
    assert list(ImageSlice.of(*find_images(str(tmp_path))).read()) == [b"first", b"second"]


def test_same_key_in_two_tars_is_refused(tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [("k.jpg", b"1"), ("k.cls", b"1")])
    with pytest.raises(InputError, match="1 ids in .* belong to several images, such as k;"):
        find_images(str(tmp_path))


def test_index_of_many_tars_has_one_chunk_per_column(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.jpg", b"1"), (f"{number}.cls", b"0")])
    _, _, index = find_images(str(tmp_path))
    # Slicing a table costs as much as it has chunks, and every shard slices the index.
    assert [column.num_chunks for column in index.entries.columns] == [1] * index.entries.num_columns


def test_object_store_gives_the_same_index_as_a_local_disk(tmp_path):
    write_tar(
        tmp_path / "t.tar", [("a.jpg", b"image"), ("a.cls", b"1"), ("b.jpg", b"other"), ("b.json", b'{"label": 0}')]
    )
    fsspec.filesystem("memory").put(str(tmp_path / "t.tar"), "/webdataset/t.tar")
    filesystem, listing, index = find_images("memory://webdataset")
    assert index == find_images(str(tmp_path))[2]
    assert list(ImageSlice.of(filesystem, listing, index).read()) == [b"image", b"other"]
