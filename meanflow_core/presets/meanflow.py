"""Presets: one function per experiment, each returning its full configuration. Variants use `replace(...)`.

Unless stated otherwise, FID is the paper's value for 50,000 samples on ImageNet 256x256 with one function evaluation
(1 NFE). No published preset has been trained with this code yet. GFLOPs are for one forward of one image, counting a
multiply-add as one operation.

MeanFlow (arXiv 2505.13447, Tables 1, 2, 4): batch 256, Adam (0.9, 0.95) at 1e-4, EMA 0.9999, 25 % of samples with r < t,
latents normalised by 0.18215. Improved MeanFlow (arXiv 2512.02012): batch 1024, ten epochs of warm-up, 50 % of samples
with r < t, latents normalised per channel (`latents.SD_VAE_FT_MSE_MEAN` and `_STD`, as `latents_mean` and `latents_std`
of the VAE's config).
"""

from collections.abc import Callable
from dataclasses import replace

from meanflow_core.config import (
    GuidanceConfig,
    GuidanceSamplingConfig,
    LossConfig,
    NetworkConfig,
    OptimizerConfig,
    SamplingConfig,
    TimeSamplingConfig,
    TrainingConfig,
)

_STEPS_PER_EPOCH = 5004  # 1,281,167 images at batch 256, rounded down
_IMF_STEPS_PER_EPOCH = 1251  # at batch 1024

# Width, depth and heads of DiT's sizes (Peebles and Xie 2023, Table 1; M is MeanFlow's).
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "M": (1024, 16, 16), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
# Improved MeanFlow's sizes are narrower and deeper.
_IMF_SIZES = {"B": (768, 12, 12), "M": (768, 24, 12), "L": (1024, 32, 16), "XL": (1024, 48, 16)}


def dit_network(size: str, patch_size: int) -> NetworkConfig:
    """A DiT of size S, B, M, L or XL, with any patch size that divides the latent size.

    Raises ValueError for an unknown size.
    """
    if size not in _SIZES:
        raise ValueError(f"size must be one of {', '.join(_SIZES)}, but got {size!r}")
    hidden_size, depth, num_heads = _SIZES[size]
    return NetworkConfig(patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads)


def imf_network(size: str, patch_size: int = 2) -> NetworkConfig:
    """Improved MeanFlow's network of size B, M, L or XL. Raises ValueError for an unknown size."""
    if size not in _IMF_SIZES:
        raise ValueError(f"size must be one of {', '.join(_IMF_SIZES)}, but got {size!r}")
    hidden_size, depth, num_heads = _IMF_SIZES[size]
    return NetworkConfig(
        architecture="imf_dit",
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=8 / 3,
    )


def _meanflow(size: str, patch_size: int, *, epochs: int, guidance: GuidanceConfig) -> TrainingConfig:
    return TrainingConfig(
        network=dit_network(size, patch_size), loss=LossConfig(guidance=guidance), num_steps=epochs * _STEPS_PER_EPOCH
    )


def _with_own_velocity(base: TrainingConfig) -> TrainingConfig:
    return replace(base, loss=replace(base.loss, tangent="own_velocity"))


def s2() -> TrainingConfig:
    """MeanFlow-S/2, 80 epochs: 33 M parameters, 6.1 GFLOPs; for development, no published FID."""
    return _meanflow("S", 2, epochs=80, guidance=GuidanceConfig(omega=1.0, kappa=0.5))


def s4() -> TrainingConfig:
    """MeanFlow-S/4, 80 epochs: 33 M parameters, 1.5 GFLOPs; for benchmarks on CPUs, no published FID."""
    return replace(s2(), network=dit_network("S", 4))


def b4_unguided() -> TrainingConfig:
    """MeanFlow-B/4, 80 epochs, no guidance: 131 M parameters, 5.6 GFLOPs; FID 61.06 (authors' repository 60.75)."""
    return _meanflow("B", 4, epochs=80, guidance=GuidanceConfig())


