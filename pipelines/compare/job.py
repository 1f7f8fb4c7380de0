"""Options of a comparison."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.cluster import Device

Budget = Literal["steps", "flops"]
BUDGET_TITLES: dict[Budget, str] = {"steps": "equal steps", "flops": "equal training FLOPs"}

# The shipped methods: presets, with their names in tables and plots.
TITLES = {
    "demo_flow_matching": "flow matching",
    "demo_meanflow": "MeanFlow",
    "demo_meanflow_own_velocity": "MeanFlow, own velocity",
    "demo_improved_meanflow": "improved MeanFlow",
    "demo_alpha_flow": "alpha-Flow",
    "demo_soflow": "SoFlow",
    "demo_consistency": "consistency training",
    "demo_ect": "easy consistency tuning",
    "demo_ddpm": "DDPM, linear schedule",
    "demo_ddpm_cosine": "DDPM, cosine schedule",
}


@dataclass(frozen=True, kw_only=True)
class CompareJob:
    """Train and measure all methods. Seeds, methods, budgets and NFE can be added later."""

    data: str
    """Latent dataset that `meanflow encode` wrote: a path or URI."""
    train_images: str
    """The images that the latents were encoded from."""
    held_out_images: str
    """Real images that no method was trained on."""
    judge: str
    """Folder of the classifier that judges the samples; the demo ships one in pipelines/demo/judge_weights."""
    output: Path
    """Folder for all results. On a cluster, use storage that all machines share."""
    methods: tuple[str, ...] = tuple(TITLES)
    """Presets to compare; module:function names one of your own."""
    adapt: str | None = None
    """module:function that adapts the methods' configurations to other data: it takes a TrainingConfig and returns one, for
    example meanflow_core.presets.real_images:on_fashion."""
    baseline: str = "demo_flow_matching"
    """Preset of flow matching. Its steps set the FLOPs budget, and the report compares with it."""
    from_baseline: tuple[str, ...] = ("demo_consistency", "demo_ect")
    """Methods that start from flow matching: the baseline trains for the first half of their budget."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds: they determine the initial parameters, the order of the data and the random draws."""
    num_steps: int = 1200
    """Optimiser steps of every method under the equal-steps budget."""
    budgets: tuple[Budget, ...] = ("steps", "flops")
    """steps: equal steps for every method; flops: as many training FLOPs as num_steps of the baseline."""
    nfe: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of function evaluations (NFE) to sample with."""
    num_samples: int = 1000
    """Samples per setting; sample i has class i mod num_classes."""
    cache_dir: str = "none"
    """Folder on each node's own disk for its copy of the latents; "none" maps mounted storage itself."""
    device: Device = "auto"
    """Device to train on, one GPU or one CPU thread per training. auto: GPUs if the cluster has any."""
    max_concurrent: int | None = None
    """Trainings at a time. Default: as many as the cluster has GPUs or CPUs."""

    def __post_init__(self) -> None:
        for name in ("methods", "seeds", "budgets", "nfe"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must have at least one value and no duplicates, but got {values}")
        for name, minimum in {"seeds": 0, "nfe": 1, "num_steps": 2, "num_samples": 3, "max_concurrent": 1}.items():
            value = getattr(self, name)
            if value is not None and (min(value) if isinstance(value, tuple) else value) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, but got {value}")
