"""What the user asks of a training, and what makes two trainings the same."""

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from meanflow_core.config import TrainingConfig
from pipelines.cluster import Device
from pipelines.latents.manifest import Manifest

# What may change on the way without making it another experiment: how long it is, what is shown, how it is computed.
MAY_CHANGE = (
    "num_steps",
    "log_interval_steps",
    "checkpoint_interval_steps",
    "sample_interval_steps",
    "activation_checkpointing",
    "compile",
)


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training: what to train (the preset, every number of which can be overridden), on what, and where to."""

    data: str
    """Latent dataset that pipelines.encode wrote: a path or URI."""
    storage: str
    """Folder of runs, shared by all nodes: a path or URI."""
    run_name: str
    """Name of the run; an existing one is resumed."""
    num_workers: int = 1
    """Training processes: one per GPU, or on CPUs any number."""
    min_workers: int | None = None
    """Fewest workers to go on with when machines are lost; more join again as machines come, and all then go back to the
    last checkpoint. num_workers unless given."""
    resize_interval_seconds: float = 60.0
    """How often to look whether more workers could join, where there are fewer than num_workers."""
    parallelism: Literal["ddp", "fsdp2"] = "ddp"
    """ddp: every worker holds the whole network; fsdp2: a share of it, of its averages and of the optimiser."""
    rows_per_pass: int | None = None
    """Most rows that a worker takes at once; a larger share of the batch is taken in several passes. All unless given."""
    max_failures: int = 3
    """How often workers may fail before the run does; each time training goes on from the last checkpoint. Machines that
    were taken away do not count. -1 is without end."""
    skip_nonfinite: int = 0
    """Steps of the whole run whose gradient may be infinite or not a number, and which then move nothing."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the last ones."""
    vae: str | None = None
    """Autoencoder that the latents must have been made with (hub id or folder); checked if given."""
    init_from: str | None = None
    """What a new run's network begins with: a generator's folder, models:/name@alias or runs:/id/name, or with
    --init-source a public checkpoint's file."""
    init_source: str | None = None
    """Where the public checkpoint of --init-from comes from, as pipelines.convert names them."""
    validation_data: str | None = None
    """Latent dataset of held-out images: the moving average's errors on it are measured at every checkpoint."""
    cpu_threads: int | None = None
    """Threads of a worker on CPUs. Unless given, its machine's cores over the workers there; given, the same bits come
    out wherever workers are placed."""
    deterministic: bool = False
    """On GPUs, compute so that the same step gives the same bits, as CPUs do anyway; slower."""
    device: Device = "auto"
    """Device to train on. auto: GPUs if the cluster has any; a resumed run keeps its device."""
    cache_dir: str = str(Path(tempfile.gettempdir()) / f"meanflow-ray-latents-{os.getuid()}")
    """Folder on each node's own disk for its memory-mapped copy of the latents; "none" maps mounted storage itself."""
    mirror: bool = True
    """Train on mirror images too, each with probability 1/2; without them the copy is half as large."""
    experiment: str = "meanflow-ray"
    """MLflow experiment."""
    model_name: str | None = None
    """Name in MLflow's model registry; "meanflow-" and the preset's name unless given."""
    portable: bool = False
    """Write the generator with its code, to open with diffusers alone (trust_remote_code=True)."""
    dry_run: bool = False
    """Print what would be trained and what it costs, and stop."""
    config: Annotated[TrainingConfig, tyro.conf.arg(name="")]
    """The experiment."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "min_workers", "rows_per_pass", "keep_checkpoints", "cpu_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but got {value}")
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers must be at most num_workers {self.num_workers}, but got {self.min_workers}")
        if self.resize_interval_seconds <= 0:
            raise ValueError(f"resize_interval_seconds must be above 0, but got {self.resize_interval_seconds}")
        if self.skip_nonfinite < 0:
            raise ValueError(f"skip_nonfinite must be at least 0, but got {self.skip_nonfinite}")
        if self.max_failures < -1:
            raise ValueError(f"max_failures must be at least 0, or -1 for without end, but got {self.max_failures}")
        if self.init_source is not None and self.init_from is None:
            raise ValueError("init_source says what --init-from is; give both, or neither")

    @property
    def run_location(self) -> str:
        """The run's folder: a path or URI."""
        return f"{self.storage}/{self.run_name}"

    def identity(self, manifest: Manifest) -> dict[str, Any]:
        """What a run may not change on the way: the experiment, the data, what it began with. JSON-able, nested."""
        config = {name: value for name, value in asdict(self.config).items() if name not in MAY_CHANGE}
        return {
            "config": config,
            "data_sha256": manifest.content_sha256,
            "vae_sha256": manifest.recipe.vae_sha256,
            "mirror": self.mirror,
            "init_from": self.init_from,
        }
