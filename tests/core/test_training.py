"""Training steps: parameters, averages, rates, precision, shares of a batch, and skipped steps."""

import itertools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from meanflow_core.config import GuidanceConfig, OptimizerConfig, TrainingConfig
from meanflow_core.latents import LatentNormalization
from meanflow_core.networks.interface import Conditioning
from meanflow_core.objectives.interface import Mean, build_objective
from meanflow_core.presets.demo import debug, debug_imf
from meanflow_core.training import (
    Batch,
    StepMetrics,
    contiguous_share,
    learning_rate,
    num_passes,
    read_means,
    relative_ema_distance,
    train_step,
    update_emas,
    warm_up_ddp_buckets,
)
from tests.support.objectives import draw_record
from tests.support.training_steps import (
    IDENTITY,
    broken_batch,
    fresh_state,
    make_batch,
    parameters,
    part_of,
    take_steps,
)


def test_initial_parameters_depend_on_the_seed_alone_and_leave_torchs_generator_unchanged():
    before = torch.get_rng_state()
    first, second = fresh_state(), fresh_state()
    assert torch.equal(parameters(first.network), parameters(second.network))
    assert not torch.equal(parameters(first.network), parameters(fresh_state(replace(debug(), seed=1)).network))
    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_state_has_the_configured_adam_betas_and_averages_that_need_no_gradients():
    state = fresh_state(replace(debug(), optimizer=OptimizerConfig(beta1=0.8, beta2=0.97)))
    assert state.optimizers[0].param_groups[0]["betas"] == (0.8, 0.97)
    assert state.network.training
    assert not state.ema_network.training
    assert not any(parameter.requires_grad for parameter in state.ema_network.parameters())


def means_by_name(config: TrainingConfig, metrics: StepMetrics) -> dict[str, Mean]:
    """The sums and counts of a step's metrics."""
    names = build_objective(config.loss).metric_names
    return {name: Mean(*pair) for name, pair in zip(names, metrics.sums[1:].split(2), strict=True)}


def test_step_moves_parameters_and_counts_rows():
    config, state = debug(), fresh_state()
    before = parameters(state.network)
    metrics = take_steps(state, config, 1)
    assert state.step == 1
    assert not torch.equal(parameters(state.network), before)
    means = means_by_name(config, metrics)
    assert {name for name in means if "/" not in name} == {
        "squared_error_r_equals_t", "squared_error_r_below_t", "dudt_norm"
    }  # fmt: skip
    assert (means["squared_error_r_equals_t"].num_samples, means["squared_error_r_below_t"].num_samples) == (12.0, 4.0)
    assert metrics.sums[0] == pytest.approx(1.0, abs=0.05)  # because norm_p is 1
    assert metrics.gradient_norm > 0


def test_step_of_improved_meanflow_reports_the_error_of_its_velocity_head():
    metrics = take_steps(fresh_state(debug_imf()), debug_imf(), 1)
    means = means_by_name(debug_imf(), metrics)
    assert (means["squared_error_r_equals_t"].num_samples, means["squared_error_v"].num_samples) == (8.0, 16.0)
    assert metrics.sums[0] == pytest.approx(2.0, abs=0.1)  # two terms, each weighted to about 1
    # A fresh network's u and v are zero, so both errors are means of the squared guided velocity, over 8 and 16 samples.
    errors = read_means(build_objective(debug_imf().loss).metric_names, metrics.sums)
    assert errors["squared_error_v"] == pytest.approx(errors["squared_error_r_equals_t"], rel=0.5)


