"""A node's own copy of a latent dataset on its own disk, mapped into memory by all of the node's workers.

    python -m pipelines.latent_cache --cache-dir /local/latents               # what is there
    python -m pipelines.latent_cache --cache-dir /local/latents --evict all   # and away with it

Training wants rows in any order, which no object store gives. A copy is made once per node: shard by shard, each checked
against the manifest and whole under its name or not there, so that a copy cut short goes on where it stopped and the
next run finds it. Nothing in a copy is decoded again: a shard is mapped as it lies. Of a dataset of an older schema
version, the copy is of this one.
"""

import json
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import filelock
from pyarrow import fs

from pipelines import storage
from pipelines.command_line import parse_command_line, run_command
from pipelines.errors import InputError
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.manifest import SCHEMA_VERSION, Manifest, read_manifest, shard_name, values_per_sample
from pipelines.latents.shards import Shard, read_shard_bytes, rewritten, shard_problems
from pipelines.progress import Progress

logger = logging.getLogger(__name__)

ABOUT = "about.json"
NO_CACHE = "none"
COPIERS = 8  # threads: an object store is slow to answer, and many at once
SPARE_BYTES = 2**30  # what a copy leaves free on the disk


def open_latents(location: str, cache_dir: str, *, mirrored: bool = True) -> LatentDataset:
    """Maps the node's copy of a dataset, making it first, or the rest of it, where it is not there.

    Any number of processes of a node may call this at once: one copies, the others wait and share it. cache_dir "none"
    maps the dataset itself, which must then lie on storage that is mounted here. mirrored: False leaves the mirror
    images out of the copy. Raises InputError where there is no dataset, no room, or a shard is not what the manifest
    says.
    """
    manifest = read_manifest(location)
    if cache_dir == NO_CACHE:
        if not storage.is_local(location):
            raise InputError(
                f"--cache-dir none maps the latents where they lie, and {location} is no mounted folder; name a folder "
                f"on each node's own disk"
            )
        if manifest.schema_version < SCHEMA_VERSION:
            raise InputError(
                f"--cache-dir none maps the latents where they lie, and {location} is of schema version "
                f"{manifest.schema_version}, which cannot be mapped; name a folder on each node's own disk"
            )
        return LatentDataset.map(Path(storage.absolute(location)), manifest, mirrored=mirrored)
    mirrored = mirrored and manifest.recipe.mirrored
    folder = Path(cache_dir).expanduser() / f"{manifest.content_sha256[:16]}{'' if mirrored else '-unmirrored'}"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        _copy(location, manifest, folder, mirrored=mirrored)
        (folder / "used").touch()
    return LatentDataset.map(folder, manifest, mirrored=mirrored)


def _copy(location: str, manifest: Manifest, folder: Path, *, mirrored: bool) -> None:
    """Copies the shards that are missing, several at once."""
    filesystem, root = storage.open_storage(location)
    missing = [number for number in range(len(manifest.shard_rows)) if not (folder / shard_name(number)).is_file()]
    if not missing:
        return
    storage.delete_partial(fs.LocalFileSystem(), str(folder / "shards"))
    _require_room(location, manifest, folder, len(missing), mirrored=mirrored)
    about = {"source": location, "num_samples": manifest.num_samples, "mirrored": mirrored}
    (folder / ABOUT).write_text(json.dumps(about) + "\n")

    def copy(number: int) -> int:
        content, shard = _checked_shard(filesystem, f"{root}/{manifest.shard_name(number)}", manifest, number)
        if manifest.recipe.mirrored != mirrored or manifest.schema_version < SCHEMA_VERSION:
            content = rewritten(shard, mirrored=mirrored)
        storage.write_bytes(fs.LocalFileSystem(), str(folder / shard_name(number)), content)
        return manifest.shard_rows[number]

    done = manifest.num_samples - sum(manifest.shard_rows[number] for number in missing)
    progress = Progress(logger, "copied to this node", "latents", manifest.num_samples, start=done)
    with ThreadPoolExecutor(COPIERS) as copiers:
        try:
            for rows in copiers.map(copy, missing):
                done += rows
                progress.update(done)
        except BaseException:
            copiers.shutdown(cancel_futures=True)
            raise