def b4_omega3() -> TrainingConfig:
    """MeanFlow-B/4, 80 epochs, omega 3, kappa 0: FID 15.53, the best of Table 1f."""
    return _meanflow("B", 4, epochs=80, guidance=GuidanceConfig(omega=3.0))


def b4() -> TrainingConfig:
    """MeanFlow-B/4, 80 epochs, omega 1, kappa 0.5: FID 19.15 (authors' repository 18.70)."""
    return _meanflow("B", 4, epochs=80, guidance=GuidanceConfig(omega=1.0, kappa=0.5))


def b4_240() -> TrainingConfig:
    """MeanFlow-B/4, 240 epochs, omega 1, kappa 0.5: FID 11.35 (authors' repository); the released checkpoint."""
    return replace(b4(), num_steps=240 * _STEPS_PER_EPOCH)


def b2() -> TrainingConfig:
    """MeanFlow-B/2, 240 epochs: 131 M parameters, 23.1 GFLOPs; FID 6.17."""
    return _meanflow("B", 2, epochs=240, guidance=GuidanceConfig(omega=1.0, kappa=0.5))


def b2_own() -> TrainingConfig:
    """MeanFlow-B/2 with du/dt along the network's own velocity, 240 epochs: FID 5.97 (iMF, Table 1)."""
    return _with_own_velocity(b2())


def m2() -> TrainingConfig:
    """MeanFlow-M/2, 240 epochs: 308 M parameters, 54.0 GFLOPs; FID 5.01."""
    return replace(b2(), network=dit_network("M", 2))


def l2() -> TrainingConfig:
    """MeanFlow-L/2, 240 epochs: 459 M parameters, 80.9 GFLOPs; FID 3.84."""
    return _meanflow("L", 2, epochs=240, guidance=GuidanceConfig(omega=0.2, kappa=0.92, guidance_interval_end=0.8))


def xl2() -> TrainingConfig:
    """MeanFlow-XL/2, 240 epochs: 676 M parameters, 119.0 GFLOPs; FID 3.43, and 2.93 at 2 NFE."""
    return _meanflow("XL", 2, epochs=240, guidance=GuidanceConfig(omega=0.2, kappa=0.92, guidance_interval_end=0.75))


def xl2_own() -> TrainingConfig:
    """MeanFlow-XL/2 with du/dt along the network's own velocity, 240 epochs: FID 2.99 (iMF, Section 4)."""
    return _with_own_velocity(xl2())


def xl2_plus() -> TrainingConfig:
    """MeanFlow-XL/2+, 1000 epochs: FID 2.20 at 2 NFE. Its guidance settings were transcribed once and not verified."""
    return _meanflow(
        "XL",
        2,
        epochs=1000,
        guidance=GuidanceConfig(omega=1.0, kappa=0.5, guidance_interval_start=0.3, guidance_interval_end=0.8),
    )


def xl2_512() -> TrainingConfig:
    """MeanFlow-XL/2 for 512x512 images (64x64 latents, 1,024 tokens): 525 GFLOPs; no published FID.

    The image size comes from the data; this is xl2 with activation checkpointing for four times as many tokens.
    """
    return replace(xl2(), activation_checkpointing=True)


def fm_b4() -> TrainingConfig:
    """Flow matching with the B/4 network (SiT-B/4), 80 epochs: FID 58.9 at 250 NFE (MeanFlow's Table 1)."""
    base = b4_unguided()
    return replace(base, loss=replace(base.loss, times=TimeSamplingConfig(fraction_r_below_t=0.0)))


def fm_xl2() -> TrainingConfig:
    """Flow matching with the XL/2 network (SiT-XL/2): FID 2.06 in 250 guided steps, after 1,400 epochs."""
    return replace(fm_b4(), network=dit_network("XL", 2), num_steps=1400 * _STEPS_PER_EPOCH)


def _improved(size: str, sampling: SamplingConfig) -> TrainingConfig:
    return TrainingConfig(
        network=imf_network(size),
        loss=LossConfig(
            objective="improved_meanflow",
            tangent="own_velocity",
            times=TimeSamplingConfig(fraction_r_below_t=0.5),
            # Published for B/2 only; for larger networks, the authors give 1 or 2 without saying which.
            guidance_sampling=GuidanceSamplingConfig(omega_power=1.0),
        ),
        optimizer=OptimizerConfig(warmup_steps=10 * _IMF_STEPS_PER_EPOCH),
        sampling=sampling,
        global_batch_size=1024,
        num_steps=640 * _IMF_STEPS_PER_EPOCH,
    )


