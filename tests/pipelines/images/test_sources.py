import io
import pickle
import shutil
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipelines.errors import InputError
from pipelines.images.sources import ENTRY, ImageIndex, ImageSlice, find_images, index_images, list_images
from tests.support.image_forms import as_samples, images_of, write_parquet, write_tar


@pytest.fixture(scope="module")
def forms(image_root, tmp_path_factory):
    """40 images as folders, as three Parquet files and as three tars."""
    root = tmp_path_factory.mktemp("forms")
    shutil.copytree(image_root / "val", root / "folders")
    images = images_of(root / "folders")
    for part, (start, stop) in enumerate(((0, 16), (16, 17), (17, 40))):
        write_parquet(
            root / f"parquet/train-{part:05d}-of-00003.parquet",
            [(name.split("/")[1], label, content) for name, label, content in images[start:stop]],
            names=[f"class {label}" for label in range(10)],
        )
        write_tar(root / f"webdataset/imagenet-train-{part:04d}.tar", as_samples(images[start:stop]))
    return root


@pytest.mark.parametrize("form", ["folders", "parquet", "webdataset"])
def test_form_is_told_by_looking_and_every_image_is_read_with_its_label(forms, form):
    filesystem, listing, index = find_images(str(forms / form))
    assert listing.format == form
    assert index.entries.schema == ENTRY
    wanted = images_of(forms / "folders")
    ids = [sample_id.split("/")[-1] for sample_id in index.entries["sample_id"].to_pylist()]
    assert ids == [name.split("/")[1].removesuffix(".JPEG") for name, _, _ in wanted]
    assert index.entries["label"].to_pylist() == [label for _, label, _ in wanted]
    assert list(ImageSlice.of(filesystem, listing, index).read()) == [content for _, _, content in wanted]
    # Any rows of it, over the edges of files and row groups.
    rows = np.array([0, 6, 7, 15, 16, 17, 25, 39])
    some = list(ImageSlice.of(filesystem, listing, index, rows).read())
    assert some == [wanted[row][2] for row in rows]


def test_form_may_be_named_and_several_forms_in_a_folder_must_be(forms, tmp_path):
    shutil.copytree(forms / "folders", tmp_path / "both")
    shutil.copy(forms / "parquet/train-00000-of-00003.parquet", tmp_path / "both")
    with pytest.raises(InputError, match="holds folders and parquet; name one by --format"):
        find_images(str(tmp_path / "both"))
    assert len(find_images(str(tmp_path / "both"), "parquet")[2]) == 16
    with pytest.raises(InputError, match="no webdataset in .*, but folders and parquet"):
        find_images(str(tmp_path / "both"), "webdataset")


def test_files_of_one_split_are_named_by_a_pattern(forms, tmp_path):
    shutil.copytree(forms / "parquet", tmp_path / "data")
    shutil.copy(tmp_path / "data/train-00000-of-00003.parquet", tmp_path / "data/validation-00000-of-00001.parquet")
    with pytest.raises(InputError, match=r"holds the splits train, validation; name the files of one: .*\*train\*"):
        find_images(str(tmp_path / "data"))
    assert len(find_images(str(tmp_path / "data/train-*.parquet"))[2]) == 40
    assert len(find_images(str(tmp_path / "data/validation-00000-of-00001.parquet"))[2]) == 16
    with pytest.raises(InputError, match="no images in"):
        find_images(str(tmp_path / "data/test-*.parquet"))


def test_identity_follows_the_files_and_an_index_of_others_is_not_taken(forms):
    (_, listing, index), (_, other, _) = find_images(str(forms / "parquet")), find_images(str(forms / "webdataset"))
    assert listing.sha256 != other.sha256
    content = index.to_bytes(listing.sha256)
    assert ImageIndex.from_bytes(content, listing.sha256) == index
    assert ImageIndex.from_bytes(content, other.sha256) is None
    assert ImageIndex.from_bytes(content[:-9], listing.sha256) is None


