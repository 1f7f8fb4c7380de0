import pytest
from pyarrow import fs

from pipelines import storage
from pipelines.command import InputError


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    filesystem, path = storage.open_storage(str(tmp_path / "a" / "b.bin"))
    storage.write_bytes(filesystem, path, b"first")

    def torn(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", torn)
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