def test_metrics_separate_rows_with_r_equal_to_t_from_the_others():
    config = debug()
    state, batch = fresh_state(config), make_batch(config)
    take_steps(state, config, 1)  # because a fresh network's u, and so du/dt, is zero
    moments, labels, record = batch.moments, batch.labels, batch.record
    t, r = record.draws.t, record.draws.r
    latents = moments[:, :4] + moments[:, 4:] * record.posterior_noise
    output = build_objective(config.loss).loss(
        state.network, state.network, latents, labels, record, null_label=10, global_num_rows=16
    )
    errors, derivatives = output.squared_error, output.dudt.flatten(1).norm(dim=1)
    means = means_by_name(config, train_step(state, state.network, [batch], IDENTITY, config))
    torch.testing.assert_close(means["squared_error_r_below_t"].total, errors[r < t].sum())
    torch.testing.assert_close(means["squared_error_r_equals_t"].total, errors[r == t].sum())
    torch.testing.assert_close(means["dudt_norm"].total, derivatives[r < t].sum())
    assert means["dudt_norm"].total > 0
    for index in range(10):
        in_bin = (t >= index / 10) & (t < (index + 1) / 10)
        found = means[f"squared_error_by_t/{index / 10}"]
        assert found.num_samples == in_bin.sum()
        torch.testing.assert_close(found.total, errors[in_bin].sum())
        found = means[f"dudt_norm_by_t/{index / 10}"]
        assert found.num_samples == (in_bin & (r < t)).sum()
        torch.testing.assert_close(found.total, derivatives[in_bin & (r < t)].sum())


def test_ema_is_the_weighted_mean_of_past_parameters():
    state = fresh_state(replace(debug(), ema_decays=(0.9, 0.5)))
    start = parameters(state.network)
    with torch.no_grad():
        for parameter in state.network.parameters():
            parameter.add_(1.0)
    update_emas(state)
    update_emas(state)
    for decay in (0.9, 0.5):
        torch.testing.assert_close(parameters(state.ema_networks[decay]), start + 1.0 - decay**2)
    assert state.ema_network is state.ema_networks[0.9]


def test_ema_distance_is_relative_to_the_parameters():
    state = fresh_state(replace(debug(), ema_decays=(0.9, 0.5)))
    assert relative_ema_distance(state) == {0.9: 0.0, 0.5: 0.0}
    take_steps(state, debug(), 2)
    for decay, distance in relative_ema_distance(state).items():
        ours = parameters(state.network)
        expected = (parameters(state.ema_networks[decay]) - ours).norm() / ours.norm()
        assert distance == pytest.approx(float(expected), rel=1e-4)


def test_training_starts_from_a_trained_network_of_the_same_kind_and_size(tmp_path):
    trained = fresh_state()
    take_steps(trained, debug(), 1)
    trained.ema_network.save_pretrained(tmp_path)
    loaded = type(trained.network).from_pretrained(tmp_path, low_cpu_mem_usage=False)
    state = fresh_state(replace(debug(), seed=9, ema_decays=(0.9, 0.5)), initial=loaded)
    for network in (state.network, *state.ema_networks.values()):
        assert torch.equal(parameters(network), parameters(trained.ema_network))
    with pytest.raises(ValueError, match="depth is 2, expected 3"):
        fresh_state(replace(debug(), network=replace(debug().network, depth=3)), initial=trained.network)
    with pytest.raises(ValueError, match="class is MeanFlowDiT, expected ImprovedMeanFlowDiT"):
        fresh_state(debug_imf(), initial=trained.network)


def test_learning_rate_warms_up_stays_constant_and_cools_down():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, cooldown_steps=2)
    assert [learning_rate(config, step, 8) for step in range(8)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.5]
    assert learning_rate(config, 9, 8) == 0.0  # past the end of the run
    assert {learning_rate(OptimizerConfig(learning_rate=1.0), step, 8) for step in range(8)} == {1.0}


def test_each_step_uses_its_own_learning_rate_and_then_updates_the_average():
    config = replace(debug(), optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=4))
    state = fresh_state(config)
    for rate in (0.25e-3, 0.5e-3):
        before = parameters(state.ema_network)
        take_steps(state, config, 1)
        assert state.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)
        torch.testing.assert_close(parameters(state.ema_network), 0.9 * before + 0.1 * parameters(state.network))


