"""Variants of the training objective, random batches, and helpers that compare losses and gradients."""

from dataclasses import replace

import torch

from meanflow_core.config import (
    GuardConfig,
    GuidanceConfig,
    ImprovedMeanFlowConfig,
    LossConfig,
    MeanFlowConfig,
    TimeSamplingConfig,
)
from meanflow_core.networks.interface import Conditioning, Network
from meanflow_core.objectives.draws import GUIDANCE_INPUTS, StepDraws
from meanflow_core.objectives.interface import Loss, build_objective
from meanflow_core.objectives.row_plan import StepRecord
from meanflow_core.presets.alpha_flow import AlphaFlowConfig, SoFlowConfig
from meanflow_core.presets.consistency import ContinuousConsistencyConfig, DiscreteConsistencyConfig
from meanflow_core.presets.diffusion import DiffusionConfig

NULL = 10
HALF = TimeSamplingConfig(fraction_r_below_t=0.5)
GUIDED = MeanFlowConfig(
    guidance=GuidanceConfig(omega=0.7, kappa=0.5, guidance_interval_start=0.1, guidance_interval_end=0.8),
    times=HALF,
    label_drop_probability=0.3,
)
IMPROVED = ImprovedMeanFlowConfig(times=HALF, label_drop_probability=0.3)
FLOW_MATCHING = MeanFlowConfig(times=TimeSamplingConfig(fraction_r_below_t=0.0))
# With a label_drop_probability above 1/2, labels are also dropped for samples with r < t.
OBJECTIVES = {
    "flow matching": FLOW_MATCHING,
    "no guidance": MeanFlowConfig(times=HALF),
    "omega": MeanFlowConfig(times=HALF, guidance=GuidanceConfig(omega=2.0)),
    "kappa and no null class": MeanFlowConfig(times=HALF, guidance=GuidanceConfig(omega=0.5, kappa=0.5)),
    "omega, kappa, interval": GUIDED,
    "weight of the null class is a rounding error": MeanFlowConfig(
        times=HALF, guidance=GuidanceConfig(omega=0.7, kappa=0.3)
    ),
    "guided flow matching": replace(FLOW_MATCHING, guidance=GuidanceConfig(omega=0.5, kappa=0.5)),
    "labels dropped anywhere": replace(GUIDED, label_drop_probability=0.6),
    "every row r < t": MeanFlowConfig(times=TimeSamplingConfig(fraction_r_below_t=1.0)),
    "own velocity": replace(GUIDED, tangent="own_velocity"),
    "own velocity, no guidance": MeanFlowConfig(times=HALF, tangent="own_velocity"),
    "improved MeanFlow": IMPROVED,
    "improved MeanFlow, labels dropped anywhere": replace(IMPROVED, label_drop_probability=0.6),
}
# Objectives at one step of their schedules.
_GUIDED = {"guidance": GUIDED.guidance, "label_drop_probability": 0.3}
_DROPPED_ANYWHERE = {"guidance": GUIDED.guidance, "label_drop_probability": 0.6}
OTHER_OBJECTIVES: dict[str, LossConfig] = {
    "alpha-Flow": AlphaFlowConfig(ratio=0.3, times=HALF, **_GUIDED),
    "alpha-Flow, no guidance, target clamped": AlphaFlowConfig(
        ratio=0.3, times=HALF, guards=GuardConfig(max_target=0.5)
    ),
    "alpha-Flow at a = 1, labels dropped anywhere": AlphaFlowConfig(ratio=1.0, times=HALF, **_DROPPED_ANYWHERE),
    "alpha-Flow at a = 0": AlphaFlowConfig(ratio=0.0, times=HALF, **_GUIDED),
    "SoFlow": SoFlowConfig(ratio=0.05, times=HALF, norm_p=0.5, **_GUIDED),
    "SoFlow, no guidance": SoFlowConfig(ratio=0.05, times=HALF),
    "continuous consistency": ContinuousConsistencyConfig(derivative_weight=0.4, times=HALF, **_GUIDED),
    "continuous consistency, labels dropped anywhere": ContinuousConsistencyConfig(
        derivative_weight=1.0, times=HALF, **_DROPPED_ANYWHERE
    ),
    "continuous consistency in every row": ContinuousConsistencyConfig(derivative_weight=0.4),
    "ECT": DiscreteConsistencyConfig(stage=1, times=HALF, **_GUIDED),
    "ECT, labels dropped anywhere": DiscreteConsistencyConfig(stage=4, times=HALF, norm_p=1.0, **_DROPPED_ANYWHERE),
    "ECT in every row": DiscreteConsistencyConfig(stage=0),
    "DDPM": DiffusionConfig(**_GUIDED),
    "DDPM, kappa and no null class": DiffusionConfig(guidance=GuidanceConfig(omega=0.5, kappa=0.5)),
    "DDPM, cosine, no guidance": DiffusionConfig(schedule="cosine"),
}

Batch = tuple[torch.Tensor, torch.Tensor, StepRecord]


def make_record(config: LossConfig, **draws: torch.Tensor | None) -> StepRecord:
    """The record of these draws. Posterior noise and mirrored are zero by default."""
    assert draws["noise"] is not None
    assert draws["label_dropped"] is not None
    zeros = {
        "posterior_noise": torch.zeros_like(draws["noise"]),
        "mirrored": torch.zeros_like(draws["label_dropped"]),
    }
    return build_objective(config).record(StepDraws(**(zeros | draws)), 0, len(draws["noise"]))


def draw_record(
    config: LossConfig, *, seed: int, step: int, num_rows: int, latent_shape: tuple[int, int, int]
) -> StepRecord:
    """The record of a step's global batch."""
    objective = build_objective(config)
    draws = objective.draw(seed=seed, step=step, num_rows=num_rows, latent_shape=latent_shape)
    return objective.record(draws, 0, num_rows)


def rows_of(record: StepRecord, start: int, stop: int, config: LossConfig) -> StepRecord:
    """The record of some rows."""
    return build_objective(config).record(record.draws, start, stop)


def draw_batch(num_rows: int = 16, config: LossConfig = GUIDED, dtype: torch.dtype = torch.float32) -> Batch:
    """Latents (4x8x8), labels (10 classes) and the step record of a batch."""
    drawn = draw_record(config, seed=3, step=5, num_rows=num_rows, latent_shape=(4, 8, 8)).draws
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(num_rows, 4, 8, 8, generator=generator).to(dtype)
    labels = torch.randint(10, (num_rows,), generator=generator)
    draws = {name: getattr(drawn, name) for name in ("t", "r", "noise", *GUIDANCE_INPUTS)}
    draws = {name: value.to(dtype) for name, value in draws.items() if value is not None}
    return latents, labels, make_record(config, **draws, label_dropped=drawn.label_dropped)


def run_loss(network: Network, batch: Batch, config: LossConfig, *, separate: bool = False) -> Loss:
    """The loss of a whole batch."""
    return build_objective(config).loss(
        network, network, *batch,
        null_label=NULL, global_num_rows=len(batch[1]), separate_derivative=separate,
    )  # fmt: skip


def conditioning_of(record: StepRecord, labels: torch.Tensor) -> Conditioning:
    """The record's times and guidance with these labels, of which none is dropped."""
    guidance = {name: getattr(record.draws, name) for name in GUIDANCE_INPUTS}
    return Conditioning(t=record.draws.t, r=record.draws.r, labels=labels, **guidance)


def gradients(network: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """The gradients of all parameters as one vector; zero for unused parameters."""
    found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    pairs = zip(found, network.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference, relative to the norm of `theirs`."""
    return float((ours - theirs).norm() / theirs.norm())
