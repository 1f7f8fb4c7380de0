"""What sample i is: its class label, its seed, and the settings it is drawn with."""

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch

from meanflow_core.metrics import FeatureStatistics, ScoreSums
from meanflow_core.pipeline import MeanFlowPipeline

Sums = TypeVar("Sums", FeatureStatistics, ScoreSums)

SEEDS_PER_BASE = 2**32
Labels = Literal["balanced", "random"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How to sample."""

    num_steps: int
    """Equal steps from noise to image."""
    guidance_scale: float | None = None
    """omega; the generator's own where None."""
    guidance_interval: tuple[float, float] | None = None
    """Times between which it guides; the generator's own where None."""
    solver: Literal["euler", "heun"] = "euler"
    """Of flow matching's equation."""

    @property
    def way(self) -> str:
        """How, the number of steps aside: "omega 4, in [0.2, 0.8], Heun"; empty where nothing was asked for."""
        words = []
        if self.guidance_scale is not None:
            words.append(f"omega {self.guidance_scale:g}")
        if self.guidance_interval is not None:
            words.append("in [{:g}, {:g}]".format(*self.guidance_interval))
        if self.solver == "heun":
            words.append("Heun")
        return ", ".join(words)

    @property
    def title(self) -> str:
        """ "2 steps, omega 4, in [0.2, 0.8], Heun"."""
        steps = f"{self.num_steps} step{'s' * (self.num_steps > 1)}"
        return f"{steps}, {self.way}" if self.way else steps

    def network_calls(self, pipeline: MeanFlowPipeline) -> int:
        """Evaluations of the network for one image: Heun's method has two a step, and so has guidance by two answers."""
        evaluations = self.num_steps * (2 if self.solver == "heun" else 1)
        if pipeline.config.prediction != "velocity":
            return evaluations
        scale = pipeline.config.guidance_scale if self.guidance_scale is None else self.guidance_scale
        if scale == 1.0:
            return evaluations
        own = (pipeline.config.guidance_interval_start, pipeline.config.guidance_interval_end)
        start, end = self.guidance_interval or own
        times = torch.linspace(1.0, 0.0, self.num_steps + 1, dtype=torch.float64).tolist()
        asked = times[:-1] + (times[1:] if self.solver == "heun" else [])
        return evaluations + sum(start <= time <= end for time in asked)


@dataclass(frozen=True)
class SampleRule:
    """Which image sample i is: the same in every job, on any number of devices."""

    base_seed: int
    """Sample i's noise is that of base_seed * 2^32 + i."""
    labels: Labels
    """balanced: i mod the number of classes; random: uniform, a function of (base_seed, i)."""

    def labels_of(self, indices: np.ndarray, num_classes: int) -> np.ndarray:
        """The classes of sample indices, int64 (B,)."""
        if self.labels == "balanced":
            return indices % num_classes
        draws = [np.random.default_rng((self.base_seed, int(index))).integers(num_classes) for index in indices]
        return np.array(draws, dtype=np.int64)

    def seeds_of(self, indices: np.ndarray) -> list[int]:
        """The seeds of sample indices."""
        return [self.base_seed * SEEDS_PER_BASE + int(index) for index in indices]
