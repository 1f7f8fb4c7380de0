"""Flow matching, MeanFlow, MeanFlow along its own velocity and improved MeanFlow, side by side.

    python -m pipelines.comparison --data demo/latents --train-images demo/train --held-out-images demo/val \\
        --output comparison

Each is trained from several seeds, for the same number of steps and for the same number of operations, and measured at
several numbers of network calls. The same command again does what is missing. The distance is Fréchet's in the
features of a judge (pipelines/judge.py), and not FID.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import latent_store, storage
from pipelines.command import InputError, choose_gpus, parse_command_line, run_command, start_ray
from pipelines.comparison.training import BUDGETS, Budget, Data, methods, planned_runs, step_costs, steps_of, train_all
from pipelines.demo.judge import SHIPPED_JUDGE

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
METHODS = tuple(methods(1))


@dataclass(frozen=True, kw_only=True)
class CompareJob:
    """Train and measure all methods. More seeds, methods, budgets and calls may be asked for later."""

    data: str
    """Latent dataset of pipelines.encode: a path or URI."""
    train_images: str
    """Folder of class folders: the images that the latents were made of."""
    held_out_images: str
    """Folder of class folders: real images that nothing was trained on."""
    output: Path
    """Folder for everything that this makes; on a cluster, on storage that all machines share."""
    methods: tuple[str, ...] = METHODS
    """What to compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings: initial parameters, order of the data, draws."""
    num_steps: int = 600
    """Optimiser steps of every method, at equal steps."""
    budgets: tuple[Budget, ...] = BUDGETS
    """steps: as many steps for each; flops: as many operations for each."""
    flops_of: str | None = None
    """Method whose num_steps are the operations that each may spend; the dearest unless named."""
    calls: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of network calls to sample with."""
    num_samples: int = 1000
    """Samples per number of calls, sample i of class i mod num_classes."""
    judge: Path = SHIPPED_JUDGE
    """Folder of the classifier that measures; the demo's unless given."""
    cache_dir: str = "none"
    """Folder on each node's own disk for its copy of the latents; "none" maps mounted storage itself."""
    use_gpu: bool | None = None
    """Train on GPUs, one each; where the cluster has some, unless said."""
    tracking_uri: str | None = None
    """MLflow address; MLFLOW_TRACKING_URI unless given. Without either, nothing is logged there."""

    def __post_init__(self) -> None:
        unknown = sorted({*self.methods, *([self.flops_of] if self.flops_of else [])} - {*METHODS})
        if unknown or not self.methods:
            raise ValueError(f"methods must be some of {', '.join(METHODS)}, but got {', '.join(unknown) or 'none'}")
        for name in ("seeds", "budgets", "calls"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must name one or more, each once, but got {values}")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must be at least 0, but got {self.seeds}")
        if min(self.calls) < 1:
            raise ValueError(f"calls must be at least 1, but got {self.calls}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, but got {self.num_steps}")
        if self.num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, but got {self.num_samples}")


def settings(job: CompareJob) -> dict[str, Any]:
    """What must stay as it is for an output to be continued: all but which methods, seeds, budgets and calls."""
    configs = {name: method.config.flat() for name, method in methods(1000).items()}  # their steps vary with budgets
    fixed = {
        "num_steps": job.num_steps,
        "data.sha256": latent_store.read_manifest(job.data).content_sha256,
        "train_images": storage.absolute(job.train_images),
        "held_out_images": storage.absolute(job.held_out_images),
        "judge": str(job.judge.absolute()),
        "num_samples": job.num_samples,
        "flops_of": job.flops_of,
    }
    flat = {f"{name}.{key}": value for name, config in configs.items() for key, value in config.items()}
    return dict(json.loads(json.dumps({**fixed, **flat})))


def begin_or_continue(output: Path, wanted: dict[str, Any]) -> None:
    """Writes an output's settings, or compares them with those that it was begun with.

    Raises InputError, naming every difference, where they are others, or the folder holds something else.
    """
    if not (output / SETTINGS).is_file():
        if output.is_dir() and any(output.iterdir()):
            raise InputError(f"--output {output} holds something else than a comparison; name an empty or a new folder")
        output.mkdir(parents=True, exist_ok=True)
        filesystem, path = storage.open_storage(str(output / SETTINGS))
        storage.write_bytes(filesystem, path, (json.dumps(wanted, indent=2) + "\n").encode())
        return
    begun = json.loads((output / SETTINGS).read_text())
    different = [key for key in sorted({*begun, *wanted}) if begun.get(key) != wanted.get(key)]
    if different:
        changes = "; ".join(f"{key} was {begun.get(key)}, is {wanted.get(key)}" for key in different)
        raise InputError(f"--output {output} was begun with other settings ({changes}); choose another --output")


def compare(job: CompareJob) -> None:
    """Trains what is missing. Raises InputError for unfit input."""
    output = Path(storage.output_location(str(job.output), "--output"))
    data = Data(latents=storage.absolute(job.data), cache_dir=job.cache_dir)
    begin_or_continue(output, settings(job))
    costs = step_costs(data.network_sizes)
    steps = {budget: steps_of(budget, job.num_steps, costs, job.flops_of) for budget in job.budgets}
    runs = planned_runs(steps.values(), job.methods, job.seeds, costs)
    start_ray(needed_cpus=1)
    train_all(runs, data, output / "runs", costs, use_gpu=choose_gpus(job.use_gpu))


def main() -> None:
    """The command."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    compare(parse_command_line(CompareJob, __doc__))


if __name__ == "__main__":
    run_command(main)
