"""The configuration of a training run: frozen dataclasses, validated on construction. Standard library only.

Fields are hyperparameters as the papers' tables list them; data locations and devices are configured elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

Prediction = Literal["average_velocity", "velocity", "consistency", "epsilon"]
"""What a network predicts, which decides how a generator samples with it; see `pipeline.MeanFlowPipeline`."""

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
    """Base of the networks' configurations: the fields are arguments of the network's class.

    The class also gets sample_size, in_channels and num_classes, which come from the data. It is either a network of
    this package, or any torch.nn.Module whose forward takes (z, t, t - r, labels); see `networks.forward_mode`.
    """

    network: ClassVar[str] = ""
    """The network's class, as "module:Class"."""
    has_velocity_head: ClassVar[bool] = False
    """Whether the network has a v head, and guidance as an input, as improved MeanFlow requires."""

    @property
    def block_counts(self) -> tuple[int, ...]:
        """Number of equal blocks of each kind; empty if unknown. The costs of deep networks are extrapolated by them."""
        return ()

    def with_block_counts(self, counts: tuple[int, ...]) -> Self:
        """A configuration with other `block_counts`."""
        assert not counts, "override this method together with block_counts"
        return self


@dataclass(frozen=True, kw_only=True)
class DiTConfig(NetworkConfig):
    """A DiT: adaptive layer norms conditioned on (t, t - r, label). DiT's Table 1 has the sizes S to XL."""

    network: ClassVar[str] = "meanflow_core.networks.dit:MeanFlowDiT"

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

    def __post_init__(self) -> None:
        _check_transformer(self)
        _require(
            self.hidden_size % 4 == 0,
            f"network.hidden_size must be a multiple of 4 (sine-cosine positions), but got {self.hidden_size}",
        )

    @property
    def block_counts(self) -> tuple[int, ...]:
        """See `NetworkConfig.block_counts`."""
        return (self.depth,)

    def with_block_counts(self, counts: tuple[int, ...]) -> Self:
        """See `NetworkConfig.with_block_counts`."""
        return replace(self, depth=counts[0])


@dataclass(frozen=True, kw_only=True)
class ImprovedDiTConfig(NetworkConfig):
    """Improved MeanFlow's network, with conditioning tokens and a v head."""

    network: ClassVar[str] = "meanflow_core.networks.improved_dit:ImprovedMeanFlowDiT"
    has_velocity_head: ClassVar[bool] = True

    patch_size: int = 2
    """Side of a patch in latent pixels; a 32x32 latent has (32 / patch_size)^2 tokens."""
    hidden_size: int = 768
    """Width of a token."""
    depth: int = 12
    """Number of transformer blocks from the input to each output."""
    num_heads: int = 12
    """Attention heads; must divide hidden_size."""
    mlp_ratio: float = 8 / 3
    """Width of the feed-forward layer, as a multiple of hidden_size."""
    aux_head_depth: int = 8
    """Number of blocks in each of the two heads; the shared trunk has depth - aux_head_depth blocks."""

    def __post_init__(self) -> None:
        _check_transformer(self)
        _require(
            0 <= self.aux_head_depth <= self.depth,
            f"network.aux_head_depth must lie in [0, depth = {self.depth}], but got {self.aux_head_depth}",
        )
        _require(
            self.hidden_size // self.num_heads % 2 == 0,
            f"network.hidden_size / num_heads must be even (rotary positions), "
            f"but got {self.hidden_size} and {self.num_heads}",
        )

    @property
    def block_counts(self) -> tuple[int, ...]:
        """See `NetworkConfig.block_counts`."""
        return self.depth - self.aux_head_depth, self.aux_head_depth

    def with_block_counts(self, counts: tuple[int, ...]) -> Self:
        """See `NetworkConfig.with_block_counts`."""
        return replace(self, depth=sum(counts), aux_head_depth=counts[1])


