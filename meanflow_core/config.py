"""What a training run is: frozen dataclasses, checked when they are made. Standard library only.

Every field is a number or a name that a paper's table gives; nothing here says where data lie or on what it runs.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network's kind and size (DiT's Table 1 has S to XL). The latent's shape and the classes come with the data."""

    architecture: Literal["dit", "imf_dit"] = "dit"
    """dit: conditioned on (t, t - r, label) by adaptive norms; imf_dit: improved MeanFlow's, with tokens and a v head."""
    patch_size: int = 2
    """Side of a patch in latent pixels; a latent of 32x32 makes (32 / patch_size)^2 tokens."""
    hidden_size: int = 768
    """Width of a token."""
    depth: int = 12
    """Number of transformer blocks."""
    num_heads: int = 12
    """Attention heads; must divide hidden_size."""
    mlp_ratio: float = 4.0
    """Width of the feed-forward layer over hidden_size."""
    aux_head_depth: int = 8
    """imf_dit alone: blocks of each of the two heads; the trunk has depth minus these."""

    def __post_init__(self) -> None:
        _require(
            self.architecture in ("dit", "imf_dit"),
            f"network.architecture must be dit or imf_dit, but got {self.architecture!r}",
        )
        for name in ("patch_size", "hidden_size", "depth", "num_heads"):
            value = getattr(self, name)
            _require(
                isinstance(value, int) and value >= 1, f"network.{name} must be a whole number above 0, but got {value}"
            )
        _require(0.0 < self.mlp_ratio < math.inf, f"network.mlp_ratio must be above 0, but got {self.mlp_ratio}")
        _require(
            self.architecture == "dit" or 0 <= self.aux_head_depth <= self.depth,
            f"network.aux_head_depth must lie in [0, depth = {self.depth}], but got {self.aux_head_depth}",
        )
        _require(
            self.hidden_size % self.num_heads == 0,
            f"network.hidden_size must be a multiple of num_heads, but got {self.hidden_size} and {self.num_heads}",
        )
        _require(
            self.architecture == "dit" or self.hidden_size // self.num_heads % 2 == 0,
            f"network.hidden_size / num_heads must be even (rotary positions), "
            f"but got {self.hidden_size} and {self.num_heads}",
        )
        _require(
            self.architecture == "imf_dit" or self.hidden_size % 4 == 0,
            f"network.hidden_size must be a multiple of 4 (sine-cosine positions), but got {self.hidden_size}",
        )


@dataclass(frozen=True, kw_only=True)
class TimeSamplingConfig:
    """How (t, r) is drawn: two logit-normal times, sorted (MeanFlow, Table 1d)."""

    logit_mean: float = -0.4
    """Mean of the normal variable whose sigmoid is a time."""
    logit_std: float = 1.0
    """Its standard deviation."""
    fraction_r_below_t: float = 0.25
    """Share of a batch's rows with r < t; the others have r = t and learn the instantaneous velocity. 0 is flow matching."""

    def __post_init__(self) -> None:
        _require(math.isfinite(self.logit_mean), f"times.logit_mean must be a number, but got {self.logit_mean}")
        _require(0.0 < self.logit_std < math.inf, f"times.logit_std must be above 0, but got {self.logit_std}")
        _require(
            0.0 <= self.fraction_r_below_t <= 1.0,
            f"times.fraction_r_below_t must lie in [0, 1], but got {self.fraction_r_below_t}",
        )


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Classifier-free guidance built into the target velocity (MeanFlow, Eq. 19 to 21).

    v_guided = omega v_t + kappa u(z_t, t, t | label) + (1 - omega - kappa) u(z_t, t, t | null), of effective scale
    omega / (1 - kappa). Sampling then needs no guidance.
    """

    omega: float = 1.0
    """Weight of the conditional sample velocity v_t; 1 with kappa 0 is no guidance."""
    kappa: float = 0.0
    """Weight of the network's own conditional velocity; below 1."""
    guidance_interval_start: float = 0.0
    """Rows with t below this are not guided."""
    guidance_interval_end: float = 1.0
    """Rows with t above this are not guided."""

    def __post_init__(self) -> None:
        _require(0.0 < self.omega < math.inf, f"guidance.omega must be above 0, but got {self.omega}")
        _require(0.0 <= self.kappa < 1.0, f"guidance.kappa must lie in [0, 1), but got {self.kappa}")
        _require(
            0.0 <= self.guidance_interval_start <= self.guidance_interval_end <= 1.0,
            f"guidance needs 0 <= guidance_interval_start <= guidance_interval_end <= 1, "
            f"but got {self.guidance_interval_start} and {self.guidance_interval_end}",
        )

    @property
    def is_off(self) -> bool:
        """True where v_guided is v_t everywhere."""
        return self.omega == 1.0 and self.kappa == 0.0

    @property
    def effective_scale(self) -> float:
        """The papers' omega': the guidance scale that omega and kappa amount to."""
        return self.omega / (1.0 - self.kappa)


