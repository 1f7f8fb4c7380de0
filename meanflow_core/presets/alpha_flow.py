"""alpha-Flow (Zhang et al. 2025, arXiv 2510.20771) and SoFlow (Luo et al. 2025, arXiv 2512.15657)."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from meanflow_core.config import (
    FlowLossConfig,
    GuardConfig,
    GuidanceConfig,
    GuidedLossConfig,
    OptimizerConfig,
    TrainingConfig,
)
from meanflow_core.config.loss import require_r_below_t
from meanflow_core.config.rules import IN_0_TO_1, IN_ABOVE_0_TO_1, POSITIVE, check
from meanflow_core.presets.demo import COMPARISON_GUIDANCE, COMPARISON_TIMES, comparison
from meanflow_core.presets.meanflow import STEPS_PER_EPOCH, b4_unguided

# Below this ratio, alpha-Flow's target is MeanFlow's, with a derivative; above 1 minus this, it is v.
RATIO_TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class AlphaFlowConfig(FlowLossConfig, GuidedLossConfig):
    """alpha-Flow: from the velocity (a = 1) to MeanFlow's identity (a = 0) by a sigmoid over the run."""

    objective: ClassVar[str] = "meanflow_core.objectives.alpha_flow:AlphaFlow"

    ratio: float | None = None
    """a, fixed for the whole run, in [0, 1]. Default: 1 - sigmoid(steepness (progress - 1/2)) at each step."""
    steepness: float = 25.0
    """Steepness of the sigmoid; with 25, a falls from 0.995 to 0.005 between 29 % and 71 % of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None:
            check(self, "loss.", IN_0_TO_1, "ratio")
        check(self, "loss.", POSITIVE, "steepness")
        require_r_below_t(self, "alpha-Flow")

    def ratio_at(self, progress: float) -> float:
        """a after this fraction of the run."""
        ratio = 1.0 / (1.0 + math.exp(self.steepness * (progress - 0.5)))
        if ratio < RATIO_TOLERANCE:
            return 0.0
        return 1.0 if ratio > 1.0 - RATIO_TOLERANCE else ratio

    def at(self, step: int, num_steps: int) -> Self:
        """The objective with the step's ratio a."""
        return self if self.ratio is not None else replace(self, ratio=self.ratio_at(step / num_steps))

    def phases(self, num_steps: int) -> list[tuple[float, Self]]:
        """Regression onto v, the discrete target, and the derivative."""
        if self.ratio is not None:
            return [(1.0, self)]
        width = min(0.5, math.log(1.0 / RATIO_TOLERANCE - 1.0) / self.steepness)
        shares = ((0.5 - width, 1.0), (2.0 * width, 0.5), (0.5 - width, 0.0))
        return [(share, replace(self, ratio=ratio)) for share, ratio in shares if share > 0.0]


@dataclass(frozen=True, kw_only=True)
class SoFlowConfig(FlowLossConfig, GuidedLossConfig):
    """SoFlow: alpha-Flow's identity with a small ratio that falls exponentially over the run."""

    objective: ClassVar[str] = "meanflow_core.objectives.alpha_flow:SoFlow"

    ratio: float | None = None
    """a, fixed for the whole run, in (0, 1]. Default: from ratio_start to ratio_end."""
    ratio_start: float = 0.1
    """a at the first step."""
    ratio_end: float = 0.002
    """a at the last step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = () if self.ratio is None else ("ratio",)
        check(self, "loss.", IN_ABOVE_0_TO_1, "ratio_start", "ratio_end", *given)
        require_r_below_t(self, "SoFlow")

    def at(self, step: int, num_steps: int) -> Self:
        """The objective with the step's ratio a."""
        ratio = self.ratio_start * (self.ratio_end / self.ratio_start) ** (step / num_steps)
        return self if self.ratio is not None else replace(self, ratio=ratio)

    def phases(self, num_steps: int) -> list[tuple[float, Self]]:
        """Every step has the same cost."""
        return [(1.0, self.at(num_steps // 2, num_steps))]


def alpha_flow_b4() -> TrainingConfig:
    """alpha-Flow-B/4, 240 epochs, omega 1, kappa 0.5, target clamped to 4; no published FID for B/4.

    The schedule and the clamp are the paper's; its time sampling and guidance were not verified, so these are MeanFlow's.
    """
    loss = AlphaFlowConfig(guidance=GuidanceConfig(omega=1.0, kappa=0.5), guards=GuardConfig(max_target=4.0))
    return replace(b4_unguided(), loss=loss, num_steps=240 * STEPS_PER_EPOCH)


def soflow_b4() -> TrainingConfig:
    """SoFlow-B/4, 80 epochs at batch 256 with the authors' guidance of scale 3 below t = 0.8; no FID transcribed.

    Differs from the authors' code in the times (sorted pairs here, two distributions there), in the smooth end of the
    guidance above t = 0.8, and in the weight of the samples with r < t, which is half as large there.
    """
    loss = SoFlowConfig(guidance=GuidanceConfig(omega=0.75, kappa=0.75, guidance_interval_end=0.8))
    return replace(b4_unguided(), loss=loss, optimizer=OptimizerConfig(beta2=0.99))


def demo_alpha_flow() -> TrainingConfig:
    """alpha-Flow on drawn shapes, in the comparison's size."""
    return comparison(AlphaFlowConfig(times=COMPARISON_TIMES, guidance=COMPARISON_GUIDANCE))


def demo_soflow() -> TrainingConfig:
    """SoFlow on drawn shapes, in the comparison's size."""
    return comparison(SoFlowConfig(times=COMPARISON_TIMES, guidance=COMPARISON_GUIDANCE))
