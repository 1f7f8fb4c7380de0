"""Options that all training runs share."""

from dataclasses import dataclass

from pipelines.cluster import Device


@dataclass(frozen=True, kw_only=True)
class RunJob:
    """A training run's storage, workers and tracking."""

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
    cpu_threads: int | None = None
    """CPU threads per worker. Set it for bitwise equal results on different machines. Default: the machine's cores divided
    by its number of workers."""
    deterministic: bool = False
    """Use deterministic (slower) GPU kernels: required for bitwise equal results on GPUs."""
    device: Device = "auto"
    """Device to train on. auto: GPUs if the cluster has any; a resumed run keeps its device."""
    experiment: str = "meanflow-ray"
    """MLflow experiment."""
    model_name: str | None = None
    """Name in MLflow's model registry."""
    portable: bool = False
    """Write the generator with its code, so that diffusers alone can open it (trust_remote_code=True)."""
    dry_run: bool = False
    """Print the configuration and its costs without training."""

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

    @property
    def workers(self) -> int:
        """`num_workers`, once the driver has replaced its default."""
        assert self.num_workers is not None, "the driver sets it when it knows the cluster"
        return self.num_workers

    @property
    def run_location(self) -> str:
        """The run's folder: a path or URI."""
        return f"{self.storage}/{self.run_name}"