def imf_b2() -> TrainingConfig:
    """iMF-B/2, 640 epochs: 89 M parameters (146 M in training), 24.9 GFLOPs; FID 3.39 at omega 8 in [0.40, 0.65]."""
    return _improved("B", SamplingConfig(guidance_scale=8.0, guidance_interval_start=0.40, guidance_interval_end=0.65))


def imf_b2_240() -> TrainingConfig:
    """iMF-B/2, 240 epochs at batch 256, as in the paper's ablations: FID 3.82."""
    return replace(
        imf_b2(),
        global_batch_size=256,
        num_steps=240 * _STEPS_PER_EPOCH,
        optimizer=OptimizerConfig(warmup_steps=10 * _STEPS_PER_EPOCH),
    )


def imf_m2() -> TrainingConfig:
    """iMF-M/2, 640 epochs: 174 M parameters (231 M in training); FID 2.27 at omega 10.5 in [0.40, 0.60]."""
    return _improved("M", SamplingConfig(guidance_scale=10.5, guidance_interval_start=0.40, guidance_interval_end=0.60))


def imf_l2() -> TrainingConfig:
    """iMF-L/2, 640 epochs: 409 M parameters (510 M in training), 116.4 GFLOPs; FID 1.86 at omega 10.5 in [0.40, 0.60]."""
    return _improved("L", SamplingConfig(guidance_scale=10.5, guidance_interval_start=0.40, guidance_interval_end=0.60))


def imf_xl2() -> TrainingConfig:
    """iMF-XL/2, 640 epochs: 610 M parameters (711 M in training), 174.6 GFLOPs; FID 1.72 at omega 8 in [0.42, 0.62].

    FID 1.54 at 2 NFE, with omega 4 in [0.36, 0.64].
    """
    return _improved("XL", SamplingConfig(guidance_scale=8.0, guidance_interval_start=0.42, guidance_interval_end=0.62))


def demo() -> TrainingConfig:
    """Demo on drawn shapes, 4x8x8 latents: 1.6 M parameters, about six minutes on 2 CPU cores; no published FID."""
    return TrainingConfig(
        network=NetworkConfig(patch_size=2, hidden_size=128, depth=5, num_heads=4),
        loss=LossConfig(guidance=GuidanceConfig(omega=1.0, kappa=0.5)),
        # A short run needs a high learning rate, and a moving average that forgets the first steps.
        optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=100, cooldown_steps=300),
        ema_decays=(0.99,),
        global_batch_size=128,
        num_steps=1500,
        log_interval_steps=25,
        checkpoint_interval_steps=500,
        sample_interval_steps=500,
    )


def debug() -> TrainingConfig:
    """A tiny network trained for a few steps, for tests: seconds on one CPU core, too short to learn anything."""
    return replace(
        demo(),
        network=NetworkConfig(patch_size=4, hidden_size=64, depth=2, num_heads=2),
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
        network=NetworkConfig(
            architecture="imf_dit",
            patch_size=4,
            hidden_size=64,
            depth=3,
            num_heads=2,
            mlp_ratio=8 / 3,
            aux_head_depth=1,
        ),
        loss=imf_b2().loss,
        sampling=SamplingConfig(guidance_scale=4.0, guidance_interval_start=0.2, guidance_interval_end=0.8),
    )


PRESETS: dict[str, Callable[[], TrainingConfig]] = {
    preset.__name__: preset
    for preset in (
        s2, s4, b4_unguided, b4_omega3, b4, b4_240, b2, b2_own, m2, l2, xl2, xl2_own, xl2_plus, xl2_512, fm_b4, fm_xl2,
        imf_b2, imf_b2_240, imf_m2, imf_l2, imf_xl2, demo, debug, debug_imf,
    )
}  # fmt: skip
