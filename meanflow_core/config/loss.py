"""Configurations of objectives: times, guidance, guards and weights."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from meanflow_core.config.rules import (
    IN_0_TO_1,
    IN_0_TO_BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    check,
    check_interval,
    one_of,
    require,
)
from meanflow_core.predictions import Prediction


@dataclass(frozen=True, kw_only=True)
class TimeSamplingConfig:
    """Sampling of (t, r): two logit-normal times, sorted (MeanFlow, Table 1d)."""

    logit_mean: float = -0.4
    """Mean of the normal variable whose sigmoid is the time."""
    logit_std: float = 1.0
    """Standard deviation of that variable."""
    fraction_r_below_t: float = 0.25
    """Fraction of a batch with r < t; the other samples have r = t and train the instantaneous velocity. 0 is flow
    matching."""

    def __post_init__(self) -> None:
        check(self, "times.", ("be finite", math.isfinite), "logit_mean")
        check(self, "times.", POSITIVE, "logit_std")
        check(self, "times.", IN_0_TO_1, "fraction_r_below_t")


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Classifier-free guidance built into the target velocity (MeanFlow, Eq. 19 to 21).

    v_guided = omega v_t + kappa u(z_t, t, t | label) + (1 - omega - kappa) u(z_t, t, t | null). The effective scale is
    omega / (1 - kappa). Sampling then needs no guidance. Samples whose label is dropped are not guided.
    """

    omega: float = 1.0
    """Weight of the sample's own velocity v_t = e - x; omega = 1 and kappa = 0 disable guidance."""
    kappa: float = 0.0
    """Weight of the network's class-conditional velocity, below 1."""
    guidance_interval_start: float = 0.0
    """Samples with t below this are not guided."""
    guidance_interval_end: float = 1.0
    """Samples with t above this are not guided."""

    def __post_init__(self) -> None:
        check(self, "guidance.", POSITIVE, "omega")
        check(self, "guidance.", IN_0_TO_BELOW_1, "kappa")
        check_interval(self, "guidance")

    @property
    def is_off(self) -> bool:
        """Whether v_guided is v_t for every sample."""
        return self.omega == 1.0 and self.kappa == 0.0

    @property
    def null_weight(self) -> float:
        """Weight of the null class's velocity, 1 - omega - kappa."""
        weight = 1.0 - self.omega - self.kappa
        return 0.0 if abs(weight) < 1e-12 else weight  # if omega + kappa = 1, rounding must not cause a forward

    @property
    def effective_scale(self) -> float:
        """The effective guidance scale, the paper's omega'."""
        return self.omega / (1.0 - self.kappa)


@dataclass(frozen=True, kw_only=True)
class GuidanceSamplingConfig:
    """Sampling of improved MeanFlow's guidance, per sample (iMF, Section 4 and released code)."""

    omega_max: float = 8.0
    """omega is drawn from [1, omega_max]."""
    omega_power: float = 1.0
    """beta of omega's density, which is proportional to omega^-beta."""
    interval_split: float = 0.5
    """The interval's start is uniform in [0, interval_split], its end in [interval_split, 1]; samples with r = t have
    [0, 1]."""

    def __post_init__(self) -> None:
        check(self, "guidance_sampling.", ("be above 1", lambda value: 1 < value < math.inf), "omega_max")
        check(self, "guidance_sampling.", IN_0_TO_1, "interval_split")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Guards against spikes of the loss, all off by default. A guard changes the error u - target before its weight."""

    max_target: float | None = None
    """Clamp each element of the target to [-max_target, max_target] (alpha-Flow: 4)."""
    max_error: float | None = None
    """Clamp each element of the error to [-max_error, max_error] (FACM: 1)."""
    normalize_error: bool = False
    """Divide each sample's error by its root mean square plus 0.1, as sCM normalises its tangent."""

    def __post_init__(self) -> None:
        for name in ("max_target", "max_error"):
            if getattr(self, name) is not None:
                check(self, "guards.", POSITIVE, name)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Base of the objectives' configurations. `objectives.interface` is the base of the objectives."""

    objective: ClassVar[str] = ""
    """The objective's class, as "module:Class"."""
    needs_velocity_head: ClassVar[bool] = False
    """Whether the network must have a v head, and guidance as an input."""

    label_drop_probability: float = 0.1
    """Fraction of samples whose label is replaced by the null class. If enough samples have r = t, only those are
    chosen."""

    def __post_init__(self) -> None:
        check(self, "loss.", IN_0_TO_BELOW_1, "label_drop_probability")

    @property
    def prediction(self) -> Prediction:
        """How a generator samples with the network."""
        return "average_velocity"

    def at(self, step: int, num_steps: int) -> Self:
        """The objective at 0-based step `step` of num_steps, for objectives with a schedule."""
        return self

    def phases(self, num_steps: int) -> "list[tuple[float, Self]]":
        """The objective's phases, each with its fraction of the run. A step costs the same throughout a phase."""
        return [(1.0, self)]


