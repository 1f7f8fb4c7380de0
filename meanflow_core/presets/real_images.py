"""Real images, at sizes that two CPU cores can train: Fashion-MNIST in pixels, clothes in latents."""

from dataclasses import replace

from meanflow_core.config import DiTConfig, OptimizerConfig, TrainingConfig
from meanflow_core.config.network import TransformerConfig
from meanflow_core.presets.demo import demo


def fashion() -> TrainingConfig:
    """MeanFlow on Fashion-MNIST, 1x28x28 pixels: 2.6 M parameters, 80 minutes on 2 CPU cores; no published FID."""
    return replace(
        demo(),
        network=DiTConfig(patch_size=4, hidden_size=160, depth=5, num_heads=5),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=200, cooldown_steps=2000),
        ema_decays=(0.99, 0.999),
        mirror=False,  # nearly all shoes point to the left
        num_steps=4000,
        log_interval_steps=50,
        checkpoint_interval_steps=500,
        sample_interval_steps=1000,
    )


def on_fashion(config: TrainingConfig) -> TrainingConfig:
    """Adapts a method of the comparison to Fashion-MNIST's 28x28 pixels: patches of 4x4, no mirror images.

    Raises ValueError for a network that is not a transformer.
    """
    if not isinstance(config.network, TransformerConfig):
        raise ValueError(f"on_fashion requires a transformer, but got {type(config.network).__name__}")
    return replace(config, network=replace(config.network, patch_size=4), mirror=False)


def clothing() -> TrainingConfig:
    """MeanFlow on a few thousand photographs in 8x8 latents: 2.4 M parameters, an hour on 2 CPU cores; no published FID."""
    return replace(
        demo(),
        network=DiTConfig(patch_size=1, hidden_size=160, depth=5, num_heads=5),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=200, cooldown_steps=1500),
        # An average over thousands of steps shows an early network for most of so short a run.
        ema_decays=(0.998, 0.99),
        num_steps=2600,
        log_interval_steps=50,
        checkpoint_interval_steps=500,
        sample_interval_steps=250,
    )
