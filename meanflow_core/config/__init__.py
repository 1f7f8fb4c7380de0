"""The configuration of a training run: frozen dataclasses, validated on construction. Standard library only.

Fields are hyperparameters as the papers' tables list them; data locations and devices are configured elsewhere.
"""

from meanflow_core.config.loss import (
    FlowLossConfig,
    GuardConfig,
    GuidanceConfig,
    GuidanceSamplingConfig,
    GuidedLossConfig,
    ImprovedMeanFlowConfig,
    LossConfig,
    MeanFlowConfig,
    TimeSamplingConfig,
)
from meanflow_core.config.network import (
    DiTConfig,
    ImprovedDiTConfig,
    NetworkConfig,
)
from meanflow_core.config.refine import RefineConfig
from meanflow_core.config.training import (
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
    flatten,
)

__all__ = [
    "DiTConfig",
    "FlowLossConfig",
    "GuardConfig",
    "GuidanceConfig",
    "GuidanceSamplingConfig",
    "GuidedLossConfig",
    "ImprovedDiTConfig",
    "ImprovedMeanFlowConfig",
    "LossConfig",
    "MeanFlowConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "RefineConfig",
    "RunConfig",
    "SamplingConfig",
    "TimeSamplingConfig",
    "TrainingConfig",
    "flatten",
]
