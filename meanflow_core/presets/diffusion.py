"""Diffusion with noise prediction (DDPM, Ho et al. 2020), sampled by DDIM."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from meanflow_core.config import GuidedLossConfig, TrainingConfig
from meanflow_core.config.rules import check, one_of, require
from meanflow_core.predictions import Prediction
from meanflow_core.presets.demo import COMPARISON_GUIDANCE, comparison
from meanflow_core.presets.meanflow import b4_unguided


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(GuidedLossConfig):
    """DDPM: the network predicts the noise."""

    objective: ClassVar[str] = "meanflow_core.objectives.diffusion:Diffusion"

    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule: betas from 1e-4 to 0.02 as in DDPM and DiT, or the cosine of Nichol and Dhariwal 2021."""
    num_timesteps: int = 1000
    """Number of noise levels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "loss.", one_of("linear", "cosine"), "schedule")
        require(self.num_timesteps >= 2, f"loss.num_timesteps must be at least 2, but got {self.num_timesteps}")

    @property
    def prediction(self) -> Prediction:
        """The noise."""
        return "epsilon"


def ddpm_b4() -> TrainingConfig:
    """DDPM of the B/4 network with the linear schedule, 80 epochs, no guidance (DiT-B/4); FID 68.4 at 250 NFE (DiT, Table 4).

    The FID was recalled and not verified. DiT also learns the variance, which DDIM does not use.
    """
    return replace(b4_unguided(), loss=DiffusionConfig())


def ddpm_cosine_b4() -> TrainingConfig:
    """`ddpm_b4` with the cosine schedule; no published FID."""
    return replace(ddpm_b4(), loss=DiffusionConfig(schedule="cosine"))


def demo_ddpm() -> TrainingConfig:
    """DDPM with the linear schedule on drawn shapes, in the comparison's size, at twice the other methods' learning rate.

    Searched with one seed and 500 samples: 2e-3, 4e-3 and 8e-3 reach distances of 34, 26 and 18 in 8 steps.
    """
    config = comparison(DiffusionConfig(guidance=COMPARISON_GUIDANCE))
    return replace(config, optimizer=replace(config.optimizer, learning_rate=8e-3))


def demo_ddpm_cosine() -> TrainingConfig:
    """DDPM with the cosine schedule on drawn shapes, in the comparison's size."""
    return replace(demo_ddpm(), loss=DiffusionConfig(schedule="cosine", guidance=COMPARISON_GUIDANCE))
