import shutil

import pytest

from pipelines.errors import InputError
from pipelines.images.sources import ImageSlice, find_images


def test_class_ids_number_the_sorted_folders(image_root):
    _, listing, index = find_images(str(image_root / "train"))
    assert index.wnids == [f"d{label:07d}" for label in range(10)]
    assert index.class_names[8] == "star"
    assert len(index) == 60
    assert listing.files == sorted(listing.files)
    assert index.entries["sample_id"][0].as_py() == "d0000000/d0000000_0"
    labels = index.entries["label"].to_pylist()
    assert [index.wnids[label] for label in labels] == [path.split("/")[0] for path in listing.files]


def test_classes_are_named_after_their_folders_if_there_is_no_names_file(image_root, tmp_path):
    shutil.copytree(image_root / "val", tmp_path / "a" / "b" / "c" / "d" / "val")
    _, _, index = find_images(str(tmp_path / "a" / "b" / "c" / "d" / "val"))
    assert index.class_names == index.wnids


def test_empty_class_folder_is_refused_because_it_would_shift_the_ids(image_root, tmp_path):
    shutil.copytree(image_root / "val", tmp_path / "val")
    (tmp_path / "val/d0000003x").mkdir()
    (tmp_path / "val/.cache").mkdir()
    with pytest.raises(InputError, match="1 class folders in .* contain no images, such as d0000003x"):
        find_images(str(tmp_path / "val"))


def test_image_outside_a_class_folder_is_refused(tmp_path):
    (tmp_path / "1.jpg").touch()
    with pytest.raises(InputError, match=r"1 images without a class folder, such as 1\.jpg"):
        find_images(str(tmp_path))


def test_missing_or_changed_file_affects_only_its_own_image(image_root, tmp_path):
    shutil.copytree(image_root / "val", tmp_path / "val")
    filesystem, listing, index = find_images(str(tmp_path / "val"))
    (tmp_path / "val" / listing.files[3]).unlink()
    changed = tmp_path / "val" / listing.files[5]
    changed.write_bytes(changed.read_bytes() + b"1")
    contents = list(ImageSlice.of(filesystem, listing, index).read())
    assert str(contents[3]) == f"{listing.files[3]} is gone since the images were listed"
    assert f"{listing.files[5]} has changed since the images were listed: it has " in str(contents[5])
    assert [isinstance(content, bytes) for content in contents].count(True) == 38
