"""The configuration of a training run: frozen dataclasses, validated on construction. Standard library only.

Fields are hyperparameters as the papers' tables list them; data locations and devices are configured elsewhere.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


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
    """Sampling of (t, r): two logit-normal times, sorted (MeanFlow, Table 1d)."""

    logit_mean: float = -0.4
    """Mean of the normal variable whose sigmoid is the time."""
    logit_std: float = 1.0
    """Standard deviation of that variable."""
    fraction_r_below_t: float = 0.25
    """Fraction of a batch with r < t; the other samples have r = t and train the instantaneous velocity. 0 is flow
    matching."""

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
        _require(0.0 < self.omega < math.inf, f"guidance.omega must be above 0, but got {self.omega}")
        _require(0.0 <= self.kappa < 1.0, f"guidance.kappa must lie in [0, 1), but got {self.kappa}")
        _require(
            0.0 <= self.guidance_interval_start <= self.guidance_interval_end <= 1.0,
            f"guidance needs 0 <= guidance_interval_start <= guidance_interval_end <= 1, "
            f"but got {self.guidance_interval_start} and {self.guidance_interval_end}",
        )

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
        _require(self.omega_max > 1.0, f"guidance_sampling.omega_max must be above 1, but got {self.omega_max}")
        _require(
            0.0 <= self.interval_split <= 1.0,
            f"guidance_sampling.interval_split must lie in [0, 1], but got {self.interval_split}",
        )


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
            "loss.guidance is for meanflow; improved_meanflow draws its guidance (loss.guidance_sampling)",
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
    """Default guidance of the trained generator, for improved MeanFlow and flow matching."""

    guidance_scale: float = 1.0
    """Guidance scale, at least 1; 1 is no guidance."""
    guidance_interval_start: float = 0.0
    """Times below this are not guided."""
    guidance_interval_end: float = 1.0
    """Times above this are not guided."""

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
            f"sampling.guidance_scale is for improved MeanFlow and flow matching; MeanFlow's guidance is built into the "
            f"weights (loss.guidance), but got {self.sampling.guidance_scale}",
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
