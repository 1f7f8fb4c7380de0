"""Files on a local disk or in an object store.

A location is a path or a URI ("/data/latents", "s3://bucket/latents", "abfs://container/latents"). pyarrow opens the
schemes that it supports, and fsspec opens all others. A file appears under its name only when it is complete: local files
are renamed into place, and object stores publish an object at the end of its upload.
"""

import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
from pyarrow import fs

from pipelines.errors import InputError
from pipelines.private_interfaces import SUBMITTED_JOB

PYARROW_SCHEMES = ("file", "s3", "gs", "gcs", "hdfs", "viewfs")
NUM_LISTING_THREADS = 32


def absolute(location: str) -> str:
    """The location in absolute form, because Ray's workers run in other working directories."""
    if location.startswith("file://"):
        return location.removeprefix("file://")
    return location if "://" in location else str(Path(location).expanduser().absolute())


def redact(location: str) -> str:
    """Removes credentials and query parameters from a location, for logs and metadata."""
    if "://" not in location:
        return location
    scheme, _, rest = location.partition("://")
    place, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"


def output_location(location: str, option: str) -> str:
    """The absolute form of a folder to write. `option` names it in errors.

    Raises InputError for a file. Also raises it for a relative path in a submitted job, because Ray runs the job in a
    temporary copy of its working directory.
    """
    if "://" not in location and not Path(location).expanduser().is_absolute() and SUBMITTED_JOB in os.environ:
        raise InputError(
            f"{option} {location} is relative, but a submitted job runs in a temporary copy of its working directory; "
            f"give an absolute path on shared storage, or a URI"
        )
    location = absolute(location)
    if is_local(location) and Path(location).is_file():
        raise InputError(f"{option} {location} is a file, but must be a folder")
    return location


def open_storage(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a location, and the path in it. Raises InputError if the file system cannot be opened."""
    location = absolute(location)
    if "://" not in location:
        return fs.LocalFileSystem(), location
    try:
        if location.split("://")[0] in PYARROW_SCHEMES:
            filesystem, path = fs.FileSystem.from_uri(location)
        else:
            opened, path = fsspec.core.url_to_fs(location)
            filesystem = fs.PyFileSystem(fs.FSSpecHandler(opened))
    except (ValueError, OSError, ImportError) as error:
        raise InputError(
            f"cannot open {location}: {error}; give a local path or a URI such as s3://bucket/path"
        ) from error
    return filesystem, path.rstrip("/")


def is_local(location: str) -> bool:
    """True for a path on this machine's file system."""
    return "://" not in absolute(location)


def require_folder(location: str, description: str) -> tuple[fs.FileSystem, str]:
    """Like `open_storage`. Raises InputError unless the location is an existing folder."""
    filesystem, path = open_storage(location)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.NotFound:
        raise InputError(f"{description} {location} does not exist")
    if kind != fs.FileType.Directory:
        raise InputError(f"{description} {location} is a file, but must be a folder")
    return filesystem, path


def list_folder(filesystem: fs.FileSystem, folder: str) -> list[fs.FileInfo]:
    """All files and folders below a folder. In an object store, lists its sub-folders side by side.

    An object store lists a thousand objects per request, and a recursive listing sends one request after the other.
    """
    if isinstance(filesystem, fs.LocalFileSystem):
        return filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    top = filesystem.get_file_info(fs.FileSelector(folder))
    folders = [info.path for info in top if info.type == fs.FileType.Directory]
    with ThreadPoolExecutor(NUM_LISTING_THREADS) as threads:
        below = threads.map(lambda path: filesystem.get_file_info(fs.FileSelector(path, recursive=True)), folders)
        return top + [info for infos in below for info in infos]


def read_bytes(filesystem: fs.FileSystem, path: str) -> bytes:
    """The whole content of a file, as it is stored."""
    with filesystem.open_input_stream(path, compression=None) as stream:  # by default, .gz files are decompressed
        return stream.read()


def write_bytes(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Writes a file completely or not at all. Creates its folder and replaces an existing file."""
    filesystem.create_dir(os.path.dirname(path), recursive=True)
    if not isinstance(filesystem, fs.LocalFileSystem):
        with filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(content)
        return
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # otherwise a power failure can leave the new name with lost content
    os.replace(partial, path)


def delete_partial(filesystem: fs.FileSystem, folder: str) -> None:
    """Deletes the temporary files of killed processes from a local folder."""
    if isinstance(filesystem, fs.LocalFileSystem):
        for path in Path(folder).glob("*.partial"):
            path.unlink(missing_ok=True)
