"""A node's copies of folders from object stores and model registries, shared by all processes of the node."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a killed process
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
    copies = [(path.stat().st_mtime, path) for path in cache.iterdir() if path.is_dir() and not path.suffix]
    for used, folder in sorted(copies, reverse=True)[NUM_KEPT:]:
        if time.time() - used > MIN_UNUSED_SECONDS:
            with _lock(folder):
                shutil.rmtree(folder, ignore_errors=True)
