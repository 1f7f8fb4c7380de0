import copy
import json
from dataclasses import replace

import pytest
import torch

from meanflow_core.config import OptimizerConfig
from meanflow_core.latents import LatentNormalization
from meanflow_core.loss import draw_step_record, meanflow_loss
from meanflow_core.presets import debug, debug_imf
from meanflow_core.training import (
    begin_from,
    build_train_state,
    learning_rate,
    load_train_state,
    save_train_state,
    train_step,
    update_emas,
)

IDENTITY = LatentNormalization(mean=(0.0,) * 4, std=(1.0,) * 4)


def fresh_state(config=None):
    return build_train_state(
        config or debug(), sample_size=8, in_channels=4, num_classes=10, device=torch.device("cpu")
    )


def batch(config, step=0):
    record = draw_step_record(
        config.loss, seed=config.seed, step=step, num_rows=config.global_batch_size, latent_shape=(4, 8, 8)
    )
    generator = torch.Generator().manual_seed(step)
    moments = torch.randn(config.global_batch_size, 8, 8, 8, generator=generator).abs()
    return moments, torch.randint(10, (config.global_batch_size,), generator=generator), record


def take_steps(state, config, count):
    metrics = None
    for _ in range(count):
        metrics = train_step(state, state.network, *batch(config, state.step), IDENTITY, config)
    return metrics


def parameters(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_initial_parameters_are_a_function_of_the_seed_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    first, second = fresh_state(), fresh_state()
    assert torch.equal(parameters(first.network), parameters(second.network))
    assert not torch.equal(parameters(first.network), parameters(fresh_state(replace(debug(), seed=1)).network))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_moves_parameters_and_counts_rows():
    config, state = debug(), fresh_state()
    before = parameters(state.network)
    metrics = take_steps(state, config, 1)
    assert state.step == 1
    assert not torch.equal(parameters(state.network), before)
    loss, _, num_equal, _, num_below, head = metrics.sums.tolist()
    assert head == 0.0
    assert (num_equal, num_below) == (12.0, 4.0)
    assert loss == pytest.approx(1.0, abs=0.05)  # p = 1 makes it so; the raw errors are what to watch
    assert metrics.gradient_norm > 0


def test_a_step_of_improved_meanflow_tells_its_velocity_heads_error():
    metrics = take_steps(fresh_state(debug_imf()), debug_imf(), 1)
    loss, equal, num_equal, _, num_below, head = metrics.sums.tolist()
    assert (num_equal, num_below) == (8.0, 8.0)
    assert loss == pytest.approx(2.0, abs=0.1)  # two summands, each weighted to about 1
    assert head / 16 == pytest.approx(equal / 8, rel=0.5)  # fresh heads both say zero


def test_each_ema_is_the_weighted_mean_of_its_past():
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


@pytest.mark.parametrize("config", [replace(debug(), ema_decays=(0.9, 0.99)), debug_imf()], ids=["dit", "imf_dit"])
def test_resume_repeats_the_same_parameters(tmp_path, config):
    straight = fresh_state(config)
    take_steps(straight, config, 6)

    first = fresh_state(config)
    take_steps(first, config, 3)
    save_train_state(first, config, tmp_path)
    assert json.loads((tmp_path / "state.json").read_text())["config"]["optimizer"]["learning_rate"] == 1e-3
    assert not list(tmp_path.glob("*.p*"))  # no pickles
    second = fresh_state(replace(config, seed=5))
    load_train_state(second, tmp_path)
    assert second.step == 3
    take_steps(second, config, 3)
    assert torch.equal(parameters(second.network), parameters(straight.network))
    for decay, ema_network in straight.ema_networks.items():
        assert torch.equal(parameters(second.ema_networks[decay]), parameters(ema_network))


def test_training_may_begin_from_a_trained_network_of_the_same_kind_and_size():
    trained = fresh_state()
    take_steps(trained, debug(), 3)
    state = fresh_state(replace(debug(), seed=9, ema_decays=(0.9, 0.5)))
    begin_from(state, trained.ema_network)
    for network in (state.network, *state.ema_networks.values()):
        assert torch.equal(parameters(network), parameters(trained.ema_network))
    larger = fresh_state(replace(debug(), network=replace(debug().network, depth=3)))
    with pytest.raises(ValueError, match="depth is 2, wanted 3"):
        begin_from(larger, trained.network)
    with pytest.raises(ValueError, match="it is a MeanFlowDiT, wanted ImprovedMeanFlowDiT"):
        begin_from(fresh_state(debug_imf()), trained.network)


def test_rate_warms_up_stays_and_cools_down():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, cooldown_steps=2)
    assert [learning_rate(config, step, 8) for step in range(8)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.5]
    assert learning_rate(config, 9, 8) == 0.0  # a run that goes on past its end stands still
    assert {learning_rate(OptimizerConfig(learning_rate=1.0), step, 8) for step in range(8)} == {1.0}


def test_gradient_clipping_bounds_what_the_optimiser_sees():
    config = replace(debug(), optimizer=OptimizerConfig(max_gradient_norm=1e-3))
    state = fresh_state(config)
    metrics = take_steps(state, config, 1)
    clipped = torch.cat([parameter.grad.flatten() for parameter in state.network.parameters()]).norm()
    assert metrics.gradient_norm > 1e-3
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_network_learns_to_send_noise_to_a_single_point():
    config = replace(debug(), optimizer=OptimizerConfig(learning_rate=3e-3))
    state = fresh_state(config)
    target = torch.full((16, 8, 8, 8), 0.7)
    target[:, 4:] = 0.0  # no posterior spread
    for _ in range(150):
        record = draw_step_record(config.loss, seed=0, step=state.step, num_rows=16, latent_shape=(4, 8, 8))
        train_step(state, state.network, target, torch.zeros(16, dtype=torch.int64), record, IDENTITY, config)
    from meanflow_core.transformer import Conditioning

    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    network = copy.deepcopy(state.ema_network)
    with torch.no_grad():
        zeros = torch.zeros(8)
        conditioning = Conditioning(t=zeros + 1, r=zeros, labels=torch.zeros(8, dtype=torch.int64))
        sample = noise - network(noise, conditioning).u
    assert (sample - 0.7).abs().mean() < 0.25 < (noise - 0.7).abs().mean()


