"""The objectives against closed forms on Gaussians, their papers' formulas, each other's limits, and their schedules.

Closed forms: for x ~ N(0, S^2 I), z_t is Gaussian with standard deviation d(t), d(t)^2 = (1 - t)^2 S^2 + t^2. The marginal
velocity is v = d'(t) / d(t) z, the flow map is f = d(r) / d(t) z, and u = (z - f) / (t - r). Given z_t, e - x is normal
with mean v and standard deviation S / d(t).
"""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow_core.config import (
    GuardConfig,
    GuidanceConfig,
    ImprovedMeanFlowConfig,
    MeanFlowConfig,
    TimeSamplingConfig,
    TrainingConfig,
)
from meanflow_core.networks.interface import Conditioning, NetworkOutput
from meanflow_core.objectives import guidance
from meanflow_core.objectives.consistency import previous_time
from meanflow_core.objectives.interface import build_objective
from meanflow_core.presets.alpha_flow import AlphaFlowConfig, SoFlowConfig
from meanflow_core.presets.consistency import ContinuousConsistencyConfig, DiscreteConsistencyConfig
from meanflow_core.presets.diffusion import DiffusionConfig
from tests.support.objectives import (
    FLOW_MATCHING,
    GUIDED,
    HALF,
    IMPROVED,
    NULL,
    OTHER_OBJECTIVES,
    draw_batch,
    draw_record,
    gradients,
    make_record,
    relative,
    rows_of,
    run_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")

S = 0.7
EVERY = TimeSamplingConfig(fraction_r_below_t=1.0)
OFF = GuardConfig()
GUIDANCE = GuidanceConfig(omega=0.7, kappa=0.2)


def column(values):
    return values.view(-1, 1, 1, 1)


def deviation(t):
    """d(t)."""
    return ((1 - t) ** 2 * S**2 + t**2).sqrt()


def marginal_slope(t):
    """d'(t) / d(t)."""
    return (t - (1 - t) * S**2) / deviation(t) ** 2


def average_slope(t, r):
    """u / z."""
    step = torch.where(r < t, t - r, 1.0)
    return torch.where(r < t, (1 - deviation(r) / deviation(t)) / step, marginal_slope(t))


class GaussianNetwork:
    """The exact u, v and du/dt. Adds `offset`, (B, C, H, W), to u and v, to read errors from its gradient."""

    def __init__(self, offset=None, has_velocity_head=False):
        self.offset, self.has_velocity_head = offset, has_velocity_head

    def __call__(self, z, conditioning, tangent=None, velocity_only=False):
        t, r = column(conditioning.t), column(conditioning.r)
        offset = 0.0 if self.offset is None else self.offset
        u = average_slope(t, r) * z + offset
        v = marginal_slope(t) * z + offset if self.has_velocity_head else None
        if tangent is None:
            return NetworkOutput(u=u, v=v)
        b, step = len(tangent), (t - r)[: len(tangent)]
        # u = a(t) z with a = (1 - d(r) / d(t)) / (t - r)
        slope_change = (marginal_slope(t) * deviation(r) / deviation(t))[:b] / step - average_slope(t, r)[:b] / step
        return NetworkOutput(u=u, v=v, dudt=average_slope(t, r)[:b] * tangent + slope_change * z[:b])


TIMES = {
    "r = t": (torch.tensor([0.2, 0.5, 0.9, 1.0]), torch.tensor([0.2, 0.5, 0.9, 1.0])),
    "r < t": (torch.tensor([0.2, 0.5, 0.9, 1.0]), torch.tensor([0.1, 0.0, 0.3, 0.0])),
    "r = 0": (torch.tensor([0.2, 0.5, 0.9, 0.97]), torch.zeros(4)),
}


def gaussian_batch(config, times, deviations):
    """z, and a batch with this z_t, whose v_t is `deviations` standard deviations from its mean."""
    t, r = (values.double() for values in times)
    z = torch.randn(4, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v = marginal_slope(column(t)) * z + deviations * S / deviation(column(t))
    guidance_inputs = {}
    if isinstance(config, ImprovedMeanFlowConfig):
        guidance_inputs = {
            "omega": torch.full_like(t, 2.0),
            "guidance_interval_start": torch.zeros_like(t),
            "guidance_interval_end": torch.ones_like(t),
        }
    dropped = torch.tensor([False, False, True, False])
    record = make_record(config, t=t, r=r, noise=z + (1 - column(t)) * v, label_dropped=dropped, **guidance_inputs)
    return z, (z - column(t) * v, torch.tensor([0, 1, 2, 3]), record)


def error_on(batch, config):
    """The error u - target of every sample, (B, C, H, W), times its weight: half the loss's gradient with respect to u."""
    offset = torch.zeros_like(batch[0], requires_grad=True)
    has_head = isinstance(config, ImprovedMeanFlowConfig)
    output = build_objective(config).loss(
        GaussianNetwork(offset, has_head), GaussianNetwork(None, has_head), *batch, null_label=NULL, global_num_rows=1
    )
    [gradient] = torch.autograd.grad(output.loss, offset)
    return gradient / 2


def gaussian_error(config, times, deviations):
    return error_on(gaussian_batch(config, times, deviations)[1], config)


EXACT = {
    "flow matching": (replace(FLOW_MATCHING, norm_p=0.0), "r = t"),
    "guided flow matching": (replace(FLOW_MATCHING, norm_p=0.0, guidance=GUIDANCE), "r = t"),
    "MeanFlow": (MeanFlowConfig(norm_p=0.0), "r < t"),
    "guided MeanFlow": (MeanFlowConfig(norm_p=0.0, guidance=GUIDANCE), "r < t"),
    "MeanFlow's own velocity": (MeanFlowConfig(norm_p=0.0, guidance=GUIDANCE, tangent="own_velocity"), "r < t"),
    "improved MeanFlow": (replace(IMPROVED, norm_p=0.0), "r < t"),
    "alpha-Flow at a = 0": (AlphaFlowConfig(norm_p=0.0, ratio=0.0, guidance=GUIDANCE), "r < t"),
    "alpha-Flow at r = t": (AlphaFlowConfig(norm_p=0.0, ratio=0.3, guidance=GUIDANCE), "r = t"),
    "continuous consistency": (ContinuousConsistencyConfig(derivative_weight=1.0, guards=OFF), "r = 0"),
    "continuous consistency at r = t": (
        ContinuousConsistencyConfig(derivative_weight=1.0, guards=OFF, times=HALF, guidance=GUIDANCE),
        "r = t",
    ),
    "ECT at r = t": (DiscreteConsistencyConfig(norm_p=0.0, stage=3, times=HALF, guidance=GUIDANCE), "r = t"),
}
FINITE_STEP = {
    "alpha-Flow": (AlphaFlowConfig(norm_p=0.0, ratio=0.3, guidance=GUIDANCE), "r < t"),
    "SoFlow": (SoFlowConfig(norm_p=0.0, ratio=0.05, guidance=GUIDANCE), "r < t"),
    "ECT": (DiscreteConsistencyConfig(norm_p=0.0, stage=3, guidance=GUIDANCE, times=HALF), "r = 0"),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_exact_flow_map_has_no_error_where_the_velocity_is_its_mean(name):
    config, times = EXACT[name]
    assert gaussian_error(config, TIMES[times], 0.0).abs().max() < 1e-12
    assert gaussian_error(config, TIMES[times], 0.1).abs().max() > 1e-2  # not vacuous


@pytest.mark.parametrize("name", [*EXACT, *FINITE_STEP])
def test_the_expected_error_is_that_of_the_mean_velocity(name):
    # Two points at one standard deviation integrate polynomials up to degree 3 over a normal distribution exactly.
    config, times = (EXACT | FINITE_STEP)[name]
    above, below, at_mean = (gaussian_error(config, TIMES[times], deviations) for deviations in (1.0, -1.0, 0.0))
    torch.testing.assert_close((above + below) / 2, at_mean, atol=1e-12, rtol=0.0)
    assert (above - below).abs().max() > 0.1


@pytest.mark.parametrize("name", ["MeanFlow", "MeanFlow's own velocity", "guided MeanFlow"])
def test_meanflows_irreducible_loss_is_the_variance_of_its_target(name):
    # The target's noise is (a - b (t - r) du/dz) (v_t - v), with 1 - (t - r) du/dz = d(r) / d(t), and a = b = omega or
    # b = 0 for a dropped label or the network's own velocity as the tangent.
    config, times = EXACT[name]
    t, r = (values.double() for values in TIMES[times])
    omega = torch.where(torch.tensor([False, False, True, False]), 1.0, config.guidance.omega)
    shrinks = config.tangent == "guided_velocity"
    expected = (omega * S / deviation(t) * (deviation(r) / deviation(t) if shrinks else 1.0)) ** 2
    for deviations in (1.0, -1.0):
        error = gaussian_error(config, TIMES[times], deviations)
        torch.testing.assert_close(error.square().mean(dim=(1, 2, 3)), expected)


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("config_class", [AlphaFlowConfig, SoFlowConfig])
def test_alpha_flow_takes_one_eulers_step_and_then_the_flow_map(config_class, ratio):
    config = config_class(norm_p=0.0, ratio=ratio)
    t, r = (column(values.double()) for values in TIMES["r < t"])
    z, batch = gaussian_batch(config, TIMES["r < t"], 0.0)
    s, v = t - ratio * (t - r), marginal_slope(t) * z
    flow_map = (z - (t - s) * v) * deviation(r) / deviation(s)
    # Eq. of SoFlow: the error of f over the step
    expected = -(z * deviation(r) / deviation(t) - flow_map) / (t - s)
    torch.testing.assert_close(error_on(batch, config), expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("config_class", [AlphaFlowConfig, SoFlowConfig])
def test_alpha_flows_error_at_the_exact_flow_map_falls_with_its_ratio(config_class):
    errors = [
        gaussian_error(config_class(norm_p=0.0, ratio=ratio), TIMES["r < t"], 0.0) for ratio in (1e-2, 1e-3, 1e-4)
    ]
    for larger, smaller in itertools.pairwise(errors):
        assert relative(10 * smaller, larger) < 0.02
    assert errors[-1].abs().max() < 1e-3


def test_ects_error_at_the_exact_flow_map_is_that_of_one_eulers_step():
    t, _ = (values.double() for values in TIMES["r = 0"])
    for stage in (0, 3, 12):
        config = DiscreteConsistencyConfig(norm_p=0.0, stage=stage)
        z, batch = gaussian_batch(config, TIMES["r = 0"], 0.0)
        s = previous_time(t, stage)
        gap = column(t / (1 - t) - s / (1 - s))
        stepped = z * (1 - column(t - s) * marginal_slope(column(t)))
        difference = z * S / deviation(column(t)) - stepped * S / deviation(column(s))
        torch.testing.assert_close(error_on(batch, config), -column(t) * difference / gap, atol=1e-9, rtol=1e-9)
    assert gaussian_error(config, TIMES["r = 0"], 0.0).abs().max() < 1e-3  # falls with the gap


def test_ect_at_the_first_level_has_the_image_as_target():
    config = DiscreteConsistencyConfig(norm_p=0.0, stage=0)
    times = torch.tensor([0.05, 0.1, 0.2, 0.3]), torch.zeros(4)
    assert torch.equal(previous_time(times[0], 0), torch.zeros(4))
    z, batch = gaussian_batch(config, times, 0.5)
    t = column(times[0].double())
    prediction = z * S / deviation(t)
    sigma = t / (1 - t)
    torch.testing.assert_close(error_on(batch, config), -t * (prediction - batch[0]) / sigma, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("weights", [GuidanceConfig(), GUIDANCE], ids=["unguided", "guided"])
def test_ddpms_exact_noise_has_no_expected_error_and_the_variance_as_its_loss(schedule, weights):
    config = DiffusionConfig(schedule=schedule, guidance=weights)
    t = torch.tensor([0.001, 0.3, 0.9, 1.0])
    alpha = column(alphas_cumprod(schedule)[(1000 * t).round().long() - 1].double())
    variance = alpha * S**2 + 1 - alpha  # of z
    z = torch.randn(4, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dropped = torch.tensor([False, False, True, False])

    def exact(z, conditioning, tangent=None, velocity_only=False):
        level = (1000 * conditioning.t).round().long() - 1
        a = column(alphas_cumprod(schedule)[level].double())
        return NetworkOutput(u=(1 - a).sqrt() * z / (a * S**2 + 1 - a))

    def error(deviations):
        # e given z is normal with this mean and variance abar S^2 / variance.
        noise = (1 - alpha).sqrt() * z / variance + deviations * (alpha * S**2 / variance).sqrt()
        record = make_record(config, t=t.double(), r=t.double(), noise=noise, label_dropped=dropped)
        offset = torch.zeros_like(z, requires_grad=True)
        output = build_objective(config).loss(
            lambda *arguments: NetworkOutput(u=exact(*arguments).u + offset), exact,
            (z - (1 - alpha).sqrt() * noise) / alpha.sqrt(), torch.arange(4), record,
            null_label=NULL, global_num_rows=4,
        )  # fmt: skip
        [gradient] = torch.autograd.grad(output.loss, offset)
        return gradient * z.numel() / 2, output.loss

    (above, loss), (below, other) = error(1.0), error(-1.0)
    torch.testing.assert_close(above + below, torch.zeros_like(z), atol=1e-9, rtol=0.0)
    omega = torch.where(column(dropped), 1.0, weights.omega)
    expected = (omega**2 * alpha * S**2 / variance).mean()
    torch.testing.assert_close((loss + other) / 2, expected, rtol=1e-7, atol=0.0)


def alphas_cumprod(schedule):
    """abar of DDPM's linear schedule, or of Nichol and Dhariwal's cosine; float32 (1000,)."""
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, 1000)
    else:
        bar = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
        betas = torch.tensor([min(1 - bar[k + 1] / bar[k], 0.999) for k in range(1000)])
    return (1 - betas).cumprod(0)


def reference_loss(network, x, labels, record, config):
    """The loss as in the papers, every term over the whole batch. Returns the samples' terms, (B,)."""
    draws = record.draws
    t, r, e = column(draws.t), column(draws.r), draws.noise
    y = torch.where(draws.label_dropped, NULL, labels)

    def u(z, t, r, labels=y):
        return network(z, Conditioning(t=t.flatten(), r=r.flatten(), labels=labels)).u

    start, end = config.guidance.guidance_interval_start, config.guidance.guidance_interval_end
    is_guided = (t >= start) & (t <= end) & ~column(draws.label_dropped)

    @torch.no_grad()
    def guided(sample, z):
        omega, kappa = config.guidance.omega, config.guidance.kappa
        conditional, null = u(z, t, t, labels), u(z, t, t, torch.full_like(y, NULL))
        return torch.where(is_guided, omega * sample + kappa * conditional + (1 - omega - kappa) * null, sample)

    def squares(error):
        return error.square().sum(dim=(1, 2, 3))

    def weighted(square, p, c):
        return square / (square.detach() + c) ** p

    if isinstance(config, DiffusionConfig):
        alpha = column(alphas_cumprod(config.schedule)[(1000 * draws.t).round().long() - 1]).to(x.dtype)
        z = alpha.sqrt() * x + (1 - alpha).sqrt() * e
        return squares(u(z, t, t) - guided(e, z)) / x[0].numel()

    z = (1 - t) * x + t * e
    v = guided(e - x, z)
    is_below = draws.r < draws.t
    p, c = config.norm_p, config.norm_eps

    def clamped(target):
        limit = config.guards.max_target or math.inf
        return target.clamp(-limit, limit)

    if isinstance(config, ContinuousConsistencyConfig) or getattr(config, "ratio", None) == 0.0:
        with sdpa_kernel(SDPBackend.MATH):
            tangents = v, torch.ones_like(t), torch.zeros_like(r)
            prediction, dudt = torch.func.jvp(u, (z, t, r), tangents)
        w = 1.0 if isinstance(config, AlphaFlowConfig) else config.derivative_weight
        error = prediction - (v - w * (t - r) * dudt).detach()
        if isinstance(config, ContinuousConsistencyConfig):
            g = error.detach()
            g = g / (g.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 0.1)
            error = prediction - (prediction.detach() - g)
        return weighted(squares(error), p, c)

    prediction = u(z, t, r)
    flow_matching = weighted(squares(prediction - clamped(v)), p, c)
    if isinstance(config, DiscreteConsistencyConfig):
        sigma = t / (1 - t)
        previous = (sigma * (1 - (1 + 8 / (1 + sigma.exp())) / 2 ** (config.stage + 1))).clamp(min=0)
        s = previous / (1 + previous)
        with torch.no_grad():
            image = z - (t - s) * v
            image = image - s * u(image, s, torch.zeros_like(s))
        loss = weighted(squares(z - t * u(z, t, torch.zeros_like(t)) - image), p, c) / (sigma - previous).flatten()
    else:
        a = config.ratio
        s = t - a * (t - r)
        with torch.no_grad():
            earlier = u(z - (t - s) * v, s, r)
        if isinstance(config, SoFlowConfig):
            f_t = z - (t - r) * prediction
            f_s = z - (t - s) * v - (s - r) * earlier
            loss = a * weighted(squares((f_t - f_s) / torch.where(column(is_below), t - s, 1.0)), p, c)
        else:
            assert p == 1.0
            loss = a * weighted(squares(prediction - clamped(a * v + (1 - a) * earlier)), p, c)
    return torch.where(is_below, loss, flow_matching)


@pytest.mark.parametrize("name", OTHER_OBJECTIVES)
def test_gradient_equals_the_papers_form(network, name):
    config = OTHER_OBJECTIVES[name]
    network = network.double()
    latents, labels, record = draw_batch(config=config, dtype=torch.float64)
    ours = run_loss(network, (latents, labels, record), config).loss
    theirs = reference_loss(network, latents, labels, record, config).mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-11)
    assert relative(gradients(network, ours), gradients(network, theirs)) < 1e-9


@pytest.mark.parametrize("name", OTHER_OBJECTIVES)
def test_uneven_shares_of_a_batch_add_up_to_the_whole(network, name):
    config = OTHER_OBJECTIVES[name]
    latents, labels, record = draw_batch(config=config)

    def gradient(start, stop):
        rows, share = slice(start, stop), rows_of(record, start, stop, config)
        output = build_objective(config).loss(
            network, network, latents[rows], labels[rows], share, null_label=NULL, global_num_rows=16
        )
        return gradients(network, output.loss)

    parts = sum(gradient(start, stop) for start, stop in ((0, 3), (3, 4), (4, 16)))
    assert relative(parts, gradient(0, 16)) < 1e-5


@pytest.mark.parametrize("guidance", [GuidanceConfig(), GUIDED.guidance], ids=["unguided", "guided"])
def test_alpha_flow_tends_to_meanflow(network, guidance):
    network = network.double()
    meanflow = MeanFlowConfig(times=HALF, guidance=guidance, label_drop_probability=0.3, norm_eps=1e-12)
    batch = draw_batch(config=meanflow, dtype=torch.float64)
    expected = gradients(network, run_loss(network, batch, meanflow).loss)

    def gradient(config_class, ratio):
        config = config_class(ratio=ratio, times=HALF, guidance=guidance, label_drop_probability=0.3, norm_eps=1e-12)
        return gradients(network, run_loss(network, batch, config).loss)

    assert torch.equal(gradient(AlphaFlowConfig, 0.0), expected)
    for config_class in (AlphaFlowConfig, SoFlowConfig):
        errors = [relative(gradient(config_class, ratio), expected) for ratio in (1e-3, 1e-4)]
        assert errors[1] < 1e-3
        assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)  # first order


def test_alpha_flow_is_flow_matching_where_r_equals_t(network):
    batch = draw_batch(config=FLOW_MATCHING)
    expected = gradients(network, run_loss(network, batch, FLOW_MATCHING).loss)
    for ratio in (1.0, 0.3):
        config = AlphaFlowConfig(ratio=ratio)
        assert torch.equal(gradients(network, run_loss(network, batch, config).loss), expected)


def test_alpha_flow_at_a_equals_1_regresses_onto_the_velocity(network):
    config = AlphaFlowConfig(ratio=1.0, times=EVERY)
    latents, labels, record = draw_batch(config=config)
    output = run_loss(network, (latents, labels, record), config)
    expected = (output.u - (record.draws.noise - latents)).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(output.squared_error, expected)


def test_continuous_consistency_is_meanflow_at_r_equals_0(network):
    consistency = ContinuousConsistencyConfig(derivative_weight=1.0, guards=OFF, norm_p=1.0)
    batch = draw_batch(config=consistency)
    assert torch.equal(batch[2].draws.r, torch.zeros(16))
    meanflow = run_loss(network, batch, MeanFlowConfig(times=EVERY))
    ours = run_loss(network, batch, consistency)
    assert torch.equal(gradients(network, ours.loss), gradients(network, meanflow.loss))
    without = run_loss(network, batch, replace(consistency, derivative_weight=0.0))
    v = batch[2].draws.noise - batch[0]
    torch.testing.assert_close(without.squared_error, (ours.u - v).square().sum(dim=(1, 2, 3)))


def test_ect_tends_to_continuous_consistency(network):
    # With s -> t, (f(z_t) - f(z_s)) / (t - s) tends to df/dt = -(u - (v - t du/dt)), and dt / dsigma is (1 - t)^2.
    network = network.double()
    continuous = ContinuousConsistencyConfig(derivative_weight=1.0, guards=OFF)
    latents, _, record = batch = draw_batch(config=continuous, dtype=torch.float64)

    def error(config):
        offset = torch.zeros_like(latents, requires_grad=True)

        def training(*arguments, **options):
            output = network(*arguments, **options)
            return replace(output, u=output.u.detach() + offset)

        output = build_objective(config).loss(training, network, *batch, null_label=NULL, global_num_rows=1)
        return torch.autograd.grad(output.loss, offset)[0] / 2

    t = column(record.draws.t)
    expected = t * (1 - t) ** 2 * error(continuous)
    errors = [relative(error(DiscreteConsistencyConfig(norm_p=0.0, stage=stage)), expected) for stage in (8, 11, 14)]
    assert errors[-1] < 1e-3
    for coarse, fine in itertools.pairwise(errors):
        assert fine == pytest.approx(coarse / 8, rel=0.1)


def test_ects_previous_time_is_the_papers():
    sigma = torch.tensor([0.01, 0.2, 1.0, 5.0, 80.0], dtype=torch.float64)
    # Computed by hand for stage 1, where a quarter of 1 + 8 sigmoid(-sigma) is above 1 for the small levels.
    found = previous_time(sigma / (1 + sigma), 1)
    expected = torch.tensor([max(0.0, s * (1 - (1 + 8 / (1 + math.exp(s))) / 4)) for s in sigma.tolist()])
    torch.testing.assert_close((found / (1 - found)).float(), expected)
    assert expected[:2].tolist() == [0.0, 0.0]
    assert expected[2].item() == pytest.approx(0.21212, abs=1e-5)
    assert expected[4].item() == pytest.approx(60.0)
    t = torch.linspace(0.001, 0.999, 500)
    for stage in range(8):
        s = previous_time(t, stage)
        assert bool(((s >= 0) & (s < t)).all())


def test_ect_draws_the_papers_noise_levels():
    draws = draw_record(DiscreteConsistencyConfig(), seed=0, step=0, num_rows=20_000, latent_shape=(1, 1, 1)).draws
    log_sigma = torch.logit(draws.t.double())
    assert log_sigma.mean().item() == pytest.approx(-1.1, abs=0.05)
    assert log_sigma.std().item() == pytest.approx(2.0, abs=0.05)
    assert torch.equal(draws.r, torch.zeros(20_000))
    half = draw_record(DiscreteConsistencyConfig(times=HALF), seed=0, step=0, num_rows=10, latent_shape=(1, 1, 1)).draws
    assert (half.r == half.t).tolist() == [True, False] * 5
    assert (half.r == 0.0).tolist() == [False, True] * 5


def test_ddpm_draws_every_level():
    draws = draw_record(DiffusionConfig(num_timesteps=4), seed=0, step=0, num_rows=4000, latent_shape=(1, 1, 1)).draws
    counts = Counter(draws.t.tolist())
    assert sorted(counts) == [0.25, 0.5, 0.75, 1.0]
    assert min(counts.values()) > 900
    assert torch.equal(draws.r, draws.t)


def test_alpha_flows_ratio_falls_from_1_to_0():
    config = AlphaFlowConfig()
    ratios = {progress: config.at(progress, 100).ratio for progress in (0, 28, 29, 50, 70, 71, 72, 99)}
    assert ratios[0] == ratios[28] == 1.0
    assert ratios[29] == pytest.approx(1 / (1 + math.exp(-25 * 0.21)))
    assert ratios[50] == pytest.approx(0.5)
    assert ratios[70] == pytest.approx(1 / (1 + math.exp(25 * 0.2)))
    assert ratios[72] == ratios[99] == 0.0
    assert AlphaFlowConfig(ratio=0.3).at(99, 100).ratio == 0.3


@pytest.mark.parametrize("steepness", [5.0, 25.0, 100.0])
def test_alpha_flows_phases_agree_with_its_steps(steepness):
    config, num_steps = AlphaFlowConfig(steepness=steepness), 2000
    kinds = Counter(
        ratio if ratio in (0.0, 1.0) else 0.5
        for ratio in (config.at(step, num_steps).ratio for step in range(num_steps))
    )
    phases = config.phases(num_steps)
    assert sum(share for share, _ in phases) == pytest.approx(1.0)
    assert {phase.ratio: share for share, phase in phases} == pytest.approx(
        {kind: count / num_steps for kind, count in kinds.items()}, abs=2e-3
    )


def test_soflows_ratio_falls_exponentially():
    config = SoFlowConfig()
    assert config.at(0, 1000).ratio == pytest.approx(0.1)
    assert config.at(500, 1000).ratio == pytest.approx(math.sqrt(0.1 * 0.002))
    assert config.at(999, 1000).ratio == pytest.approx(0.002, rel=0.01)


def test_the_derivatives_weight_rises_linearly():
    config = ContinuousConsistencyConfig()  # over a tenth of the run
    assert [config.at(step, 100).derivative_weight for step in (0, 5, 10, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert replace(config, warmup=0.0).at(0, 100).derivative_weight == 1.0


def test_ects_stages_have_equal_lengths():
    config = DiscreteConsistencyConfig()
    counts = Counter(config.at(step, 800).stage for step in range(800))
    assert counts == dict.fromkeys(range(8), 100)
    assert config.at(799, 800).stage == 7
    assert config.at(800, 800).stage == 7


@pytest.mark.parametrize(
    "config", [SoFlowConfig(), ContinuousConsistencyConfig(), DiscreteConsistencyConfig(), DiffusionConfig()]
)
def test_other_objectives_have_one_phase_that_can_be_built(config):
    [(share, phase)] = config.phases(100)
    assert share == 1.0
    objective = build_objective(phase)
    record = objective.record(objective.draw(seed=0, step=0, num_rows=4, latent_shape=(2, 1, 1)), 0, 4)
    latents = torch.zeros(4, 2, 1, 1)
    output = objective.loss(
        GaussianNetwork(), GaussianNetwork(), latents, torch.zeros(4).long(), record,
        null_label=NULL, global_num_rows=4,
    )  # fmt: skip
    assert tuple(output.metrics) == objective.metric_names


def test_a_run_uses_the_steps_objective_and_delays_its_guidance():
    loss = AlphaFlowConfig(guidance=GUIDANCE)
    config = TrainingConfig(loss=loss, num_steps=100, guidance_after_steps=60)
    assert config.loss_at(50) == replace(loss, ratio=0.5, guidance=GuidanceConfig())
    assert config.loss_at(90) == replace(loss, ratio=0.0)


def test_guards_that_are_off_change_nothing():
    u, target = torch.randn(2, 3, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    error, touched = guidance.guarded_error(u, target, OFF)
    assert touched is None
    assert torch.equal(error, u - target)


@pytest.mark.parametrize(
    ("guards", "expected", "expected_touched"),
    [
        (GuardConfig(max_target=4.0), [[0.5, 1.0], [-6.0, 3.0]], [False, True]),
        (GuardConfig(max_error=2.0), [[0.5, 1.0], [-2.0, 2.0]], [False, True]),
        (GuardConfig(max_target=4.0, max_error=5.0), [[0.5, 1.0], [-5.0, 3.0]], [False, True]),
        (
            GuardConfig(normalize_error=True),
            [
                [0.5 / (math.sqrt(0.625) + 0.1), 1.0 / (math.sqrt(0.625) + 0.1)],
                [-8.0 / (math.sqrt(36.5) + 0.1), 3.0 / (math.sqrt(36.5) + 0.1)],
            ],
            [True, True],
        ),
        (GuardConfig(max_error=100.0, max_target=100.0), [[0.5, 1.0], [-8.0, 3.0]], [False, False]),
    ],
    ids=["target", "error", "both", "normalise", "limits that are not reached"],
)
def test_guards_change_the_errors_value_but_not_its_derivative(guards, expected, expected_touched):
    u = torch.tensor([[1.0, 2.0], [-2.0, 4.0]], dtype=torch.float64).view(2, 2, 1, 1).requires_grad_()
    target = torch.tensor([[0.5, 1.0], [6.0, 1.0]], dtype=torch.float64).view(2, 2, 1, 1)
    error, touched = guidance.guarded_error(u, target, guards)
    expected = torch.tensor(expected, dtype=torch.float64).view(2, 2, 1, 1)
    torch.testing.assert_close(error, expected)
    assert touched.tolist() == expected_touched
    [gradient] = torch.autograd.grad(error.square().sum(), u)
    torch.testing.assert_close(gradient, 2 * expected)


@pytest.mark.parametrize("name", ["MeanFlow", "improved MeanFlow", "alpha-Flow", "ECT"])
def test_guards_act_in_every_objective_and_are_counted(network, imf_network, name):
    config = {"MeanFlow": GUIDED, "improved MeanFlow": IMPROVED}.get(name) or OTHER_OBJECTIVES[name]
    network = imf_network if name == "improved MeanFlow" else network
    batch = draw_batch(config=config)
    plain = run_loss(network, batch, config)
    gradient = gradients(network, plain.loss)
    unreached = run_loss(network, batch, replace(config, guards=GuardConfig(max_error=1e4, max_target=1e4)))
    assert "guarded_share" not in plain.metrics
    assert tuple(unreached.metrics["guarded_share"]) == (0.0, 16)
    assert relative(gradients(network, unreached.loss), gradient) < 1e-5
    guarded = run_loss(network, batch, replace(config, guards=GuardConfig(max_error=0.1)))
    assert tuple(guarded.metrics["guarded_share"]) == (16.0, 16)
    assert torch.equal(guarded.squared_error, plain.squared_error)  # before guards
    assert relative(gradients(network, guarded.loss), gradient) > 0.1


@pytest.mark.parametrize("name", OTHER_OBJECTIVES)
def test_bins_of_t_add_up_to_the_totals(network, name):
    config = OTHER_OBJECTIVES[name]
    latents, labels, record = draw_batch(config=config)
    draws = {name: getattr(record.draws, name).clone() for name in ("t", "r", "noise", "label_dropped")}
    if isinstance(config, DiffusionConfig):
        draws["t"][0] = draws["r"][0] = 1.0
    record = make_record(config, **draws)
    objective = build_objective(config)
    output = run_loss(network, (latents, labels, record), config)
    metrics = output.metrics
    assert tuple(metrics) == objective.metric_names
    in_bins = [metrics[f"squared_error_by_t/0.{index}"] for index in range(10)]
    counts = torch.histc(draws["t"], 10, 0.0, 1.0)
    assert [int(mean.num_samples) for mean in in_bins] == counts.tolist()
    names = ("squared_error", "squared_error_r_equals_t", "squared_error_r_below_t")
    totals = [metrics[name] for name in names if name in metrics]
    assert sum(mean.num_samples for mean in totals) == 16
    torch.testing.assert_close(sum(mean.total for mean in in_bins), sum(mean.total for mean in totals))
    if "dudt_norm" in metrics:
        in_bins = [metrics[f"dudt_norm_by_t/0.{index}"] for index in range(10)]
        torch.testing.assert_close(sum(mean.total for mean in in_bins), metrics["dudt_norm"].total)
        torch.testing.assert_close(metrics["dudt_norm"].total, output.dudt.flatten(1).norm(dim=1).sum())
        assert sum(int(mean.num_samples) for mean in in_bins) == metrics["dudt_norm"].num_samples
        has_derivative = getattr(config, "ratio", 0.0) == 0.0  # alpha-Flow has none before a is 0
        assert (metrics["dudt_norm"].num_samples > 0) == has_derivative


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bin_holds_the_samples_of_its_times(autocast):
    t = torch.tensor([0.0, 0.05, 0.1, 0.55, 0.999, 1.0])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # bfloat16 would round 1025
        means = guidance.means_by_time("error", torch.tensor([1.0, 2.0, 4.0, 1025.0, 16.0, 32.0]), t)
    assert {name: (int(total), int(count)) for name, (total, count) in means.items() if count} == {
        "error_by_t/0.0": (3, 2),
        "error_by_t/0.1": (4, 1),
        "error_by_t/0.5": (1025, 1),
        "error_by_t/0.9": (48, 2),
    }
    assert len(means) == 10


def test_soflows_error_is_that_of_the_flow_map(network):
    # The identity that makes SoFlow and alpha-Flow one: (f(z_t, r, t) - f(z_s, r, s)) / (t - s) = -(u - target) / a.
    network = network.double()
    config = SoFlowConfig(ratio=0.05, times=EVERY)
    latents, labels, record = draw_batch(config=config, dtype=torch.float64)
    t, r = column(record.draws.t), column(record.draws.r)
    z, v = (1 - t) * latents + t * record.draws.noise, record.draws.noise - latents
    s = t - 0.05 * (t - r)

    def flow_map(z, t):
        conditioning = Conditioning(
            t=t.flatten(), r=r.flatten(), labels=torch.where(record.draws.label_dropped, NULL, labels)
        )
        return z - (t - r) * network(z, conditioning).u

    quotient = (flow_map(z, t) - flow_map(z - (t - s) * v, s)) / (t - s)
    for config_class in (SoFlowConfig, AlphaFlowConfig):
        output = run_loss(network, (latents, labels, record), config_class(ratio=0.05, times=EVERY))
        torch.testing.assert_close(output.squared_error, quotient.square().sum(dim=(1, 2, 3)), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: AlphaFlowConfig(ratio=1.5), r"loss.ratio must lie in \[0, 1\], but got 1.5"),
        (lambda: AlphaFlowConfig(steepness=0.0), "loss.steepness must be above 0, but got 0.0"),
        (lambda: SoFlowConfig(ratio_end=0.0), "loss.ratio_end must be above 0 and at most 1, but got 0.0"),
        (lambda: ContinuousConsistencyConfig(warmup=2.0), r"loss.warmup must lie in \[0, 1\], but got 2.0"),
        (lambda: ContinuousConsistencyConfig(times=FLOW_MATCHING.times), "fraction_r_below_t above 0, but got 0"),
        (lambda: DiscreteConsistencyConfig(guidance=GUIDANCE), "guidance and the own velocity need samples with r = t"),
        (lambda: DiscreteConsistencyConfig(num_stages=0), "loss.num_stages must be a whole number above 0, but got 0"),
        (lambda: DiffusionConfig(schedule="square"), "must be one of linear, cosine, but got 'square'"),
        (lambda: DiffusionConfig(num_timesteps=1), "loss.num_timesteps must be at least 2, but got 1"),
    ],
)
def test_invalid_settings_are_refused_with_the_reason(build, words):
    with pytest.raises(ValueError, match=words):
        build()
