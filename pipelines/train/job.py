"""Options of a training run."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from meanflow_core.config import TrainingConfig
from pipelines.cluster import Device
from pipelines.command_line import parse_preset_command_line

DESCRIPTION = """Train a generator on a latent dataset with Ray Train.

    python -m pipelines.train xl2 --data latents --storage runs --run-name xl2-first --num-workers 8

The same command resumes the run from its last checkpoint. SIGTERM (`ray job stop`) saves a checkpoint and ends.
MLFLOW_TRACKING_URI names the MLflow server; without it, a database in the storage folder is used. The result is a
diffusers pipeline folder, in the run's folder and in MLflow's model registry."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training run: the experiment, its data, its storage and its workers."""

    data: str
    """Latent dataset written by pipelines.encode: a path or URI."""
    storage: str
    """Folder of all runs, shared by all nodes: a path or URI."""
    run_name: str
    """Name of the run. An existing run is resumed."""
    num_workers: int | None = None
    """Training processes: one per GPU, or any number on CPUs. Default: one for each GPU that the cluster has now; one if it
    has none."""
    min_workers: int | None = None
    """Minimum number of workers: training continues with at least this many when nodes are lost. It restarts from the last
    checkpoint whenever workers leave or join. Default: num_workers."""
    resize_interval_seconds: float = 60.0
    """Seconds between checks for additional workers while fewer than num_workers are running."""
    parallelism: Literal["ddp", "fsdp2"] = "ddp"
    """ddp: every worker holds the whole network; fsdp2: network, averages and optimizer are sharded over the workers."""
    samples_per_pass: int | None = None
    """Maximum number of samples per forward pass on each worker. If a worker's share of the batch is larger, it accumulates
    gradients over several passes. Default: one pass."""
    max_failures: int = 3
    """Maximum number of worker failures; after each, training restarts from the last checkpoint. Preempted nodes do not
    count. -1: no limit."""
    skip_nonfinite: int = 0
    """Maximum number of optimizer steps to skip in the whole run because their gradient is not finite."""
    keep_checkpoints: int = 2
    """Number of recent checkpoints to keep."""
    vae: str | None = None
    """Check that the latents were encoded with this autoencoder (hub id or folder)."""
    init_from: str | None = None
    """Initial network of a new run: a generator's folder, models:/name@alias or runs:/id/name, or with --init-source a
    public checkpoint file."""
    init_source: str | None = None
    """Source of the public checkpoint in --init-from: a source name of pipelines.convert."""
    validation_data: str | None = None
    """Latent dataset of held-out images. Every checkpoint's moving average is validated on it."""
    cpu_threads: int | None = None
    """CPU threads per worker. Set it for bitwise equal results on different machines. Default: the machine's cores divided
    by its number of workers."""
    deterministic: bool = False
    """Use deterministic (slower) GPU kernels: required for bitwise equal results on GPUs."""
    device: Device = "auto"
    """Device to train on. auto: GPUs if the cluster has any; a resumed run keeps its device."""
    cache_dir: str = str(Path(tempfile.gettempdir()) / f"meanflow-ray-latents-{os.getuid()}")
    """Folder on each node's local disk for a memory-mapped copy of the latents. "none": memory-map --data directly."""
    experiment: str = "meanflow-ray"
    """MLflow experiment."""
    parent_run_id: str | None = None
    """MLflow run that contains this one. pipelines.sweep sets it."""
    model_name: str | None = None
    """Name in MLflow's model registry. Default: "meanflow-" and the preset's name, without its module."""
    portable: bool = False
    """Write the generator with its code, so that diffusers alone can open it (trust_remote_code=True)."""
    dry_run: bool = False
    """Print the configuration and its costs without training."""
    config: Annotated[TrainingConfig, tyro.conf.arg(name="")]
    """The training configuration."""

    def __post_init__(self) -> None:
        at_least_one = ("num_workers", "min_workers", "samples_per_pass", "keep_checkpoints", "cpu_threads")
        for name, minimum in {**dict.fromkeys(at_least_one, 1), "skip_nonfinite": 0, "max_failures": -1}.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, but got {value}")
        if self.min_workers is not None and self.num_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers must be at most num_workers {self.num_workers}, but got {self.min_workers}")
        if self.resize_interval_seconds <= 0:
            raise ValueError(f"resize_interval_seconds must be above 0, but got {self.resize_interval_seconds}")
        if self.init_source is not None and self.init_from is None:
            raise ValueError("init_source requires init_from, the location of the checkpoint file")

    @property
    def workers(self) -> int:
        """`num_workers`, once the driver has replaced its default."""
        assert self.num_workers is not None, "the driver sets it when it knows the cluster"
        return self.num_workers

    @property
    def run_location(self) -> str:
        """The run's folder: a path or URI."""
        return f"{self.storage}/{self.run_name}"

    def registered_name(self, preset: str) -> str:
        """The generator's name in MLflow's model registry."""
        return self.model_name or f"meanflow-{preset.rpartition(':')[2]}"


def parse_arguments(arguments: list[str]) -> tuple[str, TrainJob]:
    """Parses a preset's name and the options after it. Raises InputError for an unknown preset or invalid options."""
    return parse_preset_command_line(
        TrainJob,
        arguments,
        "pipelines.train",
        DESCRIPTION,
        lambda config: TrainJob(data=tyro.MISSING, storage=tyro.MISSING, run_name=tyro.MISSING, config=config),
    )
