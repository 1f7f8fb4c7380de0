"""A node's copies of folders from object stores and model registries, shared by all processes of the node."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

NUM_KEPT = 4  # most recently used copies
MIN_UNUSED_SECONDS = 3600.0  # a copy is not deleted before: a process may not have read it yet


def cached_folder(identity: str, fetch: Callable[[Path], None]) -> Path:
    """The node's copy of a folder. The first process fetches it while the others wait; later calls find it.

    A copy appears only when it is complete. Copies beyond the NUM_KEPT most recently used are deleted after an hour
    without use.

    identity: identifies the content: a folder with other content must have another identity.
    fetch: writes the content into an empty folder. Its errors are passed on.
    Raises ValueError if the cache folder belongs to another user.
    """
    cache = Path(tempfile.gettempdir()) / f"meanflow-ray-generators-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        raise ValueError(f"{cache} must belong to this user, but another user created it; delete it, or set TMPDIR")
    folder = cache / hashlib.sha256(identity.encode()).hexdigest()[:32]
    with _lock(folder):
        if not folder.is_dir():
            partial = _without_partial(folder)
            partial.mkdir()
            try:
                fetch(partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            partial.rename(folder)
        os.utime(folder)
    _evict(cache)
    return folder


def _lock(folder: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(folder.with_suffix(".lock"))


def _evict(cache: Path) -> None:
    copies = []
    for path in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process evicts, too
            if path.is_dir() and not path.suffix:
                copies.append((path.stat().st_mtime, path))
    for _, folder in sorted(copies, reverse=True)[NUM_KEPT:]:
        with _lock(folder), contextlib.suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > MIN_UNUSED_SECONDS:
                partial = _without_partial(folder)
                folder.rename(partial)  # first: what is left of an interrupted deletion is no copy
                shutil.rmtree(partial, ignore_errors=True)


def _without_partial(folder: Path) -> Path:
    """The path of a folder's incomplete copy, after deleting what a killed process left there."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def cached_copy(location: str, filesystem: Any, path: str) -> Path:
    """The node's copy of a folder in an object store, fetched again if a file of it has changed. Requires pyarrow.

    location: its URI. filesystem, path: pyarrow's file system, and the folder in it.
    """
    from pyarrow import fs

    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    files = sorted((info.path, info.size, info.mtime_ns) for info in infos if info.is_file)
    return cached_folder(
        f"{location} {files}", lambda folder: fs.copy_files(path, str(folder), source_filesystem=filesystem)
    )
