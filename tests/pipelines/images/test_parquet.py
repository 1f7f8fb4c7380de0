import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import InputError
from pipelines.images.sources import ImageSlice, find_images
from tests.support.image_formats import write_parquet


def test_sample_without_a_path_is_named_by_file_and_row(tmp_path):
    write_parquet(tmp_path / "a.parquet", [("x/one.png", 0, b"1"), (None, 1, b"2")])
    assert find_images(str(tmp_path))[2].entries["sample_id"].to_pylist() == ["x/one", "a.parquet:1"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a.png", None, b"1"), ("b.png", 0, b"1")], "1 images of p.parquet have no label .*, such as a"),
        ([("a.png", 0, b"1"), ("b.png", -1, b"1")], "1 images of p.parquet have no label .*, such as b"),
        ([("a.png", 0, b"1"), ("a.jpg", 0, b"1")], "1 ids in .* belong to several images, such as a;"),
        ([], "its 1 files are empty"),
    ],
)
def test_incomplete_parquet_is_refused(tmp_path, rows, message):
    write_parquet(tmp_path / "p.parquet", rows)
    with pytest.raises(InputError, match=message):
        find_images(str(tmp_path))


def test_null_image_is_an_error_of_its_sample_only(tmp_path):
    write_parquet(tmp_path / "p.parquet", [("a.png", 0, None), ("b.png", 0, b"1")])
    first, second = ImageSlice.of(*find_images(str(tmp_path))).read()
    assert isinstance(first, ValueError)
    assert second == b"1"


def test_other_columns_are_refused_and_listed(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match="must have the columns image: struct<bytes, path>.*has text: string"):
        find_images(str(tmp_path))


def test_more_labels_than_class_names_are_refused(tmp_path):
    write_parquet(tmp_path / "p.parquet", [("a.png", 2, b"1")], names=["x", "y"])
    with pytest.raises(InputError, match="labels up to 2, but names only 2 classes"):
        find_images(str(tmp_path))
