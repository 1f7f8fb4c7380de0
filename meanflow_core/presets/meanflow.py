"""MeanFlow (arXiv 2505.13447, Tables 1, 2, 4), and flow matching with the same networks.

Batch 256, Adam (0.9, 0.95) at 1e-4, EMA 0.9999, 25 % of samples with r < t, latents normalised by 0.18215.
These presets train in bfloat16 with du/dt in tf32; public trainers use bfloat16 (zhuyu-cs/MeanFlow), or bfloat16 with du/dt
in float32 (NVlabs/FastGen).
"""

from dataclasses import replace

from meanflow_core.config import (
    DiTConfig,
    GuidanceConfig,
    MeanFlowConfig,
    SamplingConfig,
    TimeSamplingConfig,
    TrainingConfig,
)

STEPS_PER_EPOCH = 5004  # 1,281,167 images at batch 256, rounded down

# Width, depth and heads of DiT's sizes (Peebles and Xie 2023, Table 1; M is MeanFlow's).
_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "M": (1024, 16, 16), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def dit_network(size: str, patch_size: int) -> DiTConfig:
    """A DiT of size S, B, M, L or XL, with any patch size that divides the latent size.

    Raises ValueError for an unknown size.
    """
    if size not in _SIZES:
        raise ValueError(f"size must be one of {', '.join(_SIZES)}, but got {size!r}")
    hidden_size, depth, num_heads = _SIZES[size]
    return DiTConfig(patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads)


def _meanflow(size: str, patch_size: int, *, epochs: int, guidance: GuidanceConfig) -> TrainingConfig:
    return TrainingConfig(
        network=dit_network(size, patch_size),
        loss=MeanFlowConfig(guidance=guidance),
        num_steps=epochs * STEPS_PER_EPOCH,
        precision="bfloat16",
    )


def _with_own_velocity(base: TrainingConfig) -> TrainingConfig:
    assert isinstance(base.loss, MeanFlowConfig), "only MeanFlow's tangent can be chosen"
    return replace(base, loss=replace(base.loss, tangent="own_velocity"))


def s2() -> TrainingConfig:
    """MeanFlow-S/2, 80 epochs: 33 M parameters, 6.1 GFLOPs; for development, no published FID."""
    return _meanflow("S", 2, epochs=80, guidance=GuidanceConfig(omega=1.0, kappa=0.5))


def s4() -> TrainingConfig:
    """MeanFlow-S/4, 80 epochs: 33 M parameters, 1.5 GFLOPs; for benchmarks on CPUs, no published FID."""
    return replace(s2(), network=dit_network("S", 4), precision="float32")


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
    return replace(b4(), num_steps=240 * STEPS_PER_EPOCH)


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
    """Flow matching with the B/4 network (as SiT-B/4), 80 epochs: FID 58.9 at 250 NFE (MeanFlow's Table 1).

    Times: the larger of two logit-normal times, as in MeanFlow; SiT's are uniform.
    """
    return replace(b4_unguided(), loss=MeanFlowConfig(times=TimeSamplingConfig(fraction_r_below_t=0.0)))


def fm_xl2() -> TrainingConfig:
    """Flow matching with the XL/2 network (as SiT-XL/2), 1,400 epochs: SiT's FID is 2.06 in 250 steps with guidance 1.5.

    Times as in `fm_b4`.
    """
    return replace(
        fm_b4(),
        network=dit_network("XL", 2),
        num_steps=1400 * STEPS_PER_EPOCH,
        sampling=SamplingConfig(guidance_scale=1.5),
    )
