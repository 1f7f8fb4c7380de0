"""The configuration of a training run: frozen dataclasses, validated on construction. Standard library only.

Fields are hyperparameters as the papers' tables list them; data locations and devices are configured elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

_Rule = tuple[str, Callable[[Any], bool]]  # the requirement in words, and its test
_POSITIVE: _Rule = ("be above 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE: _Rule = ("be at least 0", lambda value: 0 <= value < math.inf)
_AT_LEAST_1: _Rule = ("be at least 1", lambda value: 1 <= value < math.inf)
_IN_0_TO_1: _Rule = ("lie in [0, 1]", lambda value: 0 <= value <= 1)
_IN_0_TO_BELOW_1: _Rule = ("lie in [0, 1)", lambda value: 0 <= value < 1)
_POSITIVE_INTEGER: _Rule = ("be a whole number above 0", lambda value: isinstance(value, int) and value >= 1)


def _one_of(*choices: str) -> _Rule:
    return f"be one of {', '.join(choices)}", lambda value: value in choices


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check(config: object, section: str, rule: _Rule, *names: str) -> None:
    """Raises ValueError for the first field whose value violates the rule. section: prefix of the names in the error."""
    requirement, holds = rule
    for name in names:
        value = getattr(config, name)
        _require(holds(value), f"{section}{name} must {requirement}, but got {value!r}")


def _check_interval(config: "GuidanceConfig | SamplingConfig", section: str) -> None:
    start, end = config.guidance_interval_start, config.guidance_interval_end
    _require(
        0.0 <= start <= end <= 1.0,
        f"{section} needs 0 <= guidance_interval_start <= guidance_interval_end <= 1, but got {start} and {end}",
    )


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Architecture and size of the network (DiT's Table 1 has S to XL). Latent shape and classes come from the data."""

    architecture: Literal["dit", "imf_dit"] = "dit"
    """dit: adaptive layer norms conditioned on (t, t - r, label). imf_dit: improved MeanFlow's network, with conditioning
    tokens and a v head."""
    patch_size: int = 2
    """Side of a patch in latent pixels; a 32x32 latent has (32 / patch_size)^2 tokens."""
    hidden_size: int = 768
    """Width of a token."""
    depth: int = 12
    """Number of transformer blocks."""
    num_heads: int = 12
    """Attention heads; must divide hidden_size."""
    mlp_ratio: float = 4.0
    """Width of the feed-forward layer, as a multiple of hidden_size."""
    aux_head_depth: int = 8
    """Number of blocks in each of imf_dit's two heads; the shared trunk has depth - aux_head_depth blocks."""

    def __post_init__(self) -> None:
        _check(self, "network.", _one_of("dit", "imf_dit"), "architecture")
        _check(self, "network.", _POSITIVE_INTEGER, "patch_size", "hidden_size", "depth", "num_heads")
        _check(self, "network.", _POSITIVE, "mlp_ratio")
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
    """Sampling of (t, r): two logit-normal times, sorted (MeanFlow, Table 1d)."""

    logit_mean: float = -0.4
    """Mean of the normal variable whose sigmoid is the time."""
    logit_std: float = 1.0
    """Standard deviation of that variable."""
    fraction_r_below_t: float = 0.25
    """Fraction of a batch with r < t; the other samples have r = t and train the instantaneous velocity. 0 is flow
    matching."""

    def __post_init__(self) -> None:
        _check(self, "times.", ("be finite", math.isfinite), "logit_mean")
        _check(self, "times.", _POSITIVE, "logit_std")
        _check(self, "times.", _IN_0_TO_1, "fraction_r_below_t")


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Classifier-free guidance built into the target velocity (MeanFlow, Eq. 19 to 21).

    v_guided = omega v_t + kappa u(z_t, t, t | label) + (1 - omega - kappa) u(z_t, t, t | null). The effective scale is
    omega / (1 - kappa). Sampling then needs no guidance.
    """

    omega: float = 1.0
    """Weight of the sample's conditional velocity v_t; omega = 1 and kappa = 0 disable guidance."""
    kappa: float = 0.0
    """Weight of the network's own conditional velocity, below 1."""
    guidance_interval_start: float = 0.0
    """Samples with t below this are not guided."""
    guidance_interval_end: float = 1.0
    """Samples with t above this are not guided."""

    def __post_init__(self) -> None:
        _check(self, "guidance.", _POSITIVE, "omega")
        _check(self, "guidance.", _IN_0_TO_BELOW_1, "kappa")
        _check_interval(self, "guidance")

    @property
    def is_off(self) -> bool:
        """Whether v_guided is v_t for every sample."""
        return self.omega == 1.0 and self.kappa == 0.0

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
        _check(self, "guidance_sampling.", ("be above 1", lambda value: 1 < value < math.inf), "omega_max")
        _check(self, "guidance_sampling.", _IN_0_TO_1, "interval_split")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The training objective: flow matching (r = t for every sample), MeanFlow, or improved MeanFlow."""

    objective: Literal["meanflow", "improved_meanflow"] = "meanflow"
    """meanflow: fixed guidance (`guidance`), built into the weights. improved_meanflow: guidance drawn per sample
    (`guidance_sampling`) and given to the network as an input, and a second loss on its v head."""
    times: TimeSamplingConfig = field(default_factory=TimeSamplingConfig)
    """Sampling of t and r."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Guidance of the target, for meanflow."""
    guidance_sampling: GuidanceSamplingConfig = field(default_factory=GuidanceSamplingConfig)
    """Sampling of guidance, for improved_meanflow."""
    tangent: Literal["guided_velocity", "own_velocity"] = "guided_velocity"
    """Direction of du/dt: the target's guided velocity, or the network's own conditional velocity at r = t, which has less
    variance and needs no extra forward if kappa > 0 (iMF, Table 1). improved_meanflow always uses its own."""
    norm_p: float = 1.0
    """Power p of the adaptive weight 1 / (||error||^2 + norm_eps)^p; 0 is the plain squared error."""
    norm_eps: float = 0.01
    """Constant c of the adaptive weight."""
    label_drop_probability: float = 0.1
    """Fraction of samples whose label is replaced by the null class. If enough samples have r = t, only those are
    chosen."""

    @property
    def is_flow_matching(self) -> bool:
        """Whether the network learns only the instantaneous velocity, for sampling in many steps."""
        return self.times.fraction_r_below_t == 0.0

    @property
    def uses_own_velocity(self) -> bool:
        """Whether du/dt is taken along the network's own conditional velocity."""
        return self.tangent == "own_velocity" or self.objective == "improved_meanflow"

    def __post_init__(self) -> None:
        _check(self, "loss.", _one_of("meanflow", "improved_meanflow"), "objective")
        _check(self, "loss.", _one_of("guided_velocity", "own_velocity"), "tangent")
        _check(self, "loss.", _NOT_NEGATIVE, "norm_p")
        _check(self, "loss.", _POSITIVE, "norm_eps")
        _check(self, "loss.", _IN_0_TO_BELOW_1, "label_drop_probability")
        _require(
            self.objective == "meanflow" or self.guidance.is_off,
            "loss.guidance is for meanflow; improved_meanflow draws its guidance (loss.guidance_sampling)",
        )
        _require(
            self.objective == "meanflow" or not self.is_flow_matching,
            "loss.objective improved_meanflow needs loss.times.fraction_r_below_t above 0; flow matching is meanflow at 0",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam with a constant learning rate as in MeanFlow's Table 4, or with linear warm-up and cool-down."""

    learning_rate: float = 1e-4
    """Learning rate after warm-up."""
    beta1: float = 0.9
    """Decay of the running mean of the gradient."""
    beta2: float = 0.95
    """Decay of the running mean of the squared gradient."""
    warmup_steps: int = 0
    """Number of steps of linear warm-up from 0."""
    cooldown_steps: int = 0
    """Number of final steps with linear cool-down to 0; not in the papers, useful for short runs."""
    max_gradient_norm: float | None = None
    """Clip the gradient to this norm; the papers do not clip."""

    def __post_init__(self) -> None:
        _check(self, "optimizer.", _POSITIVE, "learning_rate")
        _check(self, "optimizer.", _IN_0_TO_BELOW_1, "beta1", "beta2")
        _check(self, "optimizer.", _NOT_NEGATIVE, "warmup_steps", "cooldown_steps")
        if self.max_gradient_norm is not None:
            _check(self, "optimizer.", _POSITIVE, "max_gradient_norm")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Default guidance of the trained generator, for improved MeanFlow and flow matching."""

    guidance_scale: float = 1.0
    """Guidance scale, at least 1; 1 is no guidance."""
    guidance_interval_start: float = 0.0
    """Times below this are not guided."""
    guidance_interval_end: float = 1.0
    """Times above this are not guided."""

    def __post_init__(self) -> None:
        _check(self, "sampling.", _AT_LEAST_1, "guidance_scale")
        _check_interval(self, "sampling")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The full configuration of an experiment: returned by presets, logged, and saved in every checkpoint."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Architecture and size of the network."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Training objective."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Default sampling of the generator."""
    guidance_after_steps: int | None = None
    """Number of initial steps in which MeanFlow's target has no guidance. Default: 0. For a warm start from flow matching,
    which early guidance makes unstable, the default is 20 epochs, but at most half the run."""
    ema_decays: tuple[float, ...] = (0.9999,)
    """Decays of the moving averages of the parameters, per step. The first average is used for sampling."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """tf32: matrix products with 10-bit mantissas, also in du/dt, on GPUs with tensor cores. bfloat16: autocast.
    Parameters, averages and optimiser stay in float32."""
    float32_derivative: bool = True
    """With bfloat16, compute du/dt in a separate float32 forward instead of the training forward."""
    activation_checkpointing: bool = False
    """Store block inputs only and recompute activations in backward (one extra forward)."""
    compile: bool = False
    """Compile the network's blocks with torch.compile."""
    global_batch_size: int = 256
    """Samples per optimiser step over all workers."""
    num_steps: int = 1_200_960
    """Number of optimiser steps; an epoch of ImageNet at batch 256 is 5,004 steps."""
    seed: int = 0
    """Seed of the initial parameters, the data order and every random draw."""
    log_interval_steps: int = 100
    """Steps between two logs of metrics."""
    checkpoint_interval_steps: int = 10_000
    """Steps between two checkpoints; the last step always saves one."""
    sample_interval_steps: int = 10_000
    """Steps between two grids of samples, which have fixed seeds and are drawn in 1 and in 2 sampling steps."""

    def __post_init__(self) -> None:
        _require(
            len(self.ema_decays) > 0 and all(0.0 <= decay < 1.0 for decay in self.ema_decays),
            f"ema_decays must be one or more numbers in [0, 1), but got {self.ema_decays}",
        )
        _require(
            len(set(self.ema_decays)) == len(self.ema_decays), f"ema_decays must differ, but got {self.ema_decays}"
        )
        _check(self, "", _one_of("float32", "tf32", "bfloat16"), "precision")
        _check(self, "", _AT_LEAST_1, "global_batch_size", "num_steps", "log_interval_steps")
        _check(self, "", _AT_LEAST_1, "checkpoint_interval_steps", "sample_interval_steps")
        if self.guidance_after_steps is not None:
            _check(self, "", _NOT_NEGATIVE, "guidance_after_steps")
        _require(
            (self.loss.objective == "improved_meanflow") == (self.network.architecture == "imf_dit"),
            f"loss.objective improved_meanflow and network.architecture imf_dit go together, "
            f"but got {self.loss.objective} and {self.network.architecture}",
        )
        _require(
            self.sampling.guidance_scale == 1.0 or self.network.architecture == "imf_dit" or self.loss.is_flow_matching,
            f"sampling.guidance_scale is for improved MeanFlow and flow matching; MeanFlow's guidance is built into the "
            f"weights (loss.guidance), but got {self.sampling.guidance_scale}",
        )
        _require(
            not self.guidance_after_steps or self.loss.objective == "meanflow",
            "guidance_after_steps is for meanflow; improved_meanflow draws its guidance (loss.guidance_sampling), "
            f"but got {self.guidance_after_steps}",
        )

    @property
    def separate_derivative(self) -> bool:
        """Whether du/dt is computed in a separate forward: in float32 under bfloat16, and with activation checkpointing,
        which would otherwise recompute it with the activations."""
        return (self.precision == "bfloat16" and self.float32_derivative) or self.activation_checkpointing

    def loss_at(self, step: int) -> LossConfig:
        """The objective at step `step` (from 0), without guidance before `guidance_after_steps`."""
        if step >= (self.guidance_after_steps or 0):
            return self.loss
        return replace(self.loss, guidance=GuidanceConfig())

    def flat(self) -> dict[str, Any]:
        """All fields as one dictionary: {"network.patch_size": 2, "loss.times.logit_mean": -0.4, ...}."""
        return flatten(asdict(self))


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dictionaries; keys are joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