def test_class_names_come_from_the_schema_or_from_the_mapping_that_agrees_with_it(forms, tmp_path):
    assert find_images(str(forms / "parquet"))[2].class_names[3] == "class 3"
    assert find_images(str(forms / "parquet"))[2].wnids == [""] * 10
    assert find_images(str(forms / "webdataset"))[2].class_names == [str(label) for label in range(10)]

    for form in ("parquet", "webdataset"):
        shutil.copytree(forms / form, tmp_path / "data" / form)
    mapping = [f"n{9 - row:08d} class {9 - row}" for row in range(10)]  # in no order: its wnids have one
    (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(mapping) + "\n")
    for form in ("parquet", "webdataset"):
        index = find_images(str(tmp_path / "data" / form))[2]
        assert index.class_names == [f"class {label}" for label in range(10)]
        assert index.wnids == [f"n{label:08d}" for label in range(10)]
    (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(mapping[1:]) + "\n")
    assert find_images(str(tmp_path / "data/parquet"))[2].wnids == [""] * 10
    with pytest.raises(InputError, match=r"labels up to 9, but LOC_synset_mapping\.txt names 9 classes"):
        find_images(str(tmp_path / "data/webdataset"))


def test_parquet_rows_without_a_path_are_named_by_file_and_row(tmp_path):
    write_parquet(tmp_path / "a.parquet", [("x/one.png", 0, b"1"), (None, 1, b"2")])
    index = find_images(str(tmp_path))[2]
    assert index.entries["sample_id"].to_pylist() == ["x/one", "a.parquet:1"]


def test_samples_of_a_tar_are_keyed_up_to_the_first_dot(tmp_path):
    members = [("a/x.1.JPG", b"no"), ("a/x.jpg", b"yes"), ("a/x.cls", b"4\n"), ("a/.x.jpg", b"hidden"), ("README", b"")]
    write_tar(tmp_path / "t.tar", members)
    filesystem, listing, index = find_images(str(tmp_path))
    assert index.entries["sample_id"].to_pylist() == ["a/x"]
    assert index.entries["label"].to_pylist() == [4]
    assert list(ImageSlice.of(filesystem, listing, index).read()) == [b"yes"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.jpg", b"1")], r"a in t\.tar has no label: wanted a\.cls with a number"),
        ([("a.jpg", b"1"), ("a.cls", b"cat")], r"a in t\.tar has no label"),
        ([("a.jpg", b"1"), ("a.cls", b"-1")], r"a in t\.tar has no label"),
        ([("a.jpg", b"1"), ("a.json", b"[3]")], r"a in t\.tar has no label"),
        ([("a.cls", b"1"), ("b.jpg", b"1"), ("b.cls", b"1")], r"a in t\.tar has a label and no image"),
        ([("a.jpg", b"1"), ("a.png", b"1"), ("a.cls", b"1")], r"a in t\.tar has two images"),
        ([("notes.txt", b"1")], "its 1 files are empty"),
    ],
)
def test_tars_that_miss_something_are_refused_with_the_sample(tmp_path, members, words):
    write_tar(tmp_path / "t.tar", members)
    with pytest.raises(InputError, match=words):
        find_images(str(tmp_path))