@dataclass(frozen=True, kw_only=True)
class GuidanceSamplingConfig:
    """How improved MeanFlow draws the guidance that its network is told, per row (iMF, Section 4 and released code)."""

    omega_max: float = 8.0
    """omega is drawn from [1, omega_max]."""
    omega_power: float = 1.0
    """beta of its density, proportional to omega^-beta."""
    interval_split: float = 0.5
    """The guidance interval starts uniformly in [0, interval_split] and ends uniformly in [interval_split, 1]; rows with
    r = t have [0, 1]."""

    def __post_init__(self) -> None:
        _require(self.omega_max > 1.0, f"guidance_sampling.omega_max must be above 1, but got {self.omega_max}")
        _require(
            0.0 <= self.interval_split <= 1.0,
            f"guidance_sampling.interval_split must lie in [0, 1], but got {self.interval_split}",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective: flow matching (no row with r < t), MeanFlow, or improved MeanFlow."""

    objective: Literal["meanflow", "improved_meanflow"] = "meanflow"
    """meanflow: guidance as `guidance` says, built into the weights; improved_meanflow: drawn as `guidance_sampling` says,
    told to the network, and a loss on its v head beside."""
    times: TimeSamplingConfig = field(default_factory=TimeSamplingConfig)
    """How t and r are drawn."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Guidance of the target velocity, for meanflow."""
    guidance_sampling: GuidanceSamplingConfig = field(default_factory=GuidanceSamplingConfig)
    """Draws of guidance, for improved_meanflow."""
    tangent: Literal["guided_velocity", "own_velocity"] = "guided_velocity"
    """What du/dt is taken along: the target's guided velocity, or the network's own conditional velocity at r = t, of less
    variance and free where kappa > 0 (iMF, Table 1). improved_meanflow always takes its own."""
    norm_p: float = 1.0
    """Power p of the adaptive weight 1 / (||error||^2 + norm_eps)^p; 0 is the plain squared error."""
    norm_eps: float = 0.01
    """Constant c of the adaptive weight."""
    label_drop_probability: float = 0.1
    """Share of all rows whose label becomes the null class; taken from the r = t rows where these suffice."""

    @property
    def is_flow_matching(self) -> bool:
        """True where the network learns the velocity alone, to be integrated in many steps."""
        return self.times.fraction_r_below_t == 0.0

    @property
    def takes_own_velocity(self) -> bool:
        """True where du/dt is taken along the network's own conditional velocity."""
        return self.tangent == "own_velocity" or self.objective == "improved_meanflow"

    def __post_init__(self) -> None:
        _require(
            self.objective in ("meanflow", "improved_meanflow"),
            f"loss.objective must be meanflow or improved_meanflow, but got {self.objective!r}",
        )
        _require(
            self.tangent in ("guided_velocity", "own_velocity"),
            f"loss.tangent must be guided_velocity or own_velocity, but got {self.tangent!r}",
        )
        _require(
            self.objective == "meanflow" or self.guidance.is_off,
            "loss.guidance is for meanflow; improved_meanflow draws its own (loss.guidance_sampling)",
        )
        _require(
            self.objective == "meanflow" or not self.is_flow_matching,
            "loss.objective improved_meanflow needs loss.times.fraction_r_below_t above 0; flow matching is meanflow at 0",
        )
        _require(self.norm_p >= 0.0, f"loss.norm_p must be at least 0, but got {self.norm_p}")
        _require(self.norm_eps > 0.0, f"loss.norm_eps must be above 0, but got {self.norm_eps}")
        _require(
            0.0 <= self.label_drop_probability < 1.0,
            f"loss.label_drop_probability must lie in [0, 1), but got {self.label_drop_probability}",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam; the rate constant as in MeanFlow's Table 4, or with a warm-up before and a cool-down after."""

    learning_rate: float = 1e-4
    """Adam's rate after warm-up."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    cooldown_steps: int = 0
    """Last steps of the run, over which the rate falls linearly to 0; none in the papers, worth it in a short run."""
    max_gradient_norm: float | None = None
    """Clip the whole gradient to this norm; none as in the papers."""

    def __post_init__(self) -> None:
        _require(
            0.0 < self.learning_rate < math.inf,
            f"optimizer.learning_rate must be above 0, but got {self.learning_rate}",
        )
        for name in ("beta1", "beta2"):
            _require(
                0.0 <= getattr(self, name) < 1.0, f"optimizer.{name} must lie in [0, 1), but got {getattr(self, name)}"
            )
        for name in ("warmup_steps", "cooldown_steps"):
            _require(getattr(self, name) >= 0, f"optimizer.{name} must be at least 0, but got {getattr(self, name)}")
        _require(
            self.max_gradient_norm is None or self.max_gradient_norm > 0.0,
            f"optimizer.max_gradient_norm must be above 0 or none, but got {self.max_gradient_norm}",
        )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the trained generator samples unless asked otherwise; for networks that are told their guidance."""

    guidance_scale: float = 1.0
    """omega, at least 1; 1 is no guidance."""
    guidance_interval_start: float = 0.0
    """guidance_interval_start of the guidance interval."""
    guidance_interval_end: float = 1.0
    """guidance_interval_end of the guidance interval."""

    def __post_init__(self) -> None:
        _require(
            1.0 <= self.guidance_scale < math.inf,
            f"sampling.guidance_scale must be at least 1, but got {self.guidance_scale}",
        )
        _require(
            0.0 <= self.guidance_interval_start <= self.guidance_interval_end <= 1.0,
            f"sampling needs 0 <= guidance_interval_start <= guidance_interval_end <= 1, "
            f"but got {self.guidance_interval_start} and {self.guidance_interval_end}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One experiment, whole: what a preset returns, what is logged, and what every checkpoint carries."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The network's size."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The objective."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimiser."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the generator samples unless asked otherwise."""
    guidance_after_steps: int | None = None
    """Steps without guidance of MeanFlow's target before it sets in. None is 0; but in a warm start from flow matching,
    which guidance from the first step on makes unstable, 20 epochs or half the run."""
    ema_decays: tuple[float, ...] = (0.9999,)
    """Decays per step of moving averages of the parameters; the first one is what samples."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """tf32: matrix products with 10 bits on tensor cores, du/dt's too; float32 where there are none. bfloat16 runs the
    network under autocast. Parameters, averages and the optimiser stay in float32."""
    float32_derivative: bool = True
    """Under bfloat16, take du/dt in float32 in a pass of its own; else beside the graded pass, in bfloat16."""
    activation_checkpointing: bool = False
    """Keep only what goes between blocks for backward, and compute the rest again: less memory, a forward more."""
    compile: bool = False
    """torch.compile the network's blocks."""
    global_batch_size: int = 256
    """Rows per optimiser step over all workers."""
    num_steps: int = 1_200_960
    """Optimiser steps; on ImageNet at batch 256 an epoch is 5,004 of them."""
    seed: int = 0
    """Of the initial parameters, the order of the data and every draw of every step."""
    log_interval_steps: int = 100
    """Steps between two rows of metrics."""
    checkpoint_interval_steps: int = 10_000
    """Steps between two checkpoints; the last step always has one."""
    sample_interval_steps: int = 10_000
    """Steps between two grids of samples at fixed seeds, in one step and in two."""

    def __post_init__(self) -> None:
        _require(
            len(self.ema_decays) > 0 and all(0.0 <= decay < 1.0 for decay in self.ema_decays),
            f"ema_decays must be one or more numbers in [0, 1), but got {self.ema_decays}",
        )
        _require(
            len(set(self.ema_decays)) == len(self.ema_decays), f"ema_decays must differ, but got {self.ema_decays}"
        )
        _require(
            self.precision in ("float32", "tf32", "bfloat16"),
            f"precision must be float32, tf32 or bfloat16, but got {self.precision!r}",
        )
        _require(
            (self.loss.objective == "improved_meanflow") == (self.network.architecture == "imf_dit"),
            f"loss.objective improved_meanflow and network.architecture imf_dit go together, "
            f"but got {self.loss.objective} and {self.network.architecture}",
        )
        _require(
            self.sampling.guidance_scale == 1.0 or self.network.architecture == "imf_dit" or self.loss.is_flow_matching,
            f"sampling.guidance_scale is for improved MeanFlow and flow matching; MeanFlow has its guidance in the weights "
            f"(loss.guidance), but got {self.sampling.guidance_scale}",
        )
        _require(
            self.guidance_after_steps is None or self.guidance_after_steps >= 0,
            f"guidance_after_steps must be at least 0, but got {self.guidance_after_steps}",
        )
        _require(
            not self.guidance_after_steps or self.loss.objective == "meanflow",
            "guidance_after_steps is for meanflow; improved_meanflow draws its guidance (loss.guidance_sampling), "
            f"but got {self.guidance_after_steps}",
        )
        for name in (
            "global_batch_size",
            "num_steps",
            "log_interval_steps",
            "checkpoint_interval_steps",
            "sample_interval_steps",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, but got {getattr(self, name)}")

    @property
    def separate_derivative(self) -> bool:
        """True where du/dt has a pass of its own: in float32 under bfloat16; and under checkpointing, which would compute
        it again with the activations."""
        return (self.precision == "bfloat16" and self.float32_derivative) or self.activation_checkpointing

    def loss_at(self, step: int) -> LossConfig:
        """The objective of 0-based step `step`: without guidance before it sets in."""
        if step >= (self.guidance_after_steps or 0):
            return self.loss
        return replace(self.loss, guidance=GuidanceConfig())

    def flat(self) -> dict[str, Any]:
        """{"network.patch_size": 2, "loss.times.logit_mean": -0.4, ...}: for parameters in a tracker."""
        return flatten(asdict(self))


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, its keys joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