def test_fresh_state_has_the_configured_adam_and_averages_that_nothing_trains():
    state = fresh_state(replace(debug(), optimizer=OptimizerConfig(beta1=0.8, beta2=0.97)))
    assert state.optimizer.param_groups[0]["betas"] == (0.8, 0.97)
    assert state.network.training
    assert not state.ema_network.training
    assert not any(parameter.requires_grad for parameter in state.ema_network.parameters())


@pytest.mark.parametrize(
    ("changes", "in_bfloat16", "beside"),
    [
        ({}, False, True),
        ({"precision": "bfloat16"}, True, False),
        ({"precision": "bfloat16", "float32_derivative": False}, True, True),
        ({"activation_checkpointing": True}, False, False),
    ],
)
def test_precision_and_checkpointing_decide_where_the_derivative_is_taken(changes, in_bfloat16, beside):
    config = replace(debug(), **changes)
    state = fresh_state(config)
    assert state.network.gradient_checkpointing == config.activation_checkpointing
    seen = []

    def graded(z, conditioning, tangent=None, velocity_only=False):
        seen.append((torch.is_autocast_enabled("cpu"), tangent is not None))
        return state.network(z, conditioning, tangent, velocity_only)

    train_step(state, graded, *batch(config), IDENTITY, config)
    assert seen == [(in_bfloat16, beside)]


def test_a_step_draws_its_latents_and_drops_its_labels():
    config = replace(debug(), loss=replace(debug().loss, label_drop_probability=0.5))
    state, (moments, labels, record) = fresh_state(config), batch(config)
    seen = []

    def graded(z, conditioning, tangent=None, velocity_only=False):
        seen.append((z, conditioning))
        return state.network(z, conditioning, tangent, velocity_only)

    train_step(state, graded, moments, labels, record, LatentNormalization(mean=(1.0,) * 4, std=(2.0,) * 4), config)
    [(z, told)] = seen
    mean, std = moments.chunk(2, dim=1)
    t, latents = record.t.view(-1, 1, 1, 1), (mean + std * record.posterior_noise - 1.0) / 2.0
    order = record.rows_ordered
    torch.testing.assert_close(z, ((1 - t) * latents + t * record.noise)[order])
    assert record.label_dropped.any()
    assert torch.equal(told.labels, torch.where(record.label_dropped, 10, labels)[order])  # 10 is the null class


def test_gradients_of_shares_are_over_the_whole_batch_and_scaled():
    config = replace(debug(), optimizer=OptimizerConfig(learning_rate=1e-3))
    moments, labels, record = batch(config)

    def gradient(start, stop, **options):
        state, share = fresh_state(config), record.rows(start, stop, config.loss)
        train_step(state, state.network, moments[start:stop], labels[start:stop], share, IDENTITY, config, **options)
        return torch.cat([parameter.grad.flatten() for parameter in state.network.parameters()])

    whole = gradient(0, 16)
    torch.testing.assert_close(gradient(0, 5) + gradient(5, 16), whole, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(gradient(0, 16, gradient_scale=2.0), 2.0 * whole, atol=1e-6, rtol=1e-4)


def test_a_step_takes_its_own_rate_and_then_averages():
    config = replace(debug(), optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=4))
    state = fresh_state(config)
    for rate in (0.25e-3, 0.5e-3):
        before = parameters(state.ema_network)
        take_steps(state, config, 1)
        assert state.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        torch.testing.assert_close(parameters(state.ema_network), 0.9 * before + 0.1 * parameters(state.network))


def test_metrics_tell_rows_with_r_equal_t_from_the_others():
    config = debug()
    state, (moments, labels, record) = fresh_state(config), batch(config)
    latents = moments[:, :4] + moments[:, 4:] * record.posterior_noise
    errors = meanflow_loss(
        state.network, state.network, latents, labels, record, config.loss, null_label=10, global_num_rows=16
    ).squared_error
    _, equal, _, below, _, _ = train_step(state, state.network, moments, labels, record, IDENTITY, config).sums
    torch.testing.assert_close(below, errors[record.r < record.t].sum())
    torch.testing.assert_close(equal, errors[record.r == record.t].sum())


def test_training_may_begin_from_a_network_out_of_a_folder(tmp_path):
    trained, state = fresh_state(), fresh_state(replace(debug(), seed=9))
    trained.network.save_pretrained(tmp_path)
    begin_from(state, type(trained.network).from_pretrained(tmp_path, low_cpu_mem_usage=False))
    assert torch.equal(parameters(state.network), parameters(trained.network))


def test_state_saved_before_the_first_step_is_restored(tmp_path):
    state, restored = fresh_state(), fresh_state(replace(debug(), seed=1))
    save_train_state(state, debug(), tmp_path)
    load_train_state(restored, tmp_path)
    assert restored.step == 0
    assert torch.equal(parameters(restored.network), parameters(state.network))
    assert take_steps(restored, debug(), 1).gradient_norm == take_steps(state, debug(), 1).gradient_norm