@pytest.mark.parametrize("scheme", ["", "memory://"])
@pytest.mark.parametrize("damage", ["within a file", "between files", "in a header", "at once"])
def test_torn_tars_are_refused_and_not_taken_for_short_ones(forms, tmp_path, damage, scheme):
    content = bytearray((forms / "webdataset/imagenet-train-0000.tar").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        member = tar.getmembers()[9]
    if damage == "in a header":
        content[member.offset + 150] ^= 1  # its checksum
    cuts = {"within a file": member.offset_data + 5, "between files": member.offset, "at once": 100}
    content = content[: cuts.get(damage)]
    if scheme:
        fsspec.filesystem("memory").pipe(f"{tmp_path}/t.tar", bytes(content))
    else:
        (tmp_path / "t.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"t\.tar is (no readable tar|torn or damaged at byte)"):
        find_images(f"{scheme}{tmp_path}")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("a.png", None, b"1"), ("b.png", 0, b"1")], "1 images of p.parquet have no label .*, such as a"),
        ([("a.png", 0, b"1"), ("b.png", -1, b"1")], "1 images of p.parquet have no label .*, such as b"),
        ([("a.png", 0, None), ("b.png", 0, b"1")], "1 rows of p.parquet have a label and no image"),
        ([("a.png", 0, b"1"), ("a.jpg", 0, b"1")], "1 ids in .* stand for several images, such as a;"),
        ([], "its 1 files are empty"),
    ],
)
def test_parquet_that_misses_something_is_refused(tmp_path, rows, words):
    write_parquet(tmp_path / "p.parquet", rows)
    with pytest.raises(InputError, match=words):
        find_images(str(tmp_path))


def test_parquet_of_something_else_is_refused_with_what_it_has(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(
        InputError, match=r"must have the columns image: struct<bytes, path> and label.*has text: string"
    ):
        find_images(str(tmp_path))


def test_more_labels_than_names_are_refused(tmp_path):
    write_parquet(tmp_path / "p.parquet", [("a.png", 2, b"1")], names=["x", "y"])
    with pytest.raises(InputError, match="labels up to 2, but names 2 classes"):
        find_images(str(tmp_path))


def test_one_id_in_two_tars_is_refused(tmp_path):
    for part in "ab":
        write_tar(tmp_path / f"{part}.tar", [("k.jpg", b"1"), ("k.cls", b"1")])
    with pytest.raises(InputError, match="1 ids in .* stand for several images, such as k;"):
        find_images(str(tmp_path))


def test_class_folder_without_images_is_refused_since_it_would_shift_the_ids(image_root, tmp_path):
    shutil.copytree(image_root / "val", tmp_path / "val")
    (tmp_path / "val/d0000003x").mkdir()
    (tmp_path / "val/.cache").mkdir()
    with pytest.raises(InputError, match="1 class folders in .* hold no images, such as d0000003x"):
        find_images(str(tmp_path / "val"))


def test_index_is_the_same_however_its_files_are_spread(forms):
    filesystem, listing = list_images(str(forms / "webdataset"))

    def backwards(function, items):
        return [function(item) for item in items[::-1]][::-1]

    assert index_images(filesystem, listing, backwards) == index_images(filesystem, listing)


def test_tar_is_indexed_the_same_from_storage_that_cannot_seek(forms):
    memory = fsspec.filesystem("memory")
    memory.put(str(forms / "webdataset"), "/webdataset", recursive=True)
    filesystem, listing, index = find_images("memory://webdataset")
    local_filesystem, local, local_index = find_images(str(forms / "webdataset"))
    assert index == local_index
    assert list(ImageSlice.of(filesystem, listing, index).read()) == list(
        ImageSlice.of(local_filesystem, local, local_index).read()
    )


def test_slice_carries_its_own_rows_alone(forms):
    filesystem, listing, index = find_images(str(forms / "folders"))
    many = ImageIndex(pa.concat_tables([index.entries] * 200), index.class_names, index.wnids)
    small = pickle.dumps(ImageSlice.of(filesystem, listing, many, np.arange(8000 - 4, 8000)))
    assert len(small) < 4000
    assert pc.sum(pickle.loads(small).entries["size"]).as_py() == sum(listing.sizes[-4:])


def test_folder_with_a_missing_file_says_so_for_that_image_alone(forms, tmp_path):
    shutil.copytree(forms / "folders", tmp_path / "val")
    filesystem, listing, index = find_images(str(tmp_path / "val"))
    (tmp_path / "val" / listing.files[3]).unlink()
    read = list(ImageSlice.of(filesystem, listing, index).read())
    assert isinstance(read[3], FileNotFoundError)
    assert [isinstance(content, bytes) for content in read].count(True) == 39