@dataclass(frozen=True, kw_only=True)
class GuidedLossConfig(LossConfig):
    """Base of objectives whose guidance is fixed and built into the target."""

    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Guidance of the target."""


@dataclass(frozen=True, kw_only=True)
class FlowLossConfig(LossConfig):
    """Base of objectives that learn u(z_t, r, t) on the path z_t = (1 - t) x + t e."""

    times: TimeSamplingConfig = field(default_factory=TimeSamplingConfig)
    """Sampling of t and r."""
    norm_p: float = 1.0
    """Power p of the adaptive weight 1 / (||error||^2 + norm_eps)^p; 0 is the plain squared error."""
    norm_eps: float = 0.01
    """Constant c of the adaptive weight."""
    guards: GuardConfig = field(default_factory=GuardConfig)
    """Guards of the loss on u against spikes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "loss.", NOT_NEGATIVE, "norm_p")
        check(self, "loss.", POSITIVE, "norm_eps")


def require_r_below_t(config: FlowLossConfig, objective: str) -> None:
    """Raises ValueError if no sample has r < t, because sampling steps from t to r < t."""
    require(
        config.times.fraction_r_below_t > 0.0,
        f"{objective} needs loss.times.fraction_r_below_t above 0, but got 0; for flow matching, use its own presets",
    )


def require_r_equals_t(config: FlowLossConfig, *, uses_own_velocity: bool) -> None:
    """Raises ValueError if the target contains the network's velocities, and no sample trains them."""
    require(
        config.times.fraction_r_below_t < 1.0 or not uses_own_velocity,
        "guidance and the own velocity need samples with r = t, which train these velocities: set "
        "loss.times.fraction_r_below_t below 1, but got 1",
    )


@dataclass(frozen=True, kw_only=True)
class MeanFlowConfig(FlowLossConfig, GuidedLossConfig):
    """MeanFlow, and flow matching if r = t for every sample."""

    objective: ClassVar[str] = "meanflow_core.objectives.meanflow:MeanFlow"

    tangent: Literal["guided_velocity", "own_velocity"] = "guided_velocity"
    """Direction of du/dt: the target's guided velocity, or the network's own conditional velocity at r = t, which has less
    variance and needs no extra forward if kappa > 0 (iMF, Table 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "loss.", one_of("guided_velocity", "own_velocity"), "tangent")
        require_r_equals_t(self, uses_own_velocity=not self.guidance.is_off or self.tangent == "own_velocity")

    @property
    def is_flow_matching(self) -> bool:
        """Whether the network learns only the instantaneous velocity, for sampling in many steps."""
        return self.times.fraction_r_below_t == 0.0

    @property
    def prediction(self) -> Prediction:
        """The velocity for flow matching, else the average velocity."""
        return "velocity" if self.is_flow_matching else "average_velocity"


@dataclass(frozen=True, kw_only=True)
class ImprovedMeanFlowConfig(FlowLossConfig):
    """Improved MeanFlow: guidance drawn per sample and given to the network, and a second loss on its v head.

    du/dt is taken along the network's own conditional velocity.
    """

    objective: ClassVar[str] = "meanflow_core.objectives.meanflow:ImprovedMeanFlow"
    needs_velocity_head: ClassVar[bool] = True

    times: TimeSamplingConfig = field(default_factory=lambda: TimeSamplingConfig(fraction_r_below_t=0.5))
    """Sampling of t and r."""
    guidance_sampling: GuidanceSamplingConfig = field(default_factory=GuidanceSamplingConfig)
    """Sampling of guidance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_r_below_t(self, "improved MeanFlow")
