"""Files on a local disk or in an object store, through pyarrow's file systems, and fsspec's for what those do not know.

A location is a path or a URI ("/data/latents", "s3://bucket/latents", "abfs://container/latents"). Nothing half-written
is ever seen under its final name: a local file is renamed into place, and an object store shows an object when its
upload is complete.
"""

import os
import uuid
from pathlib import Path

import fsspec
from pyarrow import fs

from pipelines.errors import InputError

PYARROW_SCHEMES = ("file", "s3", "gs", "gcs", "hdfs", "viewfs")
SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets this variable in the driver of a submitted job


def absolute(location: str) -> str:
    """A location that means the same in every process: Ray's workers run in other working directories."""
    if location.startswith("file://"):
        return location.removeprefix("file://")
    return location if "://" in location else str(Path(location).expanduser().absolute())


def shown(location: str) -> str:
    """A location as others may see it: without keys, passwords and parameters that a URI may carry."""
    if "://" not in location:
        return location
    scheme, _, rest = location.partition("://")
    place, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"


def output_location(location: str, option: str) -> str:
    """As `absolute`, for something to write.

    Raises InputError for a file, and for a relative path in a submitted job, whose working directory is a temporary
    copy that goes with the job.
    """
    if "://" not in location and not Path(location).expanduser().is_absolute() and SUBMITTED_JOB in os.environ:
        raise InputError(
            f"{option} {location} is relative, and a submitted job works in a temporary copy of its folder; give an "
            f"absolute path on shared storage, or a URI"
        )
    location = absolute(location)
    if is_local(location) and Path(location).is_file():
        raise InputError(f"{option} {location} is a file, but a folder is wanted")
    return location


def open_storage(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a location, and the location's path in it. Raises InputError for an unknown scheme."""
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


def require_folder(location: str, what: str) -> tuple[fs.FileSystem, str]:
    """As `open_storage`, for a folder that must be there. Raises InputError where it is missing or a file."""
    filesystem, path = open_storage(location)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.NotFound:
        raise InputError(f"{what} {location} does not exist")
    if kind != fs.FileType.Directory:
        raise InputError(f"{what} {location} is a file, but a folder is wanted")
    return filesystem, path


def read_bytes(filesystem: fs.FileSystem, path: str) -> bytes:
    """The whole content of a file."""
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Writes a file whole or not at all, making its folder; an existing one is replaced."""
    filesystem.create_dir(os.path.dirname(path), recursive=True)
    if not isinstance(filesystem, fs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)
        return
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # or a machine that loses power may keep the name and lose the content
    os.replace(partial, path)


def delete_partial(filesystem: fs.FileSystem, folder: str) -> None:
    """Deletes what `write_bytes` left in a local folder where its process was killed."""
    if isinstance(filesystem, fs.LocalFileSystem):
        for path in Path(folder).glob("*.partial"):
            path.unlink(missing_ok=True)
