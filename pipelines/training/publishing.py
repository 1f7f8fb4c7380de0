"""Publishes a finished run: saves a generator for every moving average and registers the first in MLflow."""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pyarrow import fs

from pipelines import storage
from pipelines.errors import RunError
from pipelines.tracking.registry import register_generator
from pipelines.tracking.run import Run
from pipelines.training.job import RunJob
from pipelines.training.record import Published

logger = logging.getLogger(__name__)

INDEX_FILE = "model_index.json"


def publish_averages(
    job: RunJob,
    decays: Sequence[float],
    write: Callable[[float, Path], Mapping[str, str]],
    run: Run,
    *,
    name: str,
    step: int,
    tags: Mapping[str, str],
) -> Published:
    """Writes the generator of every moving average into the run's folder, and registers the first in MLflow.

    The first is `generator/`, the others are `generator-ema-DECAY/`. write: writes the generator of a decay into a folder,
    and returns the hashes of its weights, as tags. Raises RunError if MLflow cannot register it.
    """
    first, *others = decays
    for decay in others:
        with tempfile.TemporaryDirectory() as scratch:
            write(decay, Path(scratch))
            location = upload(Path(scratch), f"{job.run_location}/generator-ema-{decay:g}")
            logger.info("generator of the moving average with decay %g: %s", decay, location)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        hashes = write(first, folder)
        location = upload(folder, f"{job.run_location}/generator")
        try:
            model = register_generator(run, folder, name, {**hashes, **tags, "generator": storage.redact(location)})
        except Exception as error:
            raise RunError(
                f"training has finished and the generator is in {location}, but MLflow did not register it: {error}; run "
                f"the same command again to register it"
            ) from error
    return Published(step=step, generator=location, model=model)


def upload(folder: Path, location: str) -> str:
    """Uploads a generator's files to `location`, and returns it.

    model_index.json is deleted first and uploaded last, so that a mixture of two generators cannot be opened.
    """
    filesystem, target = storage.open_storage(location)
    if filesystem.get_file_info(f"{target}/{INDEX_FILE}").type == fs.FileType.File:
        filesystem.delete_file(f"{target}/{INDEX_FILE}")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == INDEX_FILE):
        storage.write_bytes(filesystem, f"{target}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return location
