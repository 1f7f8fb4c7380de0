"""Consistency training, continuous (as sCM) and discrete (ECT).

Both start best from a flow-matching generator (--init-from), whose steps count as training.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from meanflow_core.config import (
    FlowLossConfig,
    GuardConfig,
    GuidedLossConfig,
    MeanFlowConfig,
    TimeSamplingConfig,
    TrainingConfig,
)
from meanflow_core.config.loss import require_r_below_t, require_r_equals_t
from meanflow_core.config.rules import IN_0_TO_1, NOT_NEGATIVE, POSITIVE_INTEGER, check
from meanflow_core.predictions import Prediction
from meanflow_core.presets.demo import COMPARISON_GUIDANCE, comparison
from meanflow_core.presets.meanflow import b4_unguided


@dataclass(frozen=True, kw_only=True)
class ContinuousConsistencyConfig(MeanFlowConfig):
    """Continuous-time consistency training: MeanFlow's identity with r = 0, stabilised as sCM (Lu and Song 2024).

    u predicts the image as f(z_t, t) = z_t - t u(z_t, 0, t). The samples with r = t, if any, are flow matching, as in FACM.
    """

    objective: ClassVar[str] = "meanflow_core.objectives.consistency:ContinuousConsistency"

    times: TimeSamplingConfig = field(
        default_factory=lambda: TimeSamplingConfig(logit_mean=-1.0, logit_std=1.4, fraction_r_below_t=1.0)
    )
    """Sampling of t (one logit-normal time) and the fraction of samples with r = 0 instead of r = t."""
    norm_p: float = 0.0
    """Power p of the adaptive weight 1 / (||error||^2 + norm_eps)^p; 0 is the plain squared error."""
    guards: GuardConfig = field(default_factory=lambda: GuardConfig(normalize_error=True))
    """Guards of the loss on u against spikes; sCM normalises."""
    warmup: float = 0.1
    """Fraction of the run in which the weight of du/dt rises linearly from 0 to 1; sCM: 10,000 steps."""
    derivative_weight: float | None = None
    """The weight of du/dt, fixed for the whole run. Default: by `warmup`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_r_below_t(self, "consistency training")
        given = () if self.derivative_weight is None else ("derivative_weight",)
        check(self, "loss.", IN_0_TO_1, "warmup", *given)

    @property
    def prediction(self) -> Prediction:
        """The image, by u(z_t, 0, t)."""
        return "consistency"

    def at(self, step: int, num_steps: int) -> Self:
        """The objective with the step's weight of du/dt."""
        if self.derivative_weight is not None:
            return self
        weight = 1.0 if self.warmup == 0.0 else min(1.0, step / (self.warmup * num_steps))
        return replace(self, derivative_weight=weight)

    def phases(self, num_steps: int) -> list[tuple[float, Self]]:
        """Every step has the same cost."""
        return [(1.0, self.at(num_steps, num_steps))]


@dataclass(frozen=True, kw_only=True)
class DiscreteConsistencyConfig(FlowLossConfig, GuidedLossConfig):
    """Easy consistency tuning (Geng et al. 2024, arXiv 2406.14548): two noise levels that approach each other in stages."""

    objective: ClassVar[str] = "meanflow_core.objectives.consistency:DiscreteConsistency"

    times: TimeSamplingConfig = field(
        default_factory=lambda: TimeSamplingConfig(logit_mean=-1.1, logit_std=2.0, fraction_r_below_t=1.0)
    )
    """Sampling of t = sigma / (1 + sigma), so that ln sigma is normal, and the fraction of samples that are not flow
    matching."""
    norm_p: float = 0.5
    """Power p of the adaptive weight; with 1/2, the loss is the norm, as in ECT."""
    norm_eps: float = 1e-6
    """Constant c of the adaptive weight."""
    num_stages: int = 8
    """Number of stages of the run; in stage k, the levels differ by a factor of about 1 - 1 / 2^(k + 1)."""
    stage: int | None = None
    """The stage k, fixed for the whole run. Default: by the step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_r_below_t(self, "consistency training")
        require_r_equals_t(self, uses_own_velocity=not self.guidance.is_off)
        check(self, "loss.", POSITIVE_INTEGER, "num_stages")
        if self.stage is not None:
            check(self, "loss.", NOT_NEGATIVE, "stage")

    @property
    def prediction(self) -> Prediction:
        """The image, by u(z_t, 0, t)."""
        return "consistency"

    def at(self, step: int, num_steps: int) -> Self:
        """The objective in the step's stage."""
        if self.stage is not None:
            return self
        return replace(self, stage=min(self.num_stages - 1, self.num_stages * step // num_steps))

    def phases(self, num_steps: int) -> list[tuple[float, Self]]:
        """Every step has the same cost."""
        return [(1.0, self.at(0, num_steps))]


def consistency_b4() -> TrainingConfig:
    """Continuous consistency training of the B/4 network, 80 epochs, unguided, 25 % flow matching; no published FID."""
    times = TimeSamplingConfig(logit_mean=-1.0, logit_std=1.4, fraction_r_below_t=0.75)
    return replace(b4_unguided(), loss=ContinuousConsistencyConfig(times=times))


def ect_b4() -> TrainingConfig:
    """Easy consistency tuning of the B/4 network, 80 epochs, unguided; no published FID on latents."""
    return replace(b4_unguided(), loss=DiscreteConsistencyConfig())


def demo_consistency() -> TrainingConfig:
    """Continuous consistency training on drawn shapes, in the comparison's size, half of it flow matching."""
    times = TimeSamplingConfig(logit_mean=-0.4, logit_std=1.4, fraction_r_below_t=0.5)
    loss = ContinuousConsistencyConfig(times=times, guidance=COMPARISON_GUIDANCE)
    return replace(comparison(loss), guidance_after_steps=0)  # the initial network has learnt the guided velocity


def demo_ect() -> TrainingConfig:
    """Easy consistency tuning on drawn shapes, in the comparison's size, half of it flow matching."""
    times = TimeSamplingConfig(logit_mean=-0.4, logit_std=2.0, fraction_r_below_t=0.5)
    loss = DiscreteConsistencyConfig(times=times, guidance=COMPARISON_GUIDANCE)
    return replace(comparison(loss), guidance_after_steps=0)  # the initial network has learnt the guided velocity