def _checked_shard(filesystem: fs.FileSystem, path: str, manifest: Manifest, number: int) -> tuple[bytes, Shard]:
    """A shard's file, and what is in it."""
    try:
        content = storage.read_bytes(filesystem, path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; {manifest.shard_remedy}") from error
    try:
        shard = read_shard_bytes(content, path)
    except InputError as error:
        raise InputError(f"{error}; {manifest.shard_remedy}") from error
    if len(shard.labels) != manifest.shard_rows[number]:
        raise InputError(
            f"{path} has {len(shard.labels)} rows, but its manifest says {manifest.shard_rows[number]}; "
            f"{manifest.shard_remedy}"
        )
    for problem in shard_problems(shard, len(manifest.class_names)):
        raise InputError(f"{path}: {problem}; run pipelines.encode again into another folder")
    if shard.content_sha256() != manifest.shard_sha256[number]:
        raise InputError(f"{path} is not what its manifest says; {manifest.shard_remedy}")
    return content, shard


def _require_room(location: str, manifest: Manifest, folder: Path, num_missing: int, *, mirrored: bool) -> None:
    """Raises InputError where the disk has no room for the shards that are missing."""
    values = manifest.num_samples * values_per_sample(manifest, mirrored=mirrored)
    needed = 2 * values * num_missing // len(manifest.shard_rows)
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise InputError(
            f"this node's copy of {location} needs {needed / 1e9:.1f} GB more, but {folder.parent} has {free / 1e9:.1f} GB "
            f"free; name another --cache-dir, leave out the mirror images, evict old copies (python -m "
            f"pipelines.latent_cache), or map shared storage with --cache-dir none"
        )


@dataclass(frozen=True)
class Copy:
    """A copy that lies in a cache folder."""

    key: str
    """Name of its folder."""
    source: str
    """What it is a copy of."""
    num_bytes: int
    """Size on disk."""
    days_unused: float
    """Since a run last opened it."""


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """Show what copies of latents a node keeps, and delete some. A run that has one open keeps what it has mapped."""

    cache_dir: Path
    """The folder that training is given as --cache-dir."""
    evict: tuple[str, ...] = field(default=())
    """Keys of copies to delete, or "all"."""
    unused_days: float = 0.0
    """Of these, delete only what no run has opened for so many days."""


def list_copies(cache_dir: Path) -> list[Copy]:
    """The copies in a cache folder, the longest unused first."""
    copies = []
    for about in cache_dir.glob(f"*/{ABOUT}"):
        folder = about.parent
        used = folder / "used"
        seconds = time.time() - (used if used.exists() else about).stat().st_mtime
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        copies.append(Copy(folder.name, json.loads(about.read_text())["source"], size, seconds / 86_400))
    return sorted(copies, key=lambda copy: -copy.days_unused)


def evict(job: CacheJob) -> list[Copy]:
    """Deletes the copies that the job names, and returns them. Raises InputError for a key that is not there."""
    copies = {copy.key: copy for copy in list_copies(job.cache_dir)}
    unknown = [key for key in job.evict if key != "all" and key not in copies]
    if unknown:
        raise InputError(f"no copy {', '.join(unknown)} in {job.cache_dir}; there are: {', '.join(copies) or 'none'}")
    named = copies if "all" in job.evict else {key: copies[key] for key in job.evict}
    chosen = [copy for copy in named.values() if copy.days_unused >= job.unused_days]
    for copy in chosen:
        with filelock.FileLock(job.cache_dir / f"{copy.key}.lock"):
            shutil.rmtree(job.cache_dir / copy.key)
    return chosen


def main() -> None:
    """The command."""
    job = parse_command_line(CacheJob, __doc__)
    if not job.cache_dir.is_dir():
        raise InputError(f"--cache-dir {job.cache_dir} does not exist")
    gone = {copy.key for copy in evict(job)}
    copies = list_copies(job.cache_dir)
    for copy in copies:
        print(f"{copy.key}  {copy.num_bytes / 1e9:8.2f} GB  unused for {copy.days_unused:.1f} days  {copy.source}")
    print(f"{len(copies)} copies, {sum(copy.num_bytes for copy in copies) / 1e9:.2f} GB; {len(gone)} evicted")


if __name__ == "__main__":
    run_command(main)
