"""Class labels, seeds and sampler settings of samples."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from meanflow_core.predictions import needs_many_steps

if TYPE_CHECKING:
    from meanflow_core.pipeline import MeanFlowPipeline

SEEDS_PER_BASE = 2**32
Labels = Literal["balanced", "random", "training"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A combination of sampler settings to evaluate."""

    num_steps: int
    """Number of equal steps from noise to image."""
    guidance_scale: float | None = None
    """None: the generator's default."""
    guidance_interval: tuple[float, float] | None = None
    """Times (start, end) between which guidance applies. None: the generator's default."""
    solver: Literal["euler", "heun"] = "euler"
    """ODE solver of a flow matching generator."""

    @property
    def variant(self) -> str:
        """All settings but the number of steps: "omega 4, in [0.2, 0.8], Heun". Empty for the defaults."""
        return ", ".join(self._variant_parts("omega {:g}", "in [{:g}, {:g}]", "Heun"))

    @property
    def title(self) -> str:
        """For tables: "2 steps, omega 4, in [0.2, 0.8], Heun"."""
        steps = f"{self.num_steps} step{'s' * (self.num_steps > 1)}"
        return f"{steps}, {self.variant}" if self.variant else steps

    @property
    def variant_slug(self) -> str:
        """`variant` for names of files and metrics: "omega4-0.2to0.8-heun". Empty for the defaults."""
        return "-".join(self._variant_parts("omega{:g}", "{:g}to{:g}", "heun"))

    def _variant_parts(self, scale: str, interval: str, heun: str) -> list[str]:
        parts = [] if self.guidance_scale is None else [scale.format(self.guidance_scale)]
        parts += [] if self.guidance_interval is None else [interval.format(*self.guidance_interval)]
        return parts + [heun] * (self.solver == "heun")

    @property
    def slug(self) -> str:
        """`title` for file names: "2steps-omega4-0.2to0.8-heun"."""
        steps = f"{self.num_steps}step{'s' * (self.num_steps > 1)}"
        return f"{steps}-{self.variant_slug}" if self.variant_slug else steps

    def num_function_evaluations(self, pipeline: "MeanFlowPipeline") -> int:
        """Network evaluations per image (NFE).

        Heun uses two evaluations per step. For networks that predict a velocity or noise, classifier-free guidance adds an
        unconditional evaluation at each time inside the guidance interval.
        """
        import torch  # imported here to keep --help fast

        num_evaluations = self.num_steps * (2 if self.solver == "heun" else 1)
        if not needs_many_steps(pipeline.config.prediction):
            return num_evaluations
        scale = pipeline.config.guidance_scale if self.guidance_scale is None else self.guidance_scale
        if scale == 1.0:
            return num_evaluations
        default = (pipeline.config.guidance_interval_start, pipeline.config.guidance_interval_end)
        start, end = self.guidance_interval or default
        grid = torch.linspace(1.0, 0.0, self.num_steps + 1, dtype=torch.float64).tolist()
        times = grid[:-1] + (grid[1:] if self.solver == "heun" else [])
        return num_evaluations + sum(start <= time <= end for time in times)


@dataclass(frozen=True)
class SampleRule:
    """Maps sample indices to labels and seeds, independently of the number of devices."""

    base_seed: int
    """Sample i uses seed base_seed * 2^32 + i."""
    labels: Labels
    """balanced: class i mod num_classes. Else a function of (base_seed, i): random draws uniformly, training in proportion
    to class_counts."""
    class_counts: tuple[int, ...] = ()
    """Number of training images of each class, for `training`."""

    def labels_of(self, indices: np.ndarray, num_classes: int) -> np.ndarray:
        """Class labels of sample indices: int64 (B,)."""
        if self.labels == "balanced":
            return indices % num_classes
        ends = np.cumsum(self.class_counts if self.labels == "training" else np.ones(num_classes, np.int64))
        draws = [np.random.default_rng((self.base_seed, int(index))).integers(ends[-1]) for index in indices]
        return np.searchsorted(ends, draws, side="right")

    def seeds_of(self, indices: np.ndarray) -> list[int]:
        """Seeds of sample indices."""
        return [self.base_seed * SEEDS_PER_BASE + int(index) for index in indices]