def test_gradient_is_clipped_to_the_configured_norm():
    config = replace(debug(), optimizer=OptimizerConfig(max_gradient_norm=1e-3))
    state = fresh_state(config)
    metrics = take_steps(state, config, 1)
    clipped = torch.cat([parameter.grad.flatten() for parameter in state.network.parameters()]).norm()
    assert metrics.gradient_norm > 1e-3
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_network_learns_to_map_noise_to_a_single_point():
    config = replace(debug(), optimizer=OptimizerConfig(learning_rate=1e-2))
    state = fresh_state(config)
    point = torch.full((16, 8, 8, 8), 0.7)
    point[:, 4:] = 0.0  # a posterior without variance
    for _ in range(100):
        record = draw_record(config.loss, seed=0, step=state.step, num_rows=16, latent_shape=(4, 8, 8))
        batch = Batch(moments=point, labels=torch.zeros(16, dtype=torch.int64), record=record)
        train_step(state, state.network, [batch], IDENTITY, config)
    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        zeros = torch.zeros(8)
        conditioning = Conditioning(t=zeros + 1, r=zeros, labels=torch.zeros(8, dtype=torch.int64))
        sample = noise - state.ema_network(noise, conditioning).u
    assert (sample - 0.7).abs().mean() < 0.25 < (noise - 0.7).abs().mean()


@pytest.mark.parametrize(
    ("changes", "in_bfloat16", "in_training_forward"),
    [
        ({}, False, True),
        ({"precision": "bfloat16"}, True, False),
        ({"precision": "bfloat16", "derivative_precision": "float32"}, True, False),
        ({"precision": "bfloat16", "derivative_precision": "bfloat16"}, True, True),
        ({"activation_checkpointing": True}, False, False),
    ],
)
def test_precision_and_checkpointing_decide_which_forward_computes_the_derivative(
    changes, in_bfloat16, in_training_forward
):
    config = replace(debug(), **changes)
    state = fresh_state(config)
    assert state.network.gradient_checkpointing == config.activation_checkpointing
    calls = []

    def training_network(z, conditioning, tangent=None, velocity_only=False):
        calls.append((torch.is_autocast_enabled("cpu"), tangent is not None))
        return state.network(z, conditioning, tangent, velocity_only)

    train_step(state, training_network, [make_batch(config)], IDENTITY, config)
    assert calls == [(in_bfloat16, in_training_forward)]


def test_step_samples_latents_from_moments_and_drops_labels():
    config = replace(debug(), loss=replace(debug().loss, label_drop_probability=0.5))
    state, batch = fresh_state(config), make_batch(config)
    moments, labels, record = batch.moments, batch.labels, batch.record
    calls = []

    def training_network(z, conditioning, tangent=None, velocity_only=False):
        calls.append((z, conditioning))
        return state.network(z, conditioning, tangent, velocity_only)

    train_step(state, training_network, [batch], LatentNormalization(mean=(1.0,) * 4, std=(2.0,) * 4), config)
    [(z, conditioning)] = calls
    mean, std = moments.chunk(2, dim=1)
    draws, order = record.draws, record.plan.ordered
    t, latents = draws.t.view(-1, 1, 1, 1), (mean + std * draws.posterior_noise - 1.0) / 2.0
    torch.testing.assert_close(z, ((1 - t) * latents + t * draws.noise)[order])
    assert draws.label_dropped.any()
    null = 10
    assert torch.equal(conditioning.labels, torch.where(draws.label_dropped, null, labels)[order])


def test_guidance_starts_after_the_configured_steps():
    config = replace(debug(), guidance_after_steps=2)
    assert not debug().loss.guidance.is_off
    assert [config.loss_at(step).guidance.is_off for step in range(4)] == [True, True, False, False]
    assert replace(config.loss_at(0), guidance=config.loss.guidance) == config.loss
    unguided = replace(debug(), loss=replace(debug().loss, guidance=GuidanceConfig()))
    first, second = fresh_state(config), fresh_state(config)
    for step in range(3):
        current = replace(config, loss=config.loss_at(step))
        train_step(first, first.network, [make_batch(current, step)], IDENTITY, config)
        plain = unguided if step < 2 else debug()
        train_step(second, second.network, [make_batch(plain, step)], IDENTITY, plain)
    assert torch.equal(parameters(first.network), parameters(second.network))


