"""Lists and deletes a node's copies of latent datasets.

    meanflow latent-cache --cache-dir /local/latents
    meanflow latent-cache --cache-dir /local/latents --evict all --unused-days 30

A running training keeps the copy that it has mapped, even when the copy is deleted.
"""

from dataclasses import dataclass
from pathlib import Path

from pipelines.command_line import parse_command_line, run_command
from pipelines.errors import InputError


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """List a node's copies of latent datasets, and delete some."""

    cache_dir: Path
    """Folder of the copies: training's --cache-dir."""
    evict: tuple[str, ...] = ()
    """Keys of copies to delete, or "all"."""
    unused_days: float = 0.0
    """Delete only copies that no run has opened for this many days."""


def main() -> None:
    """Runs the command."""
    job = parse_command_line(CacheJob, __doc__)
    from pipelines.latents.cache import delete_copies, list_copies  # slow: it imports pyarrow

    if not job.cache_dir.is_dir():
        raise InputError(f"--cache-dir {job.cache_dir} does not exist")
    deleted = delete_copies(job.cache_dir, job.evict, job.unused_days)
    copies = list_copies(job.cache_dir)
    for copy in copies:
        print(f"{copy.key}  {copy.num_bytes / 1e9:8.2f} GB  unused for {copy.days_unused:.1f} days  {copy.source}")
    print(f"{len(copies)} copies, {sum(copy.num_bytes for copy in copies) / 1e9:.2f} GB; {len(deleted)} evicted")


if __name__ == "__main__":
    run_command(main)