def _check_transformer(config: DiTConfig | ImprovedDiTConfig) -> None:
    _check(config, "network.", _POSITIVE_INTEGER, "patch_size", "hidden_size", "depth", "num_heads")
    _check(config, "network.", _POSITIVE, "mlp_ratio")
    _require(
        config.hidden_size % config.num_heads == 0,
        f"network.hidden_size must be a multiple of num_heads, but got {config.hidden_size} and {config.num_heads}",
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
                _check(self, "guards.", _POSITIVE, name)


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
        _check(self, "loss.", _IN_0_TO_BELOW_1, "label_drop_probability")

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
        _check(self, "loss.", _NOT_NEGATIVE, "norm_p")
        _check(self, "loss.", _POSITIVE, "norm_eps")


@dataclass(frozen=True, kw_only=True)
class MeanFlowConfig(FlowLossConfig, GuidedLossConfig):
    """MeanFlow, and flow matching if r = t for every sample."""

    objective: ClassVar[str] = "meanflow_core.objectives.meanflow:MeanFlow"

    tangent: Literal["guided_velocity", "own_velocity"] = "guided_velocity"
    """Direction of du/dt: the target's guided velocity, or the network's own conditional velocity at r = t, which has less
    variance and needs no extra forward if kappa > 0 (iMF, Table 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "loss.", _one_of("guided_velocity", "own_velocity"), "tangent")

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
        _require(
            self.times.fraction_r_below_t > 0.0,
            "improved MeanFlow needs loss.times.fraction_r_below_t above 0, but got 0",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam with a constant learning rate as in MeanFlow's Table 4, or with linear warm-up and cool-down."""

    name: str = "adam"
    """adam, adamw, muon (matrices of the blocks by Muon, the rest by AdamW), or "module:function" of your own; see
    `optimizers`."""
    learning_rate: float = 1e-4
    """Learning rate after warm-up."""
    beta1: float = 0.9
    """Decay of the running mean of the gradient."""
    beta2: float = 0.95
    """Decay of the running mean of the squared gradient."""
    momentum: float = 0.95
    """Momentum of muon."""
    weight_decay: float = 0.0
    """Decoupled weight decay of adamw and muon."""
    learning_rate_factors: tuple[tuple[str, float], ...] = ()
    """Factors of the learning rate by prefixes of parameter names, for example (("y_embedder", 0.1),)."""
    warmup_steps: int = 0
    """Number of steps of linear warm-up from 0."""
    cooldown_steps: int = 0
    """Number of final steps with linear cool-down to 0; not in the papers, useful for short runs."""
    max_gradient_norm: float | None = None
    """Clip the gradient to this norm; the papers do not clip."""

    def __post_init__(self) -> None:
        _check(self, "optimizer.", _POSITIVE, "learning_rate")
        _check(self, "optimizer.", _IN_0_TO_BELOW_1, "beta1", "beta2", "momentum")
        _check(self, "optimizer.", _NOT_NEGATIVE, "warmup_steps", "cooldown_steps", "weight_decay")
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

    network: NetworkConfig = field(default_factory=DiTConfig)
    """Architecture and size of the network."""
    loss: LossConfig = field(default_factory=MeanFlowConfig)
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
            not self.loss.needs_velocity_head or self.network.has_velocity_head,
            f"{_class_name(self.loss.objective)} needs a network with a v head (ImprovedDiTConfig), but got "
            f"{_class_name(self.network.network)}",
        )
        _require(
            self.loss.needs_velocity_head or not self.network.has_velocity_head,
            f"{_class_name(self.network.network)} is for improved MeanFlow, but got {_class_name(self.loss.objective)}",
        )
        _require(
            self.sampling.guidance_scale == 1.0
            or self.network.has_velocity_head
            or self.loss.prediction in ("velocity", "epsilon"),
            "sampling.guidance_scale is for improved MeanFlow, flow matching and diffusion; other objectives build guidance "
            f"into the weights (loss.guidance), but got {self.sampling.guidance_scale}",
        )
        _require(
            not self.guidance_after_steps or isinstance(self.loss, GuidedLossConfig),
            "guidance_after_steps is for objectives with loss.guidance; improved MeanFlow draws its guidance "
            f"(loss.guidance_sampling), but got {self.guidance_after_steps}",
        )

    @property
    def separate_derivative(self) -> bool:
        """Whether du/dt is computed in a separate forward: in float32 under bfloat16, and with activation checkpointing,
        which would otherwise recompute it with the activations."""
        return (self.precision == "bfloat16" and self.float32_derivative) or self.activation_checkpointing

    def loss_at(self, step: int) -> LossConfig:
        """The objective at step `step` (from 0), without guidance before `guidance_after_steps`."""
        loss = self.loss.at(step, self.num_steps)
        if isinstance(loss, GuidedLossConfig) and step < (self.guidance_after_steps or 0):
            return replace(loss, guidance=GuidanceConfig())
        return loss

    def flat(self) -> dict[str, Any]:
        """All fields as one dictionary: {"network.patch_size": 2, "loss.times.logit_mean": -0.4, ...}."""
        return flatten(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """All fields as nested dictionaries, with the classes of network and objective."""
        fields = asdict(self)
        fields["network"] = {"class": self.network.network, **fields["network"]}
        fields["loss"] = {"class": self.loss.objective, **fields["loss"]}
        return fields


def _class_name(reference: str) -> str:
    return reference.partition(":")[2]


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dictionaries; keys are joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
