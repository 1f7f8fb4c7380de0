"""Building a training objective from its configuration."""

from typing import Any

from meanflow_core.config import LossConfig
from meanflow_core.objectives.interface import Objective
from meanflow_core.objectives.meanflow import MeanFlow


def build_objective(config: LossConfig) -> Objective[Any]:
    """The objective with this configuration."""
    return MeanFlow(config)
