"""Drawn shapes, 4x8x8 latents: the demo, the methods that the comparison trains, and tiny ones for tests."""

from dataclasses import replace

from meanflow_core.config import (
    DiTConfig,
    GuidanceConfig,
    ImprovedDiTConfig,
    ImprovedMeanFlowConfig,
    LossConfig,
    MeanFlowConfig,
    OptimizerConfig,
    SamplingConfig,
    TimeSamplingConfig,
    TrainingConfig,
)
from meanflow_core.presets.improved_meanflow import imf_b2


def demo() -> TrainingConfig:
    """Demo on drawn shapes, 4x8x8 latents: 1.6 M parameters, about six minutes on 2 CPU cores; no published FID."""
    return TrainingConfig(
        network=DiTConfig(patch_size=2, hidden_size=128, depth=5, num_heads=4),
        loss=MeanFlowConfig(guidance=GuidanceConfig(omega=1.0, kappa=0.5)),
        # A short run needs a high learning rate, and a moving average that forgets the first steps.
        optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=100, cooldown_steps=300),
        ema_decays=(0.99,),
        global_batch_size=128,
        mirror=True,
        num_steps=1500,
        log_interval_steps=25,
        checkpoint_interval_steps=500,
        sample_interval_steps=500,
    )


# The comparison's methods share the effective guidance scale 2, and half of their samples have r < t.
COMPARISON_GUIDANCE = GuidanceConfig(omega=1.0, kappa=0.5)
COMPARISON_TIMES = TimeSamplingConfig(fraction_r_below_t=0.5)


def comparison(loss: LossConfig) -> TrainingConfig:
    """The comparison's training of an objective: a network of 0.9 M parameters, 1,200 steps of 64 images."""
    return replace(
        demo(),
        network=DiTConfig(patch_size=2, hidden_size=96, depth=5, num_heads=4),
        loss=loss,
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=100, cooldown_steps=360),
        global_batch_size=64,
        num_steps=1200,
    )


def demo_flow_matching() -> TrainingConfig:
    """Flow matching on drawn shapes, in the comparison's size; for sampling in many steps."""
    times = TimeSamplingConfig(fraction_r_below_t=0.0)
    return comparison(MeanFlowConfig(times=times, guidance=COMPARISON_GUIDANCE))


def demo_meanflow() -> TrainingConfig:
    """MeanFlow on drawn shapes, in the comparison's size."""
    return comparison(MeanFlowConfig(times=COMPARISON_TIMES, guidance=COMPARISON_GUIDANCE))


def demo_meanflow_own_velocity() -> TrainingConfig:
    """MeanFlow along the network's own velocity on drawn shapes, in the comparison's size."""
    loss = MeanFlowConfig(times=COMPARISON_TIMES, guidance=COMPARISON_GUIDANCE, tangent="own_velocity")
    return comparison(loss)


def demo_improved_meanflow() -> TrainingConfig:
    """Improved MeanFlow on drawn shapes, in the comparison's size, sampled with guidance scale 2."""
    return replace(
        comparison(MeanFlowConfig()),
        network=ImprovedDiTConfig(patch_size=2, hidden_size=96, depth=7, num_heads=4, aux_head_depth=1),
        loss=ImprovedMeanFlowConfig(),
        sampling=SamplingConfig(guidance_scale=COMPARISON_GUIDANCE.effective_scale),
    )


def debug() -> TrainingConfig:
    """A tiny network trained for a few steps, for tests: seconds on one CPU core, too short to learn anything."""
    return replace(
        demo(),
        network=DiTConfig(patch_size=4, hidden_size=64, depth=2, num_heads=2),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        ema_decays=(0.9,),
        global_batch_size=16,
        num_steps=30,
        log_interval_steps=5,
        checkpoint_interval_steps=15,
        sample_interval_steps=15,
    )


def debug_imf() -> TrainingConfig:
    """`debug` with improved MeanFlow's objective and network."""
    return replace(
        debug(),
        network=ImprovedDiTConfig(patch_size=4, hidden_size=64, depth=3, num_heads=2, aux_head_depth=1),
        loss=imf_b2().loss,
        sampling=SamplingConfig(guidance_scale=4.0, guidance_interval_start=0.2, guidance_interval_end=0.8),
    )
