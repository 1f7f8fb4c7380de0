"""The other moving averages of a training: a generator of any of them, out of the last checkpoint."""

import logging
from pathlib import Path

from meanflow_core.checkpoint import load_average, read_state_file
from meanflow_core.generator import load_pipeline, save_generator
from pipelines import storage
from pipelines.errors import InputError
from pipelines.tracking.registry import REGISTRY_SCHEMES, fetch_generator
from pipelines.train import checkpoints

logger = logging.getLogger(__name__)


def generator_of(model: str, decay: float, output: Path) -> Path:
    """Makes, below `output`, the generator whose network is the moving average of a decay; its folder.

    model: a generator's folder where the training left it, beside its checkpoints. Raises InputError where it lies
    elsewhere, or the checkpoint has no such average.
    """
    if model.startswith(REGISTRY_SCHEMES):
        raise InputError(
            f"--ema-decay reads the checkpoints beside a generator, and {model} has none; name the folder, "
            f"STORAGE/RUN/generator"
        )
    generator = fetch_generator(model, None)
    filesystem, run_path = storage.open_storage(str(generator.parent))
    found = checkpoints.committed(filesystem, run_path)
    if found is None:
        raise InputError(f"no checkpoints beside {generator}, which --ema-decay reads: name the run's own generator")
    with found.latest.as_directory() as checkpoint:
        try:
            known = read_state_file(Path(checkpoint))["config"]["ema_decays"]
        except ValueError as error:
            raise InputError(str(error)) from error
        if decay not in known:
            raise InputError(
                f"the run of {generator} has averages of decay {', '.join(f'{one:g}' for one in known)}, but "
                f"--ema-decay is {decay:g}; --ema-decays of pipelines.train names them before a training"
            )
        pipeline = load_pipeline(generator)
        load_average(pipeline.transformer, decay, Path(checkpoint))
    folder = output / f"generator-ema-{decay:g}"
    save_generator(pipeline, folder)
    logger.info("the average of decay %g at step %d: %s", decay, found.step, folder)
    return folder
