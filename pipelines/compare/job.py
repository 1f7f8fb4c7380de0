"""Options of a comparison."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.cluster import Device
from pipelines.compare.methods import BUDGETS, METHODS, Budget


@dataclass(frozen=True, kw_only=True)
class CompareJob:
    """Train and measure all methods. Seeds, methods, budgets and NFE can be added later."""

    data: str
    """Latent dataset that pipelines.encode wrote: a path or URI."""
    train_images: str
    """Class folders with the images that the latents were encoded from."""
    held_out_images: str
    """Class folders with real images that no method was trained on."""
    judge: Path
    """Folder of the classifier that judges the samples; the demo ships one in pipelines/demo/judge_weights."""
    output: Path
    """Folder for all results. On a cluster, use storage that all machines share."""
    methods: tuple[str, ...] = METHODS
    """Methods to compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds: they determine the initial parameters, the order of the data and the random draws."""
    num_steps: int = 1200
    """Optimiser steps of every method under the equal-steps budget."""
    budgets: tuple[Budget, ...] = BUDGETS
    """steps: equal steps for every method; flops: equal training FLOPs."""
    flops_of: str | None = "flow_matching"
    """Method whose num_steps set the FLOPs budget. None: the most expensive method."""
    nfe: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of function evaluations (NFE) to sample with."""
    num_samples: int = 1000
    """Samples per setting; sample i has class i mod num_classes."""
    cache_dir: str = "none"
    """Folder on each node's own disk for its copy of the latents; "none" maps mounted storage itself."""
    timed_rounds: int = 7
    """Number of measurements behind each median time."""
    device: Device = "auto"
    """Device to train on, one GPU per training. auto: GPUs if the cluster has any."""
    tracking_uri: str | None = None
    """MLflow address. Default: MLFLOW_TRACKING_URI; without either, nothing is logged to MLflow."""

    def __post_init__(self) -> None:
        unknown = sorted({*self.methods, *([self.flops_of] if self.flops_of else [])} - {*METHODS})
        if unknown or not self.methods:
            raise ValueError(f"methods must be among {', '.join(METHODS)}, but got {', '.join(unknown) or 'none'}")
        for name in ("seeds", "budgets", "nfe"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must have at least one value and no duplicates, but got {values}")
        minima = {"seeds": 0, "nfe": 1, "num_steps": 1, "timed_rounds": 1, "num_samples": 2}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if (min(value) if isinstance(value, tuple) else value) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, but got {value}")
