import pickle
import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyarrow import fs

from pipelines import storage
from pipelines.errors import InputError
from pipelines.images.index import ENTRY_SCHEMA, ImageIndex
from pipelines.images.sampling import sample_images
from pipelines.images.sources import ImageSlice, find_images, index_images, list_images
from pipelines.images.stored import index_bytes, read_index_bytes
from tests.support.counted_storage import count_storage
from tests.support.image_formats import images_of, webdataset_members, write_parquet, write_tar

IMAGE_FILE_FORMATS = ("folders", "parquet", "webdataset")  # they contain files of any format; IDX contains pixels


@pytest.fixture(scope="module")
def sources(image_root, tmp_path_factory):
    """40 images as folders, as three Parquet files and as three tars."""
    root = tmp_path_factory.mktemp("sources")
    shutil.copytree(image_root / "val", root / "folders")
    images = images_of(root / "folders")
    for part, (start, stop) in enumerate(((0, 16), (16, 17), (17, 40))):
        write_parquet(
            root / f"parquet/train-{part:05d}-of-00003.parquet",
            [(name.split("/")[1], label, content) for name, label, content in images[start:stop]],
            names=[f"class {label}" for label in range(10)],
        )
        write_tar(root / f"webdataset/imagenet-train-{part:04d}.tar", webdataset_members(images[start:stop]))
    return root


@pytest.mark.parametrize("name", IMAGE_FILE_FORMATS)
def test_format_is_detected_and_every_image_is_read_with_its_label(sources, name):
    filesystem, listing, index = find_images(str(sources / name))
    assert listing.format == name
    assert index.entries.schema == ENTRY_SCHEMA
    expected = images_of(sources / "folders")
    ids = [sample_id.split("/")[-1] for sample_id in index.entries["sample_id"].to_pylist()]
    assert ids == [path.split("/")[1].removesuffix(".JPEG") for path, _, _ in expected]
    assert index.entries["label"].to_pylist() == [label for _, label, _ in expected]
    assert list(ImageSlice.of(filesystem, listing, index).read()) == [content for _, _, content in expected]
    rows = np.array([0, 6, 7, 15, 16, 17, 25, 39])  # across files and row groups
    assert list(ImageSlice.of(filesystem, listing, index, rows).read()) == [expected[row][2] for row in rows]


def test_folder_of_several_formats_requires_the_format_option(sources, tmp_path):
    shutil.copytree(sources / "folders", tmp_path / "both")
    shutil.copy(sources / "parquet/train-00000-of-00003.parquet", tmp_path / "both")
    with pytest.raises(InputError, match="contains folders and parquet; select one with --format"):
        find_images(str(tmp_path / "both"))
    assert len(find_images(str(tmp_path / "both"), "parquet")[2]) == 16
    with pytest.raises(InputError, match="no webdataset in .*, but folders and parquet"):
        find_images(str(tmp_path / "both"), "webdataset")


def test_files_of_one_split_are_selected_with_a_pattern(sources, tmp_path):
    shutil.copytree(sources / "parquet", tmp_path / "data")
    shutil.copy(tmp_path / "data/train-00000-of-00003.parquet", tmp_path / "data/validation-00000-of-00001.parquet")
    with pytest.raises(InputError, match=r"splits train, validation; select the files of one: .*/\*train\*\.parquet"):
        find_images(str(tmp_path / "data"))
    assert len(find_images(str(tmp_path / "data/train-*.parquet"))[2]) == 40
    assert len(find_images(str(tmp_path / "data/validation-00000-of-00001.parquet"))[2]) == 16
    with pytest.raises(InputError, match="no images in"):
        find_images(str(tmp_path / "data/test-*.parquet"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text("x"), "is a file, but must be a folder"),
        (lambda path: path.mkdir(), "no images in .*; expected class folders"),
        (
            lambda path: [(path / "a").mkdir(parents=True), (path / "a/1.jpg").touch(), (path / "a/1.png").touch()],
            "1 ids in .* belong to several images, such as a/1",
        ),
    ],
    ids=["missing", "file", "empty", "same stem"],
)
def test_invalid_location_is_refused(tmp_path, make, message):
    path = tmp_path / "images"
    make(path)
    with pytest.raises(InputError, match=message):
        find_images(str(path))


@pytest.mark.parametrize("name", IMAGE_FILE_FORMATS)
def test_stored_images_are_the_listing_and_the_chosen_images(sources, name):
    _, listing, index = find_images(str(sources / name))
    for images in (index, sample_images(index, 3)):
        assert read_index_bytes(index_bytes(listing, images), "here") == (listing, images)


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b""], ids=["truncated", "empty"])
def test_damaged_stored_index_is_refused(sources, damage):
    _, listing, index = find_images(str(sources / "folders"))
    with pytest.raises(InputError, match="latents/index.parquet is damaged or of another version"):
        read_index_bytes(damage(index_bytes(listing, index)), "latents/index.parquet")


