import pytest
from pyarrow import fs

from pipelines import storage
from pipelines.errors import InputError


def test_a_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    filesystem, path = storage.open_storage(str(tmp_path / "a" / "b.bin"))
    storage.write_bytes(filesystem, path, b"first")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(filesystem, path, b"second")
    assert storage.read_bytes(filesystem, path) == b"first"


def test_locations_are_paths_or_uris(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filesystem, path = storage.open_storage("data")
    assert isinstance(filesystem, fs.LocalFileSystem)
    assert path == str(tmp_path / "data")
    assert storage.open_storage((tmp_path / "x").as_uri())[1] == str(tmp_path / "x")
    assert storage.is_local("data")
    assert storage.is_local("file:///data/x")
    assert storage.absolute("file:///data/x") == "/data/x"
    assert storage.absolute("s3://bucket/x") == "s3://bucket/x"
    with pytest.raises(InputError, match="cannot open nosuch://x"):
        storage.open_storage("nosuch://x")


def test_fsspec_opens_schemes_that_pyarrow_does_not_know():
    filesystem, root = storage.open_storage("memory://shelf/box/")
    assert root == "/shelf/box"
    storage.write_bytes(filesystem, f"{root}/a/one", b"1")
    storage.write_bytes(filesystem, f"{root}/a/one", b"2")
    reopened, _ = storage.require_folder("memory://shelf/box", "box")
    assert storage.read_bytes(reopened, f"{root}/a/one") == b"2"
    with pytest.raises(InputError, match="box memory://shelf/none does not exist"):
        storage.require_folder("memory://shelf/none", "box")


def test_temporary_files_of_a_killed_writer_are_deleted(tmp_path):
    (tmp_path / "x.0123.partial").write_bytes(b"half")
    (tmp_path / "x").write_bytes(b"whole")
    storage.delete_partial(fs.LocalFileSystem(), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
