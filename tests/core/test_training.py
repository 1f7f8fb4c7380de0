import copy
import json
from dataclasses import replace

import pytest
import torch

from meanflow_core.config import OptimizerConfig
from meanflow_core.latents import LatentNormalization
from meanflow_core.loss import draw_step_record
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


def take_steps(state, config, count):
    metrics = None
    for _ in range(count):
        record = draw_step_record(
            config.loss,
            seed=config.seed,
            step=state.step,
            num_rows=config.global_batch_size,
            latent_shape=(4, 8, 8),
        )
        generator = torch.Generator().manual_seed(state.step)
        moments = torch.randn(config.global_batch_size, 8, 8, 8, generator=generator).abs()
        labels = torch.randint(10, (config.global_batch_size,), generator=generator)
        metrics = train_step(state, state.network, moments, labels, record, IDENTITY, config)
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
