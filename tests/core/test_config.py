import dataclasses

import pytest

from meanflow_core.config import (
    GuidanceConfig,
    GuidanceSamplingConfig,
    LossConfig,
    NetworkConfig,
    SamplingConfig,
    TimeSamplingConfig,
    TrainingConfig,
)
from meanflow_core.presets import PRESETS, imf_network


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: NetworkConfig(hidden_size=100, num_heads=3), "multiple of num_heads"),
        (lambda: TimeSamplingConfig(fraction_r_below_t=1.5), r"\[0, 1\], but got 1.5"),
        (lambda: GuidanceConfig(kappa=1.0), r"kappa must lie in \[0, 1\)"),
        (lambda: GuidanceConfig(t_start=0.8, t_end=0.2), "t_start <= t_end"),
        (lambda: LossConfig(norm_eps=0.0), "norm_eps must be above 0"),
        (lambda: TrainingConfig(num_steps=0), "num_steps must be at least 1"),
        (lambda: TrainingConfig(ema_decays=()), "one or more numbers"),
        (lambda: TrainingConfig(ema_decays=(0.9, 1.0)), r"in \[0, 1\), but got \(0.9, 1.0\)"),
        (lambda: TrainingConfig(ema_decays=(0.9, 0.9)), "must differ"),
        (lambda: TrainingConfig(precision="float16"), "float32 or bfloat16, but got 'float16'"),
        (lambda: TrainingConfig(network=imf_network("B")), "go together"),
        (lambda: NetworkConfig(architecture="unet"), "dit or imf_dit, but got 'unet'"),
        (lambda: NetworkConfig(architecture="imf_dit", depth=4), r"\[0, depth = 4\], but got 8"),
        (lambda: LossConfig(objective="edm"), "meanflow or improved_meanflow, but got 'edm'"),
        (lambda: LossConfig(tangent="ema"), "guided_velocity or own_velocity, but got 'ema'"),
        (
            lambda: LossConfig(objective="improved_meanflow", guidance=GuidanceConfig(omega=2.0)),
            "improved_meanflow draws its own",
        ),
        (lambda: GuidanceSamplingConfig(omega_max=1.0), "omega_max must be above 1"),
        (lambda: GuidanceSamplingConfig(interval_split=1.5), "interval_split must lie in"),
        (lambda: SamplingConfig(guidance_scale=0.5), "guidance_scale must be at least 1"),
        (lambda: SamplingConfig(guidance_start=0.7, guidance_end=0.5), "guidance_start <= guidance_end"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().num_steps = 3


def test_guidance_scale_of_the_paper_follows_from_omega_and_kappa():
    assert GuidanceConfig(omega=0.2, kappa=0.92).effective_scale == pytest.approx(2.5)
    assert GuidanceConfig().is_off
    assert not GuidanceConfig(kappa=0.5).is_off


def test_flat_names_every_number_once():
    flat = PRESETS["xl2"]().flat()
    assert flat["loss.guidance.kappa"] == 0.92
    assert flat["network.depth"] == 28
    assert flat["ema_decays"] == (0.9999,)
    assert not any(isinstance(value, dict) for value in flat.values())


def test_every_preset_says_what_it_is():
    for name, preset in PRESETS.items():
        assert preset.__name__ == name
        assert preset.__doc__
        assert isinstance(preset(), TrainingConfig)
