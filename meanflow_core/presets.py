"""One function per experiment, each returning its full configuration. A variant is `replace(...)` of another.

FID is one network call, 50,000 samples, ImageNet 256x256 (MeanFlow, Table 2, unless said otherwise); GFLOPs are one
forward of one image. Common to the published rows: batch 256, Adam (0.9, 0.95) at 1e-4, EMA 0.9999, 25 % r < t.
"""

from collections.abc import Callable
from dataclasses import replace

from meanflow_core.config import (
    GuidanceConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    TrainingConfig,
)

_STEPS_PER_EPOCH = 5004  # 1,281,167 images at batch 256, rounded down


def b4() -> TrainingConfig:
    """MeanFlow-B/4, 80 epochs, omega 1, kappa 0.5: 131 M parameters, 5.6 GFLOPs; FID 19.15 (authors' repository 18.70)."""
    return TrainingConfig(
        network=NetworkConfig(patch_size=4, hidden_size=768, depth=12, num_heads=12),
        loss=LossConfig(guidance=GuidanceConfig(omega=1.0, kappa=0.5)),
        num_steps=80 * _STEPS_PER_EPOCH,
    )


def b2() -> TrainingConfig:
    """MeanFlow-B/2, 240 epochs: 131 M parameters, 23.1 GFLOPs; FID 6.17."""
    base = b4()
    return replace(base, network=replace(base.network, patch_size=2), num_steps=240 * _STEPS_PER_EPOCH)


def m2() -> TrainingConfig:
    """MeanFlow-M/2, 240 epochs: 308 M parameters, 54.0 GFLOPs; FID 5.01."""
    return replace(b2(), network=NetworkConfig(patch_size=2, hidden_size=1024, depth=16, num_heads=16))


def l2() -> TrainingConfig:
    """MeanFlow-L/2, 240 epochs: 459 M parameters, 80.9 GFLOPs; FID 3.84."""
    base = b2()
    return replace(
        base,
        network=NetworkConfig(patch_size=2, hidden_size=1024, depth=24, num_heads=16),
        loss=replace(base.loss, guidance=GuidanceConfig(omega=0.2, kappa=0.92, t_end=0.8)),
    )


def xl2() -> TrainingConfig:
    """MeanFlow-XL/2, 240 epochs: 676 M parameters, 119.0 GFLOPs; FID 3.43, with two calls 2.93."""
    base = l2()
    return replace(
        base,
        network=NetworkConfig(patch_size=2, hidden_size=1152, depth=28, num_heads=16),
        loss=replace(base.loss, guidance=GuidanceConfig(omega=0.2, kappa=0.92, t_end=0.75)),
    )


def demo() -> TrainingConfig:
    """The drawn shapes, latents 4x8x8: 1.6 M parameters, some six minutes on 2 CPU cores; unpublished, no FID."""
    return TrainingConfig(
        network=NetworkConfig(patch_size=2, hidden_size=128, depth=5, num_heads=4),
        loss=LossConfig(guidance=GuidanceConfig(omega=1.0, kappa=0.5)),
        # A short run wants a high rate, and an average that has forgotten the beginning by the end.
        optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=100, cooldown_steps=300),
        ema_decay=0.99,
        global_batch_size=128,
        num_steps=1500,
        log_interval_steps=25,
        checkpoint_interval_steps=500,
        sample_interval_steps=500,
    )


def debug() -> TrainingConfig:
    """Everything runs and nothing is learnt: seconds on one CPU core, for tests of the machinery."""
    return replace(
        demo(),
        network=NetworkConfig(patch_size=4, hidden_size=64, depth=2, num_heads=2),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        ema_decay=0.9,
        global_batch_size=16,
        num_steps=30,
        log_interval_steps=5,
        checkpoint_interval_steps=15,
        sample_interval_steps=15,
    )


PRESETS: dict[str, Callable[[], TrainingConfig]] = {
    preset.__name__: preset for preset in (b4, b2, m2, l2, xl2, demo, debug)
}
