import copy
import itertools
import json
import resource
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from meanflow_core import checkpoint
from meanflow_core.checkpoint import load_average, load_train_state, save_train_state
from meanflow_core.config import GuidanceConfig, OptimizerConfig
from meanflow_core.latents import LatentNormalization
from meanflow_core.loss import draw_step_record, meanflow_loss
from meanflow_core.presets import debug, debug_imf
from meanflow_core.training import (
    SUMS,
    Batch,
    build_train_state,
    contiguous_share,
    learning_rate,
    num_passes,
    rehearse,
    relative_ema_distance,
    train_step,
    update_emas,
)

IDENTITY = LatentNormalization(mean=(0.0,) * 4, std=(1.0,) * 4)


def fresh_state(config=None, initial=None):
    return build_train_state(
        config or debug(), sample_size=8, in_channels=4, num_classes=10, device=torch.device("cpu"), initial=initial
    )


def batch(config, step=0):
    record = draw_step_record(
        config.loss, seed=config.seed, step=step, num_rows=config.global_batch_size, latent_shape=(4, 8, 8)
    )
    generator = torch.Generator().manual_seed(step)
    moments = torch.randn(config.global_batch_size, 8, 8, 8, generator=generator).abs()
    labels = torch.randint(10, (config.global_batch_size,), generator=generator)
    return Batch(moments=moments, labels=labels, record=record)


def rows(whole, start, stop, config):
    return Batch(
        moments=whole.moments[start:stop],
        labels=whole.labels[start:stop],
        record=whole.record.rows(start, stop, config.loss),
    )


def take_steps(state, config, count):
    metrics = None
    for _ in range(count):
        metrics = train_step(state, state.network, [batch(config, state.step)], IDENTITY, config)
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
    loss, _, num_equal, _, num_below, head, _ = metrics.sums.tolist()
    assert head == 0.0
    assert (num_equal, num_below) == (12.0, 4.0)
    assert loss == pytest.approx(1.0, abs=0.05)  # p = 1 makes it so; the raw errors are what to watch
    assert metrics.gradient_norm > 0


def test_a_step_of_improved_meanflow_tells_its_velocity_heads_error():
    metrics = take_steps(fresh_state(debug_imf()), debug_imf(), 1)
    loss, equal, num_equal, _, num_below, head, _ = metrics.sums.tolist()
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
    state = fresh_state(replace(debug(), seed=9, ema_decays=(0.9, 0.5)), initial=trained.ema_network)
    for network in (state.network, *state.ema_networks.values()):
        assert torch.equal(parameters(network), parameters(trained.ema_network))
    with pytest.raises(ValueError, match="depth is 2, wanted 3"):
        fresh_state(replace(debug(), network=replace(debug().network, depth=3)), initial=trained.network)
    with pytest.raises(ValueError, match="it is a MeanFlowDiT, wanted ImprovedMeanFlowDiT"):
        fresh_state(debug_imf(), initial=trained.network)


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
        point = Batch(moments=target, labels=torch.zeros(16, dtype=torch.int64), record=record)
        train_step(state, state.network, [point], IDENTITY, config)
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

    train_step(state, graded, [batch(config)], IDENTITY, config)
    assert seen == [(in_bfloat16, beside)]


def test_a_step_draws_its_latents_and_drops_its_labels():
    config = replace(debug(), loss=replace(debug().loss, label_drop_probability=0.5))
    state, given = fresh_state(config), batch(config)
    moments, labels, record = given.moments, given.labels, given.record
    seen = []

    def graded(z, conditioning, tangent=None, velocity_only=False):
        seen.append((z, conditioning))
        return state.network(z, conditioning, tangent, velocity_only)

    train_step(state, graded, [given], LatentNormalization(mean=(1.0,) * 4, std=(2.0,) * 4), config)
    [(z, told)] = seen
    mean, std = moments.chunk(2, dim=1)
    t, latents = record.t.view(-1, 1, 1, 1), (mean + std * record.posterior_noise - 1.0) / 2.0
    order = record.rows_ordered
    torch.testing.assert_close(z, ((1 - t) * latents + t * record.noise)[order])
    assert record.label_dropped.any()
    assert torch.equal(told.labels, torch.where(record.label_dropped, 10, labels)[order])  # 10 is the null class