def test_gradient_of_a_share_is_divided_by_the_global_batch_size_and_scaled():
    config = replace(debug(), optimizer=OptimizerConfig(learning_rate=1e-3))
    batch = make_batch(config)

    def gradient(start, stop, **options):
        state = fresh_state(config)
        train_step(state, state.network, [part_of(batch, start, stop, config)], IDENTITY, config, **options)
        return torch.cat([parameter.grad.flatten() for parameter in state.network.parameters()])

    whole = gradient(0, 16)
    torch.testing.assert_close(gradient(0, 5) + gradient(5, 16), whole, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(gradient(0, 16, gradient_scale=2.0), 2.0 * whole, atol=1e-6, rtol=1e-4)


def test_shares_are_contiguous_and_cover_the_batch():
    for num_parts in (1, 2, 3, 7):
        shares = [contiguous_share(16, part, num_parts) for part in range(num_parts)]
        assert shares[0][0] == 0
        assert shares[-1][1] == 16
        assert all(first[1] == second[0] for first, second in itertools.pairwise(shares))


def test_passes_are_bounded_in_size_and_never_empty():
    assert num_passes(256, 8, None) == 1
    assert num_passes(256, 8, 32) == 1
    assert num_passes(256, 8, 31) == 2
    assert num_passes(256, 1, 32) == 8
    for num_workers, samples_per_pass in itertools.product(range(1, 12), range(1, 12)):
        passes = num_passes(11, num_workers, samples_per_pass)
        shares = [contiguous_share(11, rank, num_workers) for rank in range(num_workers)]
        sizes = [
            stop - start
            for first, last in shares
            for start, stop in (contiguous_share(last - first, number, passes) for number in range(passes))
        ]
        assert min(sizes) >= 1
        # No pass is empty, so if shares differ in size and samples_per_pass is 1, a pass has two samples.
        assert max(sizes) <= max(samples_per_pass, 2)
    with pytest.raises(ValueError, match="at least the number of workers 17, but got 16"):
        num_passes(16, 17, None)


@pytest.mark.parametrize("config", [debug(), debug_imf()], ids=["dit", "imf_dit"])
def test_several_passes_over_a_batch_equal_one(config):
    states = fresh_state(config), fresh_state(config)
    entered = []

    @contextmanager
    def accumulating():
        entered.append(True)
        yield

    for step in range(2):
        whole = make_batch(config, step)
        parts = [part_of(whole, *contiguous_share(16, number, 3), config) for number in range(3)]
        one = train_step(states[0], states[0].network, [whole], IDENTITY, config)
        three = train_step(states[1], states[1].network, parts, IDENTITY, config, accumulating=accumulating)
        torch.testing.assert_close(three.sums, one.sums, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(three.gradient_norm, one.gradient_norm, rtol=1e-4, atol=1e-6)
    assert len(entered) == 2 * 2  # every pass but the last
    torch.testing.assert_close(parameters(states[1].network), parameters(states[0].network), rtol=0, atol=1e-5)


def test_step_with_a_non_finite_gradient_changes_nothing_if_it_may_be_skipped():
    config, state = debug(), fresh_state()
    take_steps(state, config, 2)
    before = [parameters(state.network), parameters(state.ema_network)]
    first = next(state.network.parameters())
    moments = {name: value.clone() for name, value in state.optimizers[0].state[first].items()}
    metrics = train_step(state, state.network, [broken_batch(config, 2)], IDENTITY, config, may_skip=True)
    assert metrics.skipped
    assert not torch.isfinite(metrics.gradient_norm)
    assert (state.step, state.num_skipped) == (3, 1)
    assert torch.equal(parameters(state.network), before[0])
    assert torch.equal(parameters(state.ema_network), before[1])
    for name, value in moments.items():
        assert torch.equal(state.optimizers[0].state[first][name], value)
    assert not take_steps(state, config, 1).skipped
    assert torch.isfinite(parameters(state.network)).all()


def test_step_with_a_non_finite_gradient_is_taken_by_default():
    config, state = debug(), fresh_state()
    metrics = train_step(state, state.network, [broken_batch(config)], IDENTITY, config)
    assert (metrics.skipped, state.num_skipped) == (False, 0)
    assert not torch.isfinite(parameters(state.network)).all()


def test_ddp_warm_up_changes_nothing():
    state = fresh_state()
    take_steps(state, debug(), 1)
    before = parameters(state.network), parameters(state.ema_network)
    warm_up_ddp_buckets(state, state.network, make_batch(debug(), 1), debug())
    assert all(parameter.grad is None for parameter in state.network.parameters())
    assert torch.equal(parameters(state.network), before[0])
    assert torch.equal(parameters(state.ema_network), before[1])
    assert state.step == 1
