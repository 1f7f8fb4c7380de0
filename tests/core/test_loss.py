import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow_core.config import GuidanceConfig, LossConfig, TimeSamplingConfig
from meanflow_core.interop import from_official_meanflow
from meanflow_core.loss import StepRecord, draw_step_record, meanflow_loss, total_derivative
from meanflow_core.transformer import Conditioning, MeanFlowDiT

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "mf_cfg_interval.npz"
GUIDED = LossConfig(guidance=GuidanceConfig(omega=0.7, kappa=0.5, t_start=0.1, t_end=0.8), label_drop_probability=0.3)


def draw_batch(num_rows=16, config=GUIDED, seed=3, dtype=torch.float32):
    record = draw_step_record(config, seed=seed, step=5, num_rows=num_rows, latent_shape=(4, 8, 8))
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(num_rows, 4, 8, 8, generator=generator).to(dtype)
    record = replace(record, t=record.t.to(dtype), r=record.r.to(dtype), noise=record.noise.to(dtype))
    return latents, torch.randint(10, (num_rows,), generator=generator), record


def gradients(network, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def reference_loss(network, x, labels, record, config, null):
    """The objective as the paper writes it: guidance and the JVP over the whole batch, in one graded pass."""
    guidance = config.guidance
    t, r, column = record.t, record.r, (-1, 1, 1, 1)
    z = (1 - t.view(column)) * x + t.view(column) * record.noise
    v = record.noise - x
    y = torch.where(record.label_dropped, null, labels)
    inside = ((t >= guidance.t_start) & (t <= guidance.t_end)).view(column)
    omega = torch.where(inside, guidance.omega, torch.ones_like(t.view(column)))
    kappa = torch.where(inside, guidance.kappa, torch.zeros_like(t.view(column)))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        conditional = network(z, Conditioning(t=t, r=t, labels=y)).u
        unconditional = network(z, Conditioning(t=t, r=t, labels=torch.full_like(y, null))).u
    guided = omega * v + kappa * conditional + (1 - omega - kappa) * unconditional
    guided = torch.where(record.label_dropped.view(column), v, guided)

    def function(z, t, r):
        return network(z, Conditioning(t=t, r=r, labels=y)).u

    with sdpa_kernel(SDPBackend.MATH):
        u, dudt = torch.func.jvp(function, (z, t, r), (guided, torch.ones_like(t), torch.zeros_like(r)))
    error = u - (guided - (t - r).view(column) * dudt).detach()
    squared = error.square().flatten(1).sum(1)
    return (squared / (squared.detach() + config.norm_eps) ** config.norm_p).mean()


def test_matches_the_authors_code_on_every_value_and_gradient():
    golden = np.load(GOLDEN)
    settings = json.loads(str(golden["config"]))
    method, dit = settings["method"], settings["dit"]
    network = MeanFlowDiT(
        sample_size=dit["input_size"],
        in_channels=dit["in_channels"],
        num_classes=dit["num_classes"],
        patch_size=dit["patch_size"],
        hidden_size=dit["hidden_size"],
        depth=dit["depth"],
        num_heads=dit["num_heads"],
    )
    network.load_state_dict(from_official_meanflow({k[6:]: golden[k] for k in golden if k.startswith("param:")}))
    expected_gradients = from_official_meanflow({k[5:]: golden[k] for k in golden if k.startswith("grad:")})
    guidance = GuidanceConfig(
        omega=method["omega"], kappa=method["kappa"], t_start=method["t_start"], t_end=method["t_end"]
    )
    tensors = {key: torch.from_numpy(golden[key]) for key in ("t", "r", "noise", "label_dropped", "latents", "labels")}
    output = meanflow_loss(
        network,
        network,
        tensors["latents"],
        tensors["labels"].long(),
        record := StepRecord.from_draws(
            t=tensors["t"],
            r=tensors["r"],
            noise=tensors["noise"],
            label_dropped=tensors["label_dropped"],
            guidance=guidance,
        ),
        LossConfig(guidance=guidance, norm_p=method["norm_p"], norm_eps=method["norm_eps"]),
        null_label=dit["num_classes"],
        global_num_rows=len(tensors["t"]),
    )
    output.loss.backward()

    def difference(ours, theirs):
        return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-6))

    below = record.rows_below
    assert difference(output.u, torch.from_numpy(golden["u"])) < 1e-5
    assert difference(output.v_guided, torch.from_numpy(golden["v_guided"])) < 1e-5
    assert difference(output.dudt[below], torch.from_numpy(golden["dudt"])[below]) < 1e-5
    assert output.loss.item() == pytest.approx(float(golden["loss"]), rel=1e-5)
    for name, parameter in network.named_parameters():
        assert difference(parameter.grad, expected_gradients[name]) < 1e-4, name


@pytest.mark.parametrize(
    "guidance",
    [
        GuidanceConfig(),
        GuidanceConfig(omega=2.0),
        GuidanceConfig(omega=0.5, kappa=0.5),
        GUIDED.guidance,
        GuidanceConfig(kappa=0.5),
    ],
)
def test_gradients_equal_the_one_pass_form_over_the_whole_batch(network, guidance):
    network = network.double()
    config = replace(GUIDED, guidance=guidance, times=TimeSamplingConfig(fraction_r_below_t=0.5))
    latents, labels, record = draw_batch(config=config, dtype=torch.float64)
    output = meanflow_loss(network, network, latents, labels, record, config, null_label=10, global_num_rows=16)

    ours = gradients(network, output.loss)
    theirs = gradients(network, reference_loss(network, latents, labels, record, config, null=10))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-9


