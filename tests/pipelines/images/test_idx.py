"""IDX files: MNIST and its relatives."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import InputError
from pipelines.images.decoding import decode_images
from pipelines.images.sources import ImageSlice, find_images
from tests.support.image_formats import IDX_LABELS, IDX_PIXELS, write_idx


@pytest.mark.parametrize("compressed", [False, True])
def test_images_and_labels_are_read_exactly_and_in_order(tmp_path: Path, compressed: bool) -> None:
    write_idx(tmp_path, compressed=compressed)
    filesystem, listing, index = find_images(str(tmp_path))
    assert index.entries["label"].to_pylist() == IDX_LABELS.tolist()
    assert index.entries["sample_id"].to_pylist()[:2] == ["train:0", "train:1"]
    rows = np.array([1, 2, 5])  # not the first, and with a gap
    contents = list(ImageSlice.of(filesystem, listing, index, rows).read())
    for content, row in zip(contents, rows, strict=True):
        assert isinstance(content, bytes)
        with Image.open(io.BytesIO(content)) as image:
            assert image.mode == "L"
            np.testing.assert_array_equal(np.array(image), IDX_PIXELS[row])
    for decoded, row in zip(decode_images(ImageSlice.of(filesystem, listing, index, rows), 20), rows, strict=True):
        np.testing.assert_array_equal(decoded, np.repeat(IDX_PIXELS[row][:, 4:-4, None], 3, axis=2))


def test_classes_are_named_by_a_file_or_by_their_ids(tmp_path: Path) -> None:
    write_idx(tmp_path)
    assert find_images(str(tmp_path))[2].class_names == ["0", "1", "2", "3"]
    (tmp_path / "class_names.txt").write_text("T-shirt\nTrouser\nPullover\nDress\n")
    assert find_images(str(tmp_path))[2].class_names == ["T-shirt", "Trouser", "Pullover", "Dress"]
    (tmp_path / "class_names.txt").write_text("T-shirt\nTrouser\n")
    with pytest.raises(InputError, match="labels up to 3, but names only 2 classes"):
        find_images(str(tmp_path))


def test_a_split_is_selected_by_a_pattern(tmp_path: Path) -> None:
    write_idx(tmp_path)
    write_idx(tmp_path, "t10k")
    with pytest.raises(InputError, match=r"several sets of images.*select the files of one: .*/t10k-\*"):
        find_images(str(tmp_path))
    assert len(find_images(f"{tmp_path}/train-*")[2]) == len(IDX_LABELS)


def test_ambiguous_files_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path)
    with pytest.raises(InputError, match="is half of a pair; name images and labels by a pattern"):
        find_images(f"{tmp_path}/train-images-idx3-ubyte")
    write_idx(tmp_path, compressed=True)
    with pytest.raises(InputError, match="contains train-images-idx3-ubyte both packed and unpacked"):
        find_images(str(tmp_path))


@pytest.mark.parametrize("names", ["a\n\nb\nc\n", "a\nb\na\nc\n"])
def test_class_names_must_be_different_and_on_consecutive_lines(tmp_path: Path, names: str) -> None:
    write_idx(tmp_path)
    (tmp_path / "class_names.txt").write_text(names)
    with pytest.raises(InputError, match="must have a different name on each line"):
        find_images(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda content: content[:-1], "its header announces 4496 bytes, but it has 4495"),
        ("train-images-idx3-ubyte", lambda content: content[:9], "less than the header"),
        ("train-labels-idx1-ubyte", lambda content: content[:-1], "its header announces 16 bytes, but it has 15"),
        ("train-images-idx3-ubyte", lambda content: b"\0\0\x0d\3" + content[4:], "must begin with 0x00000803"),
        ("train-labels-idx1-ubyte", lambda _: struct.pack(">II", 0x801, 2) + b"\0\1", "8 images, but .* has 2 labels"),
        ("train-labels-idx1-ubyte", None, "not its labels train-labels-idx1-ubyte"),
        ("train-images-idx3-ubyte", None, "not its images train-images-idx3-ubyte"),
    ],
)
def test_damaged_and_missing_files_are_named(tmp_path: Path, name: str, change: object, message: str) -> None:
    write_idx(tmp_path)
    path = tmp_path / name
    if callable(change):
        path.write_bytes(change(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(InputError, match=message):
        find_images(str(tmp_path))


def test_a_compressed_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    write_idx(tmp_path, compressed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut short.*download it again"):
        find_images(str(tmp_path))
