"""The configuration of a training run, and of its optimiser and its generator."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from meanflow_core.config.loss import GuidanceConfig, GuidedLossConfig, LossConfig, MeanFlowConfig
from meanflow_core.config.network import DiTConfig, NetworkConfig
from meanflow_core.config.rules import (
    AT_LEAST_1,
    IN_0_TO_BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_INTEGER,
    check,
    check_interval,
    one_of,
    require,
)
from meanflow_core.predictions import needs_many_steps


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimiser and learning rate. The defaults are MeanFlow's (Table 4): Adam with a constant rate."""

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
        check(self, "optimizer.", POSITIVE, "learning_rate")
        check(self, "optimizer.", IN_0_TO_BELOW_1, "beta1", "beta2", "momentum")
        check(self, "optimizer.", NOT_NEGATIVE, "warmup_steps", "cooldown_steps", "weight_decay")
        if self.max_gradient_norm is not None:
            check(self, "optimizer.", POSITIVE, "max_gradient_norm")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Default guidance of the trained generator, for improved MeanFlow, flow matching and diffusion."""

    guidance_scale: float = 1.0
    """Guidance scale, at least 1; 1 is no guidance."""
    guidance_interval_start: float = 0.0
    """Times below this are not guided."""
    guidance_interval_end: float = 1.0
    """Times above this are not guided."""

    def __post_init__(self) -> None:
        check(self, "sampling.", AT_LEAST_1, "guidance_scale")
        check_interval(self, "sampling")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the configurations of all training runs have in common."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser."""
    ema_decays: tuple[float, ...] = (0.9999,)
    """Decays of the moving averages of the parameters, per step. The first average is used for sampling."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """tf32: matrix products with 10-bit mantissas, also in du/dt, on GPUs with tensor cores. bfloat16: autocast.
    Parameters, averages and optimiser stay in float32."""
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
    """Steps between two grids of samples. They have fixed seeds, and are drawn in 1 and in 2 sampling steps; those of flow
    matching and diffusion in 10 and in 25."""

    def __post_init__(self) -> None:
        require(
            len(self.ema_decays) > 0 and all(0.0 <= decay < 1.0 for decay in self.ema_decays),
            f"ema_decays must be one or more numbers in [0, 1), but got {self.ema_decays}",
        )
        require(len(set(self.ema_decays)) == len(self.ema_decays), f"ema_decays must differ, but got {self.ema_decays}")
        check(self, "", one_of("float32", "tf32", "bfloat16"), "precision")
        check(self, "", POSITIVE_INTEGER, "global_batch_size", "num_steps", "log_interval_steps")
        check(self, "", POSITIVE_INTEGER, "checkpoint_interval_steps", "sample_interval_steps")

    @property
    def uses_tf32(self) -> bool:
        """Whether float32 matrix products and convolutions run in TF32."""
        return self.precision == "tf32"

    def flat(self) -> dict[str, Any]:
        """All fields as one dictionary: {"network.patch_size": 2, "loss.times.logit_mean": -0.4, ...}."""
        return flatten(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """All fields as nested dictionaries."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig):
    """The full configuration of an experiment: returned by presets, logged, and saved in every checkpoint."""

    network: NetworkConfig = field(default_factory=DiTConfig)
    """Architecture and size of the network."""
    loss: LossConfig = field(default_factory=MeanFlowConfig)
    """Training objective."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Default sampling of the generator."""
    guidance_after_steps: int | None = None
    """Number of initial steps in which MeanFlow's target has no guidance. Default: 0. For a warm start from flow matching,
    which early guidance makes unstable, the default is 20 epochs, but at most half the run."""
    derivative_precision: Literal["float32", "tf32", "bfloat16"] = "tf32"
    """Precision of du/dt if precision is bfloat16. bfloat16: in the training forward; float32, tf32: in a separate
    forward."""
    mirror: bool = False
    """Mirror each image with probability 1/2; the papers' code does not. A node's copy of the latents then has mirror
    images, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "", one_of("float32", "tf32", "bfloat16"), "derivative_precision")
        require(
            not (self.activation_checkpointing and self.precision == self.derivative_precision == "bfloat16"),
            "derivative_precision must be float32 or tf32 with activation_checkpointing, which computes du/dt in a separate "
            "forward, but got bfloat16",
        )
        if self.guidance_after_steps is not None:
            check(self, "", NOT_NEGATIVE, "guidance_after_steps")
        require(
            not self.loss.needs_velocity_head or self.network.has_velocity_head,
            f"{_class_name(self.loss.objective)} needs a network with a v head (ImprovedDiTConfig), but got "
            f"{_class_name(self.network.network)}",
        )
        require(
            self.loss.needs_velocity_head or not self.network.has_velocity_head,
            f"{_class_name(self.network.network)} is for improved MeanFlow, but got {_class_name(self.loss.objective)}",
        )
        require(
            self.sampling.guidance_scale == 1.0
            or self.network.has_velocity_head
            or needs_many_steps(self.loss.prediction),
            "sampling.guidance_scale is for improved MeanFlow, flow matching and diffusion; other objectives build guidance "
            f"into the weights (loss.guidance), but got {self.sampling.guidance_scale}",
        )
        guidance = self.loss.guidance if isinstance(self.loss, GuidedLossConfig) else GuidanceConfig()  # off
        require(
            guidance.null_weight == 0.0 or self.loss.label_drop_probability > 0.0,
            "guidance with the null class needs loss.label_drop_probability above 0, which trains that class, but got 0",
        )
        require(
            self.sampling.guidance_scale == 1.0 or guidance.is_off,
            "guidance is built into the target already (loss.guidance), so sampling.guidance_scale must be 1, but got "
            f"{self.sampling.guidance_scale}",
        )
        require(
            not self.guidance_after_steps or isinstance(self.loss, GuidedLossConfig),
            "guidance_after_steps is for objectives with loss.guidance; improved MeanFlow draws its guidance "
            f"(loss.guidance_sampling), but got {self.guidance_after_steps}",
        )

    @property
    def separate_derivative(self) -> bool:
        """Whether du/dt is computed in a separate forward: under bfloat16 if it is more precise, and with activation
        checkpointing, which would otherwise recompute it with the activations."""
        is_more_precise = self.precision == "bfloat16" and self.derivative_precision != "bfloat16"
        return is_more_precise or self.activation_checkpointing

    @property
    def uses_tf32(self) -> bool:
        """Whether float32 matrix products and convolutions run in TF32. Under bfloat16, those of du/dt are the only ones."""
        return (self.derivative_precision if self.precision == "bfloat16" else self.precision) == "tf32"

    def loss_at(self, step: int) -> LossConfig:
        """The objective at step `step` (from 0), without guidance before `guidance_after_steps`."""
        loss = self.loss.at(step, self.num_steps)
        if isinstance(loss, GuidedLossConfig) and step < (self.guidance_after_steps or 0):
            return replace(loss, guidance=GuidanceConfig())
        return loss

    def as_dict(self) -> dict[str, Any]:
        """All fields as nested dictionaries, with the classes of network and objective."""
        fields = super().as_dict()
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