def test_gradients_of_shares_are_over_the_whole_batch_and_scaled():
    config = replace(debug(), optimizer=OptimizerConfig(learning_rate=1e-3))
    whole_batch = batch(config)

    def gradient(start, stop, **options):
        state = fresh_state(config)
        train_step(state, state.network, [rows(whole_batch, start, stop, config)], IDENTITY, config, **options)
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
    state, given = fresh_state(config), batch(config)
    take_steps(state, config, 1)  # a fresh network's last layer is zero
    moments, labels, record = given.moments, given.labels, given.record
    latents = moments[:, :4] + moments[:, 4:] * record.posterior_noise
    output = meanflow_loss(
        state.network, state.network, latents, labels, record, config.loss, null_label=10, global_num_rows=16
    )
    errors, derivatives = output.squared_error, output.dudt.flatten(1).norm(dim=1)
    sums = dict(zip(SUMS, train_step(state, state.network, [given], IDENTITY, config).sums, strict=True))
    torch.testing.assert_close(sums["squared_error_r_below_t"], errors[record.r < record.t].sum())
    torch.testing.assert_close(sums["squared_error_r_equals_t"], errors[record.r == record.t].sum())
    torch.testing.assert_close(sums["dudt_norm"], derivatives[record.r < record.t].sum())
    assert sums["dudt_norm"] > 0


def test_training_may_begin_from_a_network_out_of_a_folder(tmp_path):
    trained = fresh_state()
    trained.network.save_pretrained(tmp_path)
    found = type(trained.network).from_pretrained(tmp_path, low_cpu_mem_usage=False)
    state = fresh_state(replace(debug(), seed=9), initial=found)
    assert torch.equal(parameters(state.network), parameters(trained.network))


def test_state_saved_before_the_first_step_is_restored(tmp_path):
    state, restored = fresh_state(), fresh_state(replace(debug(), seed=1))
    save_train_state(state, debug(), tmp_path)
    load_train_state(restored, tmp_path)
    assert restored.step == 0
    assert torch.equal(parameters(restored.network), parameters(state.network))
    assert take_steps(restored, debug(), 1).gradient_norm == take_steps(state, debug(), 1).gradient_norm


def test_shares_are_contiguous_and_cover_the_batch():
    for num_parts in (1, 2, 3, 7):
        shares = [contiguous_share(16, part, num_parts) for part in range(num_parts)]
        assert shares[0][0] == 0
        assert shares[-1][1] == 16
        assert all(first[1] == second[0] for first, second in itertools.pairwise(shares))


def test_passes_keep_their_bound_and_leave_no_worker_without_rows():
    assert num_passes(256, 8, None) == 1
    assert num_passes(256, 8, 32) == 1
    assert num_passes(256, 8, 31) == 2
    assert num_passes(256, 1, 32) == 8
    for num_workers, rows_per_pass in itertools.product(range(1, 12), range(1, 12)):
        passes = num_passes(11, num_workers, rows_per_pass)
        shares = [contiguous_share(11, rank, num_workers) for rank in range(num_workers)]
        sizes = [
            stop - start
            for first, last in shares
            for start, stop in (contiguous_share(last - first, number, passes) for number in range(passes))
        ]
        assert min(sizes) >= 1
        assert max(sizes) <= max(rows_per_pass, 2 if rows_per_pass == 1 else 1)
    with pytest.raises(ValueError, match="at least the number of workers 17, but got 16"):
        num_passes(16, 17, None)