def test_total_derivative_agrees_with_finite_differences(network):
    network = network.double()
    latents, labels, record = draw_batch(dtype=torch.float64)
    tangent, eps = torch.randn_like(latents), 1e-6
    dudt = total_derivative(network, latents, record.t, record.r, labels, tangent)

    def u(sign):
        conditioning = Conditioning(t=record.t + sign * eps, r=record.r, labels=labels)
        return network(latents + sign * eps * tangent, conditioning).u

    with torch.no_grad():
        numeric = (u(1) - u(-1)) / (2 * eps)
    assert float((dudt - numeric).norm() / numeric.norm()) < 1e-7


def test_target_is_velocity_when_r_equals_t(network):
    config = LossConfig(times=TimeSamplingConfig(fraction_r_below_t=0.0))
    latents, labels, record = draw_batch(config=config)
    output = meanflow_loss(network, network, latents, labels, record, config, null_label=10, global_num_rows=16)
    v = record.noise - latents
    torch.testing.assert_close(output.squared_error, (output.u - v).square().flatten(1).sum(1))
    assert torch.equal(output.dudt, torch.zeros_like(v))


def test_no_forward_is_run_whose_result_is_known(network):
    latents, labels, record = draw_batch()
    calls = []

    def counting(z, conditioning):
        calls.append(len(z))
        return network(z, conditioning)

    meanflow_loss(network, counting, latents, labels, record, GUIDED, null_label=10, global_num_rows=16)
    # Guided rows once with the null class, those with r < t once more with their own; then the JVP on rows with r < t.
    assert calls == [len(record.rows_guided) + len(record.rows_guided_below), len(record.rows_below)]
    assert 0 < len(record.rows_guided) < 16

    calls.clear()
    plain = LossConfig()
    latents, labels, record = draw_batch(config=plain)
    meanflow_loss(network, counting, latents, labels, record, plain, null_label=10, global_num_rows=16)
    assert calls == [4]


def test_uneven_shares_of_a_batch_add_up_to_the_whole(network):
    latents, labels, record = draw_batch()

    def loss(start, stop):
        share = record.rows(start, stop, GUIDED.guidance)
        rows = slice(start, stop)
        return meanflow_loss(
            network, network, latents[rows], labels[rows], share, GUIDED, null_label=10, global_num_rows=16
        ).loss

    whole = gradients(network, loss(0, 16))
    parts = sum(gradients(network, loss(start, stop)) for start, stop in ((0, 3), (3, 4), (4, 16)))
    assert float((whole - parts).norm() / whole.norm()) < 1e-6


def test_draws_are_a_function_of_seed_and_step():
    def draw(seed, step):
        return draw_step_record(GUIDED, seed=seed, step=step, num_rows=8, latent_shape=(4, 8, 8))

    assert torch.equal(draw(1, 2).noise, draw(1, 2).noise)
    assert not torch.equal(draw(1, 2).noise, draw(1, 3).noise)
    assert not torch.equal(draw(1, 2).t, draw(2, 2).t)
    assert not torch.equal(draw(1, 2).noise, draw(1, 2).posterior_noise)


def test_labels_are_dropped_among_r_equals_t_rows_at_the_stated_rate():
    record = draw_step_record(LossConfig(), seed=0, step=0, num_rows=40_000, latent_shape=(1, 1, 1))
    assert not record.label_dropped[record.rows_below].any()
    assert float(record.label_dropped.double().mean()) == pytest.approx(0.1, abs=0.006)
    everywhere = LossConfig(label_drop_probability=0.5, times=TimeSamplingConfig(fraction_r_below_t=0.75))
    record = draw_step_record(everywhere, seed=0, step=0, num_rows=40_000, latent_shape=(1, 1, 1))
    assert float(record.label_dropped[record.rows_below].double().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"t": torch.tensor([1.2, 0.5])}, "0 <= r <= t <= 1"),
        ({"r": torch.tensor([0.9, 0.5])}, "0 <= r <= t <= 1"),
        ({"t": torch.tensor([float("nan"), 0.5])}, "0 <= r <= t <= 1"),
        ({"noise": torch.full((2, 1, 1, 1), torch.inf)}, "finite"),
        ({"label_dropped": torch.tensor([True])}, "shape"),
    ],
)
def test_impossible_draws_are_refused(changes, words):
    draws = {
        "t": torch.tensor([0.7, 0.5]),
        "r": torch.tensor([0.2, 0.5]),
        "noise": torch.zeros(2, 1, 1, 1),
        "label_dropped": torch.tensor([False, False]),
    }
    with pytest.raises(ValueError, match=words):
        StepRecord.from_draws(**{**draws, **changes}, guidance=GuidanceConfig())


def test_batch_that_does_not_fit_the_record_is_refused(network):
    latents, labels, record = draw_batch()
    with pytest.raises(ValueError, match="the record is for latents"):
        meanflow_loss(network, network, latents[:3], labels, record, GUIDED, null_label=10, global_num_rows=16)
