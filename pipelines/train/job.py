"""Options of a training run."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from meanflow_core.config import TrainingConfig
from pipelines.command_line import parse_preset_command_line
from pipelines.training.job import RunJob

DESCRIPTION = """Train a generator on a latent dataset with Ray Train.

    meanflow train xl2 --data latents --storage runs --run-name xl2-first --num-workers 8

The same command resumes the run from its last checkpoint. SIGTERM (`ray job stop`) saves a checkpoint and ends.
MLFLOW_TRACKING_URI names the MLflow server; without it, a database in the storage folder is used. The result is a
diffusers pipeline folder, in the run's folder and in MLflow's model registry."""

# Fields that `train PRESET --help` shows.
COMMON = (
    "data", "storage", "run_name", "num_workers", "min_workers", "samples_per_pass", "device", "parallelism", "init_from",
    "validation_data", "dry_run",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainJob(RunJob):
    """One training run: the experiment, its data, its storage and its workers."""

    data: str
    """Latent dataset written by `meanflow encode`: a path or URI."""
    parallelism: Literal["ddp", "fsdp2"] = "ddp"
    """ddp: every worker holds the whole network; fsdp2: network, averages and optimizer are sharded over the workers."""
    vae: str | None = None
    """Check that the latents were encoded with this autoencoder (hub id or folder)."""
    init_from: str | None = None
    """Initial network of a new run: a generator's folder, models:/name@alias or runs:/id/name, or with --init-source a
    public checkpoint file."""
    init_source: str | None = None
    """Source of the public checkpoint in --init-from: a source name of `meanflow convert`."""
    validation_data: str | None = None
    """Latent dataset of held-out images. Every checkpoint's moving average is validated on it."""
    cache_dir: str = str(Path(tempfile.gettempdir()) / f"meanflow-ray-latents-{os.getuid()}")
    """Folder on each node's local disk for a memory-mapped copy of the latents. "none": memory-map --data directly."""
    parent_run_id: str | None = None
    """MLflow run that contains this one. `meanflow sweep` sets it."""
    model_name: str | None = None
    """Name in MLflow's model registry. Default: "meanflow-" and the preset's name, without its module."""
    config: Annotated[TrainingConfig, tyro.conf.arg(name="")]
    """The training configuration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_source is not None and self.init_from is None:
            raise ValueError("init_source requires init_from, the location of the checkpoint file")

    def registered_name(self, preset: str) -> str:
        """The generator's name in MLflow's model registry."""
        return self.model_name or f"meanflow-{preset.rpartition(':')[2]}"


def parse_arguments(arguments: list[str]) -> tuple[str, TrainJob]:
    """Parses a preset's name and the options after it. Raises InputError for an unknown preset or invalid options."""
    return parse_preset_command_line(
        arguments,
        "pipelines.train",
        DESCRIPTION,
        lambda config: TrainJob(data=tyro.MISSING, storage=tyro.MISSING, run_name=tyro.MISSING, config=config),
        common=COMMON,
    )