@pytest.mark.parametrize("config", [debug(), debug_imf()], ids=["dit", "imf_dit"])
def test_passes_over_parts_of_a_batch_add_up_to_one_over_the_whole(config):
    states = fresh_state(config), fresh_state(config)
    entered = []

    @contextmanager
    def accumulating():
        entered.append(True)
        yield

    for step in range(3):
        whole = batch(config, step)
        parts = [rows(whole, *contiguous_share(16, number, 3), config) for number in range(3)]
        one = train_step(states[0], states[0].network, [whole], IDENTITY, config)
        three = train_step(states[1], states[1].network, parts, IDENTITY, config, accumulating=accumulating)
        torch.testing.assert_close(three.sums, one.sums, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(three.gradient_norm, one.gradient_norm, rtol=1e-4, atol=1e-6)
    assert len(entered) == 3 * 2  # every pass but the last
    torch.testing.assert_close(parameters(states[1].network), parameters(states[0].network), rtol=0, atol=1e-5)


def test_step_whose_gradient_is_not_finite_moves_nothing_where_it_may_be_skipped():
    config, state = debug(), fresh_state()
    take_steps(state, config, 2)
    before = [parameters(state.network), parameters(state.ema_network)]
    moments = {name: value.clone() for name, value in state.optimizer.state[next(state.network.parameters())].items()}
    broken = batch(config, 2)
    broken.moments[3] = float("nan")
    metrics = train_step(state, state.network, [broken], IDENTITY, config, may_skip=True)
    assert metrics.skipped
    assert not torch.isfinite(metrics.gradient_norm)
    assert (state.step, state.num_skipped) == (3, 1)
    assert torch.equal(parameters(state.network), before[0])
    assert torch.equal(parameters(state.ema_network), before[1])
    for name, value in moments.items():
        assert torch.equal(state.optimizer.state[next(state.network.parameters())][name], value)
    assert not take_steps(state, config, 1).skipped
    assert torch.isfinite(parameters(state.network)).all()


def test_gradient_that_is_not_finite_moves_everything_where_it_may_not_be_skipped():
    config, state = debug(), fresh_state()
    broken = batch(config, 0)
    broken.moments[3] = float("nan")
    metrics = train_step(state, state.network, [broken], IDENTITY, config)
    assert (metrics.skipped, state.num_skipped) == (False, 0)
    assert not torch.isfinite(parameters(state.network)).all()


def test_state_of_skipped_steps_alone_is_restored(tmp_path):
    config, state = debug(), fresh_state()
    broken = batch(config, 0)
    broken.moments[3] = float("nan")
    train_step(state, state.network, [broken], IDENTITY, config, may_skip=True)
    save_train_state(state, config, tmp_path)
    resumed = fresh_state(replace(config, seed=3))
    load_train_state(resumed, tmp_path)
    assert (resumed.step, resumed.num_skipped) == (1, 1)
    for each in state, resumed:
        take_steps(each, config, 1)
    assert torch.equal(parameters(resumed.network), parameters(state.network))


def test_rehearsal_leaves_nothing_behind():
    state = fresh_state()
    take_steps(state, debug(), 1)
    before = parameters(state.network), parameters(state.ema_network)
    rehearse(state, state.network, batch(debug(), 1), debug())
    assert all(parameter.grad is None for parameter in state.network.parameters())
    assert torch.equal(parameters(state.network), before[0])
    assert torch.equal(parameters(state.ema_network), before[1])
    assert state.step == 1


def test_skipped_steps_survive_a_resume(tmp_path):
    config, straight = debug(), fresh_state()
    broken = batch(config, 0)
    broken.moments[3] = float("nan")
    train_step(straight, straight.network, [broken], IDENTITY, config, may_skip=True)
    take_steps(straight, config, 2)
    save_train_state(straight, config, tmp_path, {"note": [1, 2]})
    resumed = fresh_state(replace(config, seed=3))
    assert load_train_state(resumed, tmp_path) == {"note": [1, 2]}
    assert (resumed.step, resumed.num_skipped) == (3, 1)
    for state in straight, resumed:
        take_steps(state, config, 2)
    assert torch.equal(parameters(resumed.network), parameters(straight.network))


def test_guidance_sets_in_after_its_steps():
    config = replace(debug(), guidance_after_steps=2)
    assert not debug().loss.guidance.is_off
    assert [config.loss_at(step).guidance.is_off for step in range(4)] == [True, True, False, False]
    assert replace(config.loss_at(0), guidance=config.loss.guidance) == config.loss
    unguided = replace(debug(), loss=replace(debug().loss, guidance=GuidanceConfig()))
    first, second = fresh_state(config), fresh_state(config)
    for step in range(3):
        of_stage = replace(config, loss=config.loss_at(step))
        train_step(first, first.network, [batch(of_stage, step)], IDENTITY, config)
        plain = unguided if step < 2 else debug()
        train_step(second, second.network, [batch(plain, step)], IDENTITY, plain)
    assert torch.equal(parameters(first.network), parameters(second.network))


def test_distance_of_an_average_is_relative_to_the_parameters():
    state = fresh_state(replace(debug(), ema_decays=(0.9, 0.5)))
    assert relative_ema_distance(state) == {0.9: 0.0, 0.5: 0.0}
    take_steps(state, debug(), 2)
    for decay, distance in relative_ema_distance(state).items():
        ours = parameters(state.network)
        wanted = (parameters(state.ema_networks[decay]) - ours).norm() / ours.norm()
        assert distance == pytest.approx(float(wanted), rel=1e-4)


def test_one_average_is_read_out_of_a_checkpoint(tmp_path):
    state = fresh_state(replace(debug(), ema_decays=(0.9, 0.5)))
    take_steps(state, debug(), 2)
    save_train_state(state, debug(), tmp_path)
    network = fresh_state(replace(debug(), seed=4)).network
    load_average(network, 0.5, tmp_path)
    assert torch.equal(parameters(network), parameters(state.ema_networks[0.5]))


def test_large_state_is_written_in_several_files_and_read_back(tmp_path, monkeypatch):
    state = fresh_state()
    take_steps(state, debug(), 1)
    monkeypatch.setattr(checkpoint, "BYTES_PER_FILE", 100_000)
    save_train_state(state, debug(), tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    assert len(files) >= size // 300_000 > 3
    assert json.loads((tmp_path / "state.json").read_text())["files"].keys() == {path.name for path in files}
    restored = fresh_state(replace(debug(), seed=3))
    load_train_state(restored, tmp_path)
    assert torch.equal(parameters(restored.network), parameters(state.network))
    assert torch.equal(parameters(restored.ema_network), parameters(state.ema_network))
    (tmp_path / "shard-00009-model-00001-of-00001.safetensors").write_bytes(files[0].read_bytes())
    with pytest.raises(
        ValueError, match="is a mixture: shard-00009-model-00001-of-00001.safetensors is of another one"
    ):
        load_train_state(restored, tmp_path)


def test_torn_checkpoint_is_refused_by_name(tmp_path):
    state = fresh_state()
    save_train_state(state, debug(), tmp_path)
    [tensors] = tmp_path.glob("*.safetensors")
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is torn"):
        load_average(state.network, 0.9, tmp_path)
    with pytest.raises(
        ValueError, match=rf"is torn: {tensors.name} has {len(content) - 1} bytes, wanted {len(content)}"
    ):
        load_train_state(state, tmp_path)
    tensors.unlink()
    with pytest.raises(ValueError, match=f"{tensors.name} is missing"):
        load_train_state(state, tmp_path)
    with pytest.raises(ValueError, match="is no checkpoint"):
        load_train_state(state, tmp_path / "nothing")
    (tmp_path / "state.json").write_text((tmp_path / "state.json").read_text()[:40])
    with pytest.raises(ValueError, match="is no checkpoint"):
        load_train_state(state, tmp_path)


def test_full_disk_while_saving_is_an_os_error(tmp_path):
    state = fresh_state()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_train_state(state, debug(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    with pytest.raises(ValueError, match="is no checkpoint"):
        load_train_state(state, tmp_path)
