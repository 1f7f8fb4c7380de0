"""A node's copy of a latent dataset, memory-mapped by all workers of the node.

Training reads samples in random order, for which object stores are too slow. Each node therefore copies the dataset
once. Every shard is checked against the manifest and gets its final name only when complete. An interrupted copy resumes
with the missing shards, and later runs reuse the copy.
"""

import json
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import filelock
from pyarrow import fs

from pipelines import storage
from pipelines.errors import InputError
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.manifest import MANIFEST, Manifest, read_manifest, shard_name
from pipelines.latents.shards import invalid_values, read_shard_bytes, shard_bytes
from pipelines.progress import Progress

logger = logging.getLogger(__name__)

ABOUT = "about.json"
NO_CACHE = "none"
NUM_THREADS = 8  # shards copied at once, since object stores have high latency
RESERVED_BYTES = 2**30  # disk space that a copy leaves free
# `meanflow encode` skips a dataset that has a manifest. The values of a re-encoded shard may differ slightly, and a
# training run does not resume on a dataset with another hash.
SHARD_REMEDY = (
    f"restore it from a node's copy or from an older version in the storage; otherwise delete it and {MANIFEST} and run "
    f"`meanflow encode` again, which writes only the missing shard"
)


def open_latents(location: str, cache_dir: str, *, mirrored: bool = True) -> LatentDataset:
    """Copies the missing shards of a dataset to this node and memory-maps the copy.

    Concurrent calls on a node share one copy: one process copies, the others wait.

    cache_dir: folder of the copies. "none" maps the dataset where it is, which requires mounted storage.
    mirrored: False leaves mirror images out of the copy.
    Raises InputError for a missing dataset, a full disk, or a shard that does not match the manifest.
    """
    manifest = read_manifest(location)
    mirrored = mirrored and manifest.recipe.mirrored
    if cache_dir == NO_CACHE:
        if not storage.is_local(location):
            raise InputError(
                f"--cache-dir none requires latents on mounted storage, but got {location}; pass a folder on each node's "
                f"own disk"
            )
        return LatentDataset.map(Path(storage.absolute(location)), manifest, mirrored=mirrored)
    # With the version, because a copy in an older format may have the same content.
    key = f"v{manifest.schema_version}-{manifest.content_sha256[:16]}{'' if mirrored else '-unmirrored'}"
    folder = Path(cache_dir).expanduser() / key
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        _copy_missing_shards(location, manifest, folder, mirrored=mirrored)
        (folder / "used").touch()
    return LatentDataset.map(folder, manifest, mirrored=mirrored)


def _copy_missing_shards(location: str, manifest: Manifest, folder: Path, *, mirrored: bool) -> None:
    filesystem, root = storage.open_storage(location)
    missing = [number for number in range(manifest.num_shards) if not (folder / shard_name(number)).is_file()]
    if not missing:
        return
    local = fs.LocalFileSystem()
    storage.delete_partial(local, str(folder / "shards"))
    _require_disk_space(location, manifest, folder, len(missing), mirrored=mirrored)
    (folder / ABOUT).write_text(json.dumps({"source": location}) + "\n")

    def copy(number: int) -> int:
        content = _checked_content(filesystem, f"{root}/{shard_name(number)}", manifest, number)
        if manifest.recipe.mirrored and not mirrored:
            shard = read_shard_bytes(content, shard_name(number))
            content = shard_bytes(shard.moments, None, shard.labels, shard.sample_ids, shard.summary.rejected)
        storage.write_bytes(local, str(folder / shard_name(number)), content)
        return manifest.shard_num_samples[number]

    done = manifest.num_samples - sum(manifest.shard_num_samples[number] for number in missing)
    progress = Progress(logger, "copied to this node", "latents", manifest.num_samples, start=done)
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        try:
            for num_samples in threads.map(copy, missing):
                done += num_samples
                progress.update(done)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _checked_content(filesystem: fs.FileSystem, path: str, manifest: Manifest, number: int) -> bytes:
    """Reads the file of a shard. Raises InputError if it does not match the manifest."""
    try:
        content = storage.read_bytes(filesystem, path)
        shard = read_shard_bytes(content, path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; {SHARD_REMEDY}") from error
    except InputError as error:
        raise InputError(f"{error}; {SHARD_REMEDY}") from error
    if shard.content_sha256() != manifest.shard_sha256[number]:
        raise InputError(f"{path} does not match the hash in its manifest; {SHARD_REMEDY}")
    problems = invalid_values(shard, len(manifest.class_names))
    if problems:
        raise InputError(f"{path}: {problems[0]}; run `meanflow encode` again into another folder")
    return content


def _require_disk_space(location: str, manifest: Manifest, folder: Path, num_missing: int, *, mirrored: bool) -> None:
    needed = manifest.num_bytes(mirrored=mirrored) * num_missing // manifest.num_shards
    free = shutil.disk_usage(folder).free
    if needed + RESERVED_BYTES > free:
        raise InputError(
            f"this node's copy of {location} needs {needed / 1e9:.1f} GB more, but {folder.parent} has {free / 1e9:.1f} GB "
            f"free; choose another --cache-dir,{' train with --no-mirror,' if mirrored else ''} delete old copies "
            f"(meanflow latent-cache), or map shared storage with --cache-dir none"
        )


@dataclass(frozen=True)
class CachedCopy:
    """A copy in a cache folder."""

    key: str
    """Name of its folder."""
    source: str
    """Location of the dataset."""
    num_bytes: int
    """Size on disk."""
    days_unused: float
    """Days since the dataset was last opened from this copy."""


def list_copies(cache_dir: Path) -> list[CachedCopy]:
    """Lists the copies in a cache folder, least recently used first."""
    copies = []
    for about in cache_dir.glob(f"*/{ABOUT}"):
        folder = about.parent
        used = folder / "used"
        seconds = time.time() - (used if used.exists() else about).stat().st_mtime
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        copies.append(CachedCopy(folder.name, json.loads(about.read_text())["source"], size, seconds / 86_400))
    return sorted(copies, key=lambda copy: -copy.days_unused)


def delete_copies(cache_dir: Path, keys: tuple[str, ...], unused_days: float = 0.0) -> list[CachedCopy]:
    """Deletes copies and returns them. Raises InputError for an unknown key.

    keys: keys of copies, or "all".
    unused_days: keep copies that a run has opened within this many days.
    """
    copies = {copy.key: copy for copy in list_copies(cache_dir)}
    unknown = [key for key in keys if key != "all" and key not in copies]
    if unknown:
        raise InputError(f"no copy {', '.join(unknown)} in {cache_dir}; known: {', '.join(copies) or 'none'}")
    selected = copies if "all" in keys else {key: copies[key] for key in keys}
    deleted = [copy for copy in selected.values() if copy.days_unused >= unused_days]
    for copy in deleted:
        with filelock.FileLock(cache_dir / f"{copy.key}.lock"):
            shutil.rmtree(cache_dir / copy.key)
    return deleted
