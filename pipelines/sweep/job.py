"""Options of a sweep."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from pipelines.command_line import parse_preset_command_line
from pipelines.train.job import COMMON, TrainJob

DESCRIPTION = """Train variants of a preset, several at a time, and compare them in a table.

    meanflow sweep b4 --data latents --storage runs --run-name rates \\
        --vary optimizer.learning_rate=1e-4,3e-4 --vary seed=0,1 --reference reference.npz

Every variant is a run of `meanflow train` in STORAGE/RUN_NAME/runs, with the options that are given here. The same command
resumes the sweep: finished runs are kept. SIGTERM (`ray job stop`) saves checkpoints and ends. In MLflow, the runs are
children of one run. The best generator becomes @champion of the sweep's own registered model."""


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """A grid of training runs, and how to evaluate them."""

    vary: tyro.conf.UseAppendAction[tuple[str, ...]]
    """A field of the configuration and its values: optimizer.learning_rate=1e-4,3e-4. Give it again for more fields; all
    combinations are trained."""
    max_concurrent: int | None = None
    """Runs at a time. Default: as many as the cluster has GPUs or CPUs for."""
    reference: str | None = None
    """Reference statistics of real images, from `meanflow reference`. Every generator is evaluated against them. Without
    them, the variants are sorted by their squared errors on --validation-data, or else by the last ones in training; these
    are comparable only if the variants have the same objective."""
    extractor: str = "inception"
    """Feature extractor of the reference: as in `meanflow evaluate`."""
    steps: tuple[int, ...] = (1,)
    """Numbers of sampling steps to evaluate. The variants are sorted by the first one's distance."""
    num_samples: int = 10_000
    """Samples to evaluate per setting."""
    train: Annotated[TrainJob, tyro.conf.arg(name="")]
    """The options of every run; run_name is the name of the sweep."""

    def __post_init__(self) -> None:
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise ValueError(f"max_concurrent must be at least 1, but got {self.max_concurrent}")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps must be one or more numbers of at least 1, but got {self.steps}")


def parse_arguments(arguments: list[str]) -> tuple[str, SweepJob]:
    """Parses a preset's name and the options after it. Raises InputError for an unknown preset or invalid options."""
    return parse_preset_command_line(
        arguments,
        "pipelines.sweep",
        DESCRIPTION,
        lambda config: SweepJob(
            vary=tyro.MISSING,
            train=TrainJob(data=tyro.MISSING, storage=tyro.MISSING, run_name=tyro.MISSING, config=config),
        ),
        common=("vary", "max_concurrent", "reference", "extractor", "steps", "num_samples", *COMMON),
    )