def test_other_parquet_file_is_not_a_stored_index(sources):
    content = (sources / "parquet/train-00000-of-00003.parquet").read_bytes()
    with pytest.raises(InputError, match="damaged or of another version"):
        read_index_bytes(content, "index.parquet")


def test_object_store_is_listed_side_by_side_with_the_same_result(sources, monkeypatch):
    expected = list_images(str(sources / "folders"))[1]
    counted = count_storage(monkeypatch)
    root = str(sources / "folders")
    barrier, one_listing = threading.Barrier(10, timeout=10), counted.get_file_info_selector

    def listing_of_one_folder(selector):
        if selector.base_dir != root:
            barrier.wait()  # raises unless the ten class folders are listed at once
        return one_listing(selector)

    monkeypatch.setattr(counted, "get_file_info_selector", listing_of_one_folder)
    listing = list_images(root)[1]
    monkeypatch.setattr(counted, "get_file_info_selector", one_listing)
    assert listing == expected
    assert sorted(counted.listed) == [root, *(f"{root}/d{label:07d}" for label in range(10))]
    filesystem, _ = storage.open_storage(root)
    recursive = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    found = {info.path: (info.type, info.size) for info in storage.list_folder(filesystem, root)}
    assert found == {info.path: (info.type, info.size) for info in recursive}


@pytest.mark.parametrize("name", ["parquet", "webdataset"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "is gone since the images were listed"),
        (lambda path: path.write_bytes(path.read_bytes() + b"1"), "has changed since the images were listed"),
    ],
    ids=["gone", "changed"],
)
def test_packed_file_that_is_gone_or_has_changed_is_refused(sources, tmp_path, name, change, message):
    shutil.copytree(sources / name, tmp_path / name)
    filesystem, listing, index = find_images(str(tmp_path / name))
    change(tmp_path / name / listing.files[1])
    with pytest.raises(InputError, match=f"{listing.files[1]} {message}"):
        list(ImageSlice.of(filesystem, listing, index).read())


def test_hash_of_a_listing_changes_with_a_file_size(sources, tmp_path):
    shutil.copytree(sources / "folders", tmp_path / "folders")
    before = list_images(str(tmp_path / "folders"))[1]
    path = tmp_path / "folders" / before.files[0]
    path.write_bytes(path.read_bytes() + b"\0")
    assert list_images(str(tmp_path / "folders"))[1].sha256 != before.sha256


def test_class_names_come_from_the_files_and_wnids_from_a_mapping_that_agrees(sources, tmp_path):
    assert find_images(str(sources / "parquet"))[2].class_names[3] == "class 3"
    assert find_images(str(sources / "parquet"))[2].wnids == [""] * 10
    assert find_images(str(sources / "webdataset"))[2].class_names == [str(label) for label in range(10)]

    for name in ("parquet", "webdataset"):
        shutil.copytree(sources / name, tmp_path / "data" / name)
    lines = [f"n{9 - row:08d} class {9 - row}" for row in range(10)]  # not sorted by wnid
    (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(lines) + "\n")
    for name in ("parquet", "webdataset"):
        index = find_images(str(tmp_path / "data" / name))[2]
        assert index.class_names == [f"class {label}" for label in range(10)]
        assert index.wnids == [f"n{label:08d}" for label in range(10)]
    (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(lines[1:]) + "\n")
    assert find_images(str(tmp_path / "data/parquet"))[2].wnids == [""] * 10
    with pytest.raises(InputError, match="labels up to 9, but names only 9 classes"):
        find_images(str(tmp_path / "data/webdataset"))


def test_index_does_not_depend_on_the_order_in_which_files_are_read(sources):
    filesystem, listing = list_images(str(sources / "webdataset"))

    def backwards(function, items):
        return [function(item) for item in items[::-1]][::-1]

    assert index_images(filesystem, listing, backwards) == index_images(filesystem, listing)


def test_pickled_slice_contains_only_its_own_entries(sources):
    filesystem, listing, index = find_images(str(sources / "folders"))
    many = ImageIndex(pa.concat_tables([index.entries] * 200), index.class_names, index.wnids)
    small = pickle.dumps(ImageSlice.of(filesystem, listing, many, np.arange(8000 - 4, 8000)))
    assert len(small) < 4000
    assert pc.sum(pickle.loads(small).entries["size"]).as_py() == sum(listing.sizes[-4:])
