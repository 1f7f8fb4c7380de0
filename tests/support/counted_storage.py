"""A local disk that counts what is read and listed."""

import io

import fsspec
import pyarrow as pa
import pytest
from pyarrow import fs

from pipelines import storage


class CountedStorage(fs.FSSpecHandler):
    """A file system handler that counts bytes, reads and listings."""

    def __init__(self) -> None:
        super().__init__(fsspec.filesystem("file"))
        self.num_bytes = self.num_reads = 0
        self.listed: list[str] = []

    def get_file_info_selector(self, selector):
        self.listed.append(selector.base_dir)
        return super().get_file_info_selector(selector)

    def open_input_stream(self, path):
        return pa.PythonFile(_CountedFile(path, self), mode="r")

    open_input_file = open_input_stream


class _CountedFile(io.FileIO):
    def __init__(self, path: str, storage: CountedStorage) -> None:
        super().__init__(path)
        self._storage = storage

    def read(self, size=-1):
        content = super().read(size)
        self._storage.num_bytes += len(content)
        self._storage.num_reads += 1
        return content


def count_storage(monkeypatch: pytest.MonkeyPatch) -> CountedStorage:
    """Makes `storage` open every location through a CountedStorage until the end of the test."""
    handler = CountedStorage()
    monkeypatch.setattr(
        storage, "open_storage", lambda location: (fs.PyFileSystem(handler), storage.absolute(location))
    )
    return handler
