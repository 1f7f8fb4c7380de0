"""Validation of configurations, and presets against the papers' settings."""

import dataclasses

import pytest

from meanflow_core.config import (
    DiTConfig,
    GuardConfig,
    GuidanceConfig,
    GuidanceSamplingConfig,
    ImprovedDiTConfig,
    ImprovedMeanFlowConfig,
    MeanFlowConfig,
    OptimizerConfig,
    SamplingConfig,
    TimeSamplingConfig,
    TrainingConfig,
)
from meanflow_core.presets import PRESETS
from meanflow_core.presets.alpha_flow import AlphaFlowConfig, SoFlowConfig
from meanflow_core.presets.improved_meanflow import imf_network

NO_R_BELOW_T = TimeSamplingConfig(fraction_r_below_t=0.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiTConfig(hidden_size=100, num_heads=3), "multiple of num_heads"),
        (lambda: TimeSamplingConfig(fraction_r_below_t=1.5), r"fraction_r_below_t must lie in \[0, 1\], but got 1.5"),
        (lambda: GuidanceConfig(kappa=1.0), r"kappa must lie in \[0, 1\)"),
        (
            lambda: GuidanceConfig(guidance_interval_start=0.8, guidance_interval_end=0.2),
            "guidance_interval_start <= guidance_interval_end",
        ),
        (lambda: MeanFlowConfig(norm_eps=0.0), "norm_eps must be above 0"),
        (lambda: TrainingConfig(num_steps=0), "num_steps must be a whole number above 0"),
        (lambda: TrainingConfig(ema_decays=()), "one or more numbers"),
        (lambda: TrainingConfig(ema_decays=(0.9, 1.0)), r"in \[0, 1\), but got \(0.9, 1.0\)"),
        (lambda: TrainingConfig(ema_decays=(0.9, 0.9)), "must differ"),
        (lambda: TrainingConfig(precision="float16"), "one of float32, tf32, bfloat16, but got 'float16'"),
        (
            lambda: TrainingConfig(network=imf_network("B")),
            "ImprovedMeanFlowDiT is for improved MeanFlow, but got MeanFlow",
        ),
        (lambda: TrainingConfig(loss=ImprovedMeanFlowConfig()), "ImprovedMeanFlow needs a network with a v head"),
        (lambda: ImprovedDiTConfig(depth=4), r"\[0, depth = 4\], but got 8"),
        (lambda: GuardConfig(max_target=0.0), "guards.max_target must be above 0, but got 0.0"),
        (lambda: MeanFlowConfig(tangent="ema"), "one of guided_velocity, own_velocity, but got 'ema'"),
        (lambda: GuidanceSamplingConfig(omega_max=1.0), "omega_max must be above 1"),
        (lambda: GuidanceSamplingConfig(interval_split=1.5), "interval_split must lie in"),
        (lambda: SamplingConfig(guidance_scale=0.5), "guidance_scale must be at least 1"),
        (lambda: DiTConfig(hidden_size=6, num_heads=3), "multiple of 4"),
        (lambda: DiTConfig(depth=0), "depth must be a whole number above 0, but got 0"),
        (lambda: ImprovedDiTConfig(aux_head_depth=-1), "but got -1"),
        (lambda: TimeSamplingConfig(logit_std=0.0), "logit_std must be above 0"),
        (lambda: GuidanceConfig(omega=0.0), "omega must be above 0"),
        (lambda: GuidanceConfig(guidance_interval_end=1.2), "guidance_interval_end <= 1"),
        (lambda: GuidanceConfig(guidance_interval_start=-0.2), "0 <= guidance_interval_start"),
        (lambda: MeanFlowConfig(norm_p=-1.0), "norm_p must be at least 0"),
        (lambda: MeanFlowConfig(label_drop_probability=1.0), r"label_drop_probability must lie in \[0, 1\)"),
        (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate must be above 0"),
        (lambda: OptimizerConfig(beta2=1.0), r"beta2 must lie in \[0, 1\)"),
        (lambda: OptimizerConfig(warmup_steps=-1), "warmup_steps must be at least 0"),
        (lambda: OptimizerConfig(max_gradient_norm=0.0), "max_gradient_norm must be above 0"),
        (lambda: DiTConfig(patch_size=2.5), "patch_size must be a whole number above 0, but got 2.5"),
        (lambda: DiTConfig(mlp_ratio=-1.0), "mlp_ratio must be above 0"),
        (lambda: ImprovedDiTConfig(hidden_size=12, num_heads=4), "must be even"),
        (lambda: TimeSamplingConfig(logit_mean=float("nan")), "logit_mean must be finite"),
        (lambda: GuidanceConfig(omega=float("inf")), "omega must be above 0"),
        (lambda: SamplingConfig(guidance_scale=float("inf")), "guidance_scale must be at least 1"),
        (
            lambda: TrainingConfig(sampling=SamplingConfig(guidance_scale=2.0)),
            "other objectives build guidance into the weights",
        ),
        (
            lambda: ImprovedMeanFlowConfig(times=TimeSamplingConfig(fraction_r_below_t=0.0)),
            "needs loss.times.fraction_r_below_t above 0",
        ),
        (lambda: TrainingConfig(guidance_after_steps=-1), "guidance_after_steps must be at least 0, but got -1"),
        (
            lambda: dataclasses.replace(PRESETS["debug_imf"](), guidance_after_steps=5),
            "guidance_after_steps is for objectives with loss.guidance; .* but got 5",
        ),
        (lambda: TrainingConfig(global_batch_size=0), "global_batch_size must be a whole number above 0"),
        (lambda: TrainingConfig(num_steps=1e5), "num_steps must be a whole number above 0, but got 100000.0"),
        (lambda: AlphaFlowConfig(times=NO_R_BELOW_T), "alpha-Flow needs loss.times.fraction_r_below_t above 0"),
        (lambda: SoFlowConfig(times=NO_R_BELOW_T), "SoFlow needs loss.times.fraction_r_below_t above 0"),
        (lambda: SoFlowConfig(ratio=0.0), "loss.ratio must be above 0 and at most 1, but got 0.0"),
        (
            lambda: MeanFlowConfig(
                times=TimeSamplingConfig(fraction_r_below_t=1.0), guidance=GuidanceConfig(omega=0.5, kappa=0.5)
            ),
            "guidance and the own velocity need samples with r = t",
        ),
        (
            lambda: TrainingConfig(loss=MeanFlowConfig(guidance=GuidanceConfig(omega=2.0), label_drop_probability=0.0)),
            "guidance with the null class needs loss.label_drop_probability above 0",
        ),
        (
            lambda: dataclasses.replace(PRESETS["demo_flow_matching"](), sampling=SamplingConfig(guidance_scale=2.0)),
            "guidance is built into the target already .* but got 2.0",
        ),
        (
            lambda: SamplingConfig(guidance_interval_start=0.7, guidance_interval_end=0.5),
            "guidance_interval_start <= guidance_interval_end",
        ),
    ],
)
def test_invalid_values_raise_an_error(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_guided_flow_matching_may_train_without_dropped_labels():
    loss = MeanFlowConfig(guidance=GuidanceConfig(omega=0.5, kappa=0.5), label_drop_probability=0.0)
    assert TrainingConfig(loss=loss)
    assert dataclasses.replace(PRESETS["fm_b4"](), sampling=SamplingConfig(guidance_scale=2.0))


def test_effective_guidance_scale_is_omega_over_one_minus_kappa():
    assert GuidanceConfig(omega=0.2, kappa=0.92).effective_scale == pytest.approx(2.5)
    assert GuidanceConfig().is_off
    assert not GuidanceConfig(kappa=0.5).is_off


def test_flat_configuration_names_every_field():
    flat = PRESETS["xl2"]().flat()
    assert flat["loss.guidance.kappa"] == 0.92
    assert flat["network.depth"] == 28
    assert flat["ema_decays"] == (0.9999,)
    assert not any(isinstance(value, dict) for value in flat.values())


def test_every_preset_has_a_docstring_and_builds_a_configuration():
    for name, preset in PRESETS.items():
        assert preset.__name__ == name
        assert preset.__doc__
        assert isinstance(preset(), TrainingConfig)


def test_defaults_are_those_of_the_meanflow_paper():
    config = TrainingConfig()
    adam, loss = config.optimizer, config.loss
    assert (adam.learning_rate, adam.beta1, adam.beta2, adam.max_gradient_norm) == (1e-4, 0.9, 0.95, None)
    assert (loss.times.logit_mean, loss.times.logit_std, loss.times.fraction_r_below_t) == (-0.4, 1.0, 0.25)
    assert (loss.norm_p, loss.norm_eps, loss.label_drop_probability) == (1.0, 0.01, 0.1)
    assert (config.ema_decays, config.global_batch_size) == ((0.9999,), 256)


@pytest.mark.parametrize(
    ("name", "epochs", "scale", "interval"),
    [
        ("b4_unguided", 80, 1.0, (0.0, 1.0)),
        ("b4_omega3", 80, 3.0, (0.0, 1.0)),
        ("b4", 80, 2.0, (0.0, 1.0)),
        ("b4_240", 240, 2.0, (0.0, 1.0)),
        ("b2", 240, 2.0, (0.0, 1.0)),
        ("m2", 240, 2.0, (0.0, 1.0)),
        ("l2", 240, 2.5, (0.0, 0.8)),
        ("xl2", 240, 2.5, (0.0, 0.75)),
        ("xl2_own", 240, 2.5, (0.0, 0.75)),
        ("xl2_plus", 1000, 2.0, (0.3, 0.8)),
    ],
)
def test_meanflow_presets_have_the_papers_guidance_and_length(name, epochs, scale, interval):
    config = PRESETS[name]()
    guidance = config.loss.guidance
    assert config.num_steps == epochs * (1_281_167 // 256)
    assert guidance.effective_scale == pytest.approx(scale)
    assert (guidance.guidance_interval_start, guidance.guidance_interval_end) == interval


@pytest.mark.parametrize(
    ("name", "scale", "interval"),
    [
        ("imf_b2", 8.0, (0.40, 0.65)),
        ("imf_m2", 10.5, (0.40, 0.60)),
        ("imf_l2", 10.5, (0.40, 0.60)),
        ("imf_xl2", 8.0, (0.42, 0.62)),
    ],
)
def test_improved_presets_have_the_papers_guidance_batch_size_and_length(name, scale, interval):
    config = PRESETS[name]()
    sampling, steps_per_epoch = config.sampling, 1_281_167 // 1024
    assert (sampling.guidance_scale, sampling.guidance_interval_start, sampling.guidance_interval_end) == (
        scale,
        *interval,
    )
    assert (config.global_batch_size, config.num_steps) == (1024, 640 * steps_per_epoch)
    assert config.optimizer.warmup_steps == 10 * steps_per_epoch
    assert config.loss.times.fraction_r_below_t == 0.5


def test_variants_differ_from_their_bases_as_named():
    assert PRESETS["fm_b4"]().loss.is_flow_matching
    own = {name for name, preset in PRESETS.items() if getattr(preset().loss, "tangent", None) == "own_velocity"}
    assert {"b2_own", "xl2_own"} <= own
    assert not {"b2", "xl2"} & own
    assert {name for name, preset in PRESETS.items() if preset().activation_checkpointing} == {"xl2_512"}
    heads = {name: PRESETS[name]().network.num_heads for name in ("s4", "b4", "m2", "l2", "xl2")}
    assert (heads["s4"], heads["b4"], heads["m2"], heads["l2"], heads["xl2"]) == (6, 12, 16, 16, 16)


@pytest.mark.parametrize(
    ("precision", "derivative_precision", "expected"),
    [
        ("float32", "tf32", False), ("tf32", "float32", True), ("bfloat16", "tf32", True),
        ("bfloat16", "float32", False), ("bfloat16", "bfloat16", False),
    ],
)  # fmt: skip
def test_tf32_is_the_trainings_or_under_bfloat16_the_derivatives(precision, derivative_precision, expected):
    config = dataclasses.replace(PRESETS["debug"](), precision=precision, derivative_precision=derivative_precision)
    assert config.uses_tf32 == expected
