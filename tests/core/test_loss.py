import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow_core.config import GuidanceConfig, LossConfig, TimeSamplingConfig
from meanflow_core.draws import StepRecord, draw_step_record
from meanflow_core.loss import meanflow_loss, total_derivative
from meanflow_core.transformer import Conditioning
from tests.golden_check import GOLDEN_FOLDER, check, load

NULL = 10
HALF = TimeSamplingConfig(fraction_r_below_t=0.5)
GUIDED = LossConfig(
    guidance=GuidanceConfig(omega=0.7, kappa=0.5, guidance_interval_start=0.1, guidance_interval_end=0.8),
    label_drop_probability=0.3,
)
IMPROVED = LossConfig(objective="improved_meanflow", times=HALF, label_drop_probability=0.3)
# Every form of the objective; labels are dropped in rows with r < t too where the share is above 1/2.
OBJECTIVES = {
    "flow matching": LossConfig(times=TimeSamplingConfig(fraction_r_below_t=0.0)),
    "no guidance": LossConfig(times=HALF),
    "omega": LossConfig(times=HALF, guidance=GuidanceConfig(omega=2.0)),
    "kappa and no null class": LossConfig(times=HALF, guidance=GuidanceConfig(omega=0.5, kappa=0.5)),
    "omega, kappa, interval": replace(GUIDED, times=HALF),
    "no null class but for rounding": LossConfig(times=HALF, guidance=GuidanceConfig(omega=0.7, kappa=0.3)),
    "guided flow matching": LossConfig(
        times=TimeSamplingConfig(fraction_r_below_t=0.0), guidance=GuidanceConfig(omega=0.5, kappa=0.5)
    ),
    "labels dropped anywhere": replace(GUIDED, times=HALF, label_drop_probability=0.6),
    "every row r < t": replace(GUIDED, times=TimeSamplingConfig(fraction_r_below_t=1.0)),
    "own velocity": replace(GUIDED, times=HALF, tangent="own_velocity"),
    "own velocity, no guidance": LossConfig(times=HALF, tangent="own_velocity"),
    "improved MeanFlow": IMPROVED,
    "improved MeanFlow, labels dropped anywhere": replace(IMPROVED, label_drop_probability=0.6),
}


def draw_batch(num_rows=16, config=GUIDED, seed=3, dtype=torch.float32):
    record = draw_step_record(config, seed=seed, step=5, num_rows=num_rows, latent_shape=(4, 8, 8))
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(num_rows, 4, 8, 8, generator=generator).to(dtype)
    labels = torch.randint(10, (num_rows,), generator=generator)
    draws = {
        name: getattr(record, name)
        for name in ("t", "r", "noise", "omega", "guidance_interval_start", "guidance_interval_end")
    }
    draws = {name: value.to(dtype) for name, value in draws.items() if value is not None}
    return latents, labels, StepRecord.from_draws(**draws, label_dropped=record.label_dropped, config=config)


def gradients(network, loss):
    found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    pairs = zip(found, network.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def reference_loss(network, x, labels, record, config):
    """The objective as the papers write it: guidance and the JVP over the whole batch, in one graded pass."""
    t, r, column = record.t, record.r, (-1, 1, 1, 1)
    z = (1 - t.view(column)) * x + t.view(column) * record.noise
    v = record.noise - x
    y = torch.where(record.label_dropped, NULL, labels)
    null = torch.full_like(y, NULL)
    guidance = {
        "omega": record.omega,
        "guidance_interval_start": record.guidance_interval_start,
        "guidance_interval_end": record.guidance_interval_end,
    }
    improved = config.objective == "improved_meanflow"

    def velocity(asked, omega):
        told = (
            {
                "omega": omega,
                "guidance_interval_start": torch.zeros_like(t),
                "guidance_interval_end": torch.ones_like(t),
            }
            if improved
            else {}
        )
        return network(z, Conditioning(t=t, r=t, labels=asked, **told)).velocity

    with torch.no_grad():
        if improved:
            inside = (t >= record.guidance_interval_start) & (t <= record.guidance_interval_end)
            omega = torch.where(inside, record.omega, torch.ones_like(t))
            own = velocity(labels, omega)
            guided = v + (1 - 1 / omega).view(column) * (own - velocity(null, torch.ones_like(t)))
        else:
            inside = (
                (t >= config.guidance.guidance_interval_start) & (t <= config.guidance.guidance_interval_end)
            ).view(column)
            omega = torch.where(inside, config.guidance.omega, torch.ones_like(t.view(column)))
            kappa = torch.where(inside, config.guidance.kappa, torch.zeros_like(t.view(column)))
            own = velocity(labels, None)
            guided = omega * v + kappa * own + (1 - omega - kappa) * velocity(null, None)
        guided = torch.where(record.label_dropped.view(column), v, guided)

    def function(z, t, r):
        answer = network(z, Conditioning(t=t, r=r, labels=y, **guidance))
        return answer.u, answer.velocity

    tangent = own if config.takes_own_velocity else guided
    with sdpa_kernel(SDPBackend.MATH):
        (u, head), (dudt, _) = torch.func.jvp(function, (z, t, r), (tangent, torch.ones_like(t), torch.zeros_like(r)))
    errors = [u - (guided - (t - r).view(column) * dudt).detach()]
    if improved:
        errors.append(head - guided)
    squares = [error.square().flatten(1).sum(1) for error in errors]
    return sum((square / (square.detach() + config.norm_eps) ** config.norm_p).mean() for square in squares)


@pytest.mark.parametrize("path", sorted(GOLDEN_FOLDER.glob("*.npz")), ids=lambda path: path.stem)
@pytest.mark.parametrize("separate_derivative", [False, True], ids=["shared", "separate"])
def test_matches_the_authors_code_on_every_value_gradient_and_sampling(path, separate_derivative):
    errors = check(load(path), separate_derivative=separate_derivative)
    assert len(errors) > 40  # every gradient is among them
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def test_golden_check_sees_a_wrong_number():
    golden = load(GOLDEN_FOLDER / "mf_cfg_interval.npz")
    key = next(key for key in golden if key.startswith("grad:") and "blocks/layers_0/attn/qkv" in key)
    golden[key] = golden[key] * 1.001
    wrong = [name for name, error in check(golden).items() if error > 1e-4]
    assert wrong == ["gradient of blocks.0.attn.qkv.weight"] or wrong == ["gradient of blocks.0.attn.qkv.bias"]


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@pytest.mark.parametrize("name", ["mf_cfg_interval", "imf"])
def test_rows_may_stand_in_any_order(name, order):
    golden = load(GOLDEN_FOLDER / f"{name}.npz")
    num_rows = len(golden["t"])
    rows = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1)).numpy()
    rows = rows if order == "shuffled" else rows[rows.argsort()[::-1]]
    for key, value in golden.items():
        if not key.startswith(("param:", "grad:", "config")) and value.shape[:1] == (num_rows,):
            golden[key] = value[rows]
    assert max(check(golden).values()) < 1e-5


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_equal_the_one_pass_form_over_the_whole_batch(network, imf_network, name, separate):
    config = OBJECTIVES[name]
    network = (imf_network if config.objective == "improved_meanflow" else network).double()
    latents, labels, record = draw_batch(config=config, dtype=torch.float64)
    output = meanflow_loss(
        network, network, latents, labels, record, config,
        null_label=NULL, global_num_rows=16, separate_derivative=separate,
    )  # fmt: skip
    theirs = reference_loss(network, latents, labels, record, config)
    assert output.loss.item() == pytest.approx(theirs.item(), rel=1e-12)
    assert relative(gradients(network, output.loss), gradients(network, theirs)) < 1e-9


@pytest.mark.parametrize("kind", ["dit", "imf_dit"])
def test_total_derivative_agrees_with_finite_differences(network, imf_network, kind):
    network, config = (network, GUIDED) if kind == "dit" else (imf_network, IMPROVED)
    network = network.double()
    latents, labels, record = draw_batch(config=config, dtype=torch.float64)
    tangent, eps = torch.randn_like(latents), 1e-6
    conditioning = Conditioning(
        t=record.t,
        r=record.r,
        labels=labels,
        omega=record.omega,
        guidance_interval_start=record.guidance_interval_start,
        guidance_interval_end=record.guidance_interval_end,
    )
    dudt = total_derivative(network, latents, conditioning, tangent)

    def u(sign):
        return network(latents + sign * eps * tangent, replace(conditioning, t=record.t + sign * eps)).u

    with torch.no_grad():
        numeric = (u(1) - u(-1)) / (2 * eps)
    assert relative(dudt, numeric) < 1e-7


def test_gradient_agrees_with_finite_differences_of_the_loss_at_a_fixed_target(network):
    network = network.double()
    config = replace(GUIDED, norm_p=0.0)  # the weight is a constant too, as the gradient takes it
    latents, labels, record = draw_batch(config=config, dtype=torch.float64)

    def run():
        return meanflow_loss(network, network, latents, labels, record, config, null_label=NULL, global_num_rows=16)

    output = run()
    column = (record.t - record.r).view(-1, 1, 1, 1)
    target = output.v_guided - column * output.dudt
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in network.parameters()]
    slope = sum(
        (g * d).sum()
        for g, d in zip(torch.autograd.grad(output.loss, list(network.parameters())), directions, strict=True)
    )

    def moved(eps):
        with torch.no_grad():
            for parameter, direction in zip(network.parameters(), directions, strict=True):
                parameter.add_(eps * direction)
            return (run().u - target).square().sum() / 16

    eps = 1e-6
    numeric = (moved(eps) - moved(-2 * eps)) / (2 * eps)
    assert float(abs(slope - numeric) / abs(numeric)) < 1e-7


def test_target_is_velocity_when_r_equals_t(network):
    config = OBJECTIVES["flow matching"]
    latents, labels, record = draw_batch(config=config)
    output = meanflow_loss(network, network, latents, labels, record, config, null_label=NULL, global_num_rows=16)
    v = record.noise - latents
    torch.testing.assert_close(output.squared_error, (output.u - v).square().flatten(1).sum(1))
    assert torch.equal(output.dudt, torch.zeros_like(v))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_forward_is_run_whose_result_is_known(network, imf_network, name):
    config = OBJECTIVES[name]
    network = imf_network if config.objective == "improved_meanflow" else network
    latents, labels, record = draw_batch(num_rows=64, config=config)
    asked, graded = [], []

    def plain(z, conditioning, tangent=None, velocity_only=False):
        assert velocity_only
        assert tangent is None
        asked.append(len(z))
        return network(z, conditioning, tangent, velocity_only)

    def grading(z, conditioning, tangent=None, velocity_only=False):
        graded.append((len(z), 0 if tangent is None else len(tangent)))
        return network(z, conditioning, tangent, velocity_only)

    meanflow_loss(grading, plain, latents, labels, record, config, null_label=NULL, global_num_rows=64)
    # The velocity of the null class where it has a weight; the own one where it is wanted and r < t; then padding.
    kept = ~record.label_dropped
    inside = (record.t >= config.guidance.guidance_interval_start) & (record.t <= config.guidance.guidance_interval_end)
    has_null = abs(1 - config.guidance.omega - config.guidance.kappa) > 1e-9
    guided = kept & inside & (not config.guidance.is_off)
    needs_own = guided & (config.guidance.kappa > 0)
    if config.objective == "improved_meanflow":
        guided, has_null = (
            kept & (record.t >= record.guidance_interval_start) & (record.t <= record.guidance_interval_end),
            True,
        )
    if config.takes_own_velocity:
        needs_own = torch.ones_like(kept)
    needed = int((guided & has_null).sum() + (needs_own & (record.r < record.t)).sum())
    assert graded == [(64, int((record.r < record.t).sum()))]
    assert asked == ([] if needed == 0 else [-(-needed // 8) * 8])


def test_number_of_network_calls_does_not_depend_on_the_draws(network, imf_network):
    # Under FSDP a worker that made a call less than the others would leave them waiting for ever.
    for config, separate in itertools.product(OBJECTIVES.values(), (False, True)):
        net = imf_network if config.objective == "improved_meanflow" else network
        latents, labels, whole = draw_batch(config=config)
        counts = set()
        for row in range(16):  # each row alone: with r = t or below, inside the interval or not, dropped or not
            calls = []

            def counting(*arguments, net=net, calls=calls, **options):
                calls.append(1)
                return net(*arguments, **options)

            meanflow_loss(
                counting, counting, latents[row : row + 1], labels[row : row + 1], whole.rows(row, row + 1, config), config,
                null_label=NULL, global_num_rows=16, separate_derivative=separate,
            )  # fmt: skip
            counts.add(len(calls))
        assert len(counts) == 1, config


def test_asked_batches_have_sizes_from_a_small_set():
    sizes = {
        len(draw_step_record(GUIDED, seed=0, step=step, num_rows=64, latent_shape=(1, 1, 1)).rows_velocity)
        for step in range(200)
    }
    assert all(size % 8 == 0 for size in sizes)
    assert len(sizes) <= 6


@pytest.mark.parametrize("name", ["omega, kappa, interval", "improved MeanFlow"])
def test_uneven_shares_of_a_batch_add_up_to_the_whole(network, imf_network, name):
    config = OBJECTIVES[name]
    network = imf_network if config.objective == "improved_meanflow" else network
    latents, labels, record = draw_batch(config=config)

    def loss(start, stop):
        share = record.rows(start, stop, config)
        rows = slice(start, stop)
        return meanflow_loss(
            network, network, latents[rows], labels[rows], share, config, null_label=NULL, global_num_rows=16
        ).loss

    whole = gradients(network, loss(0, 16))
    parts = sum(gradients(network, loss(start, stop)) for start, stop in ((0, 3), (3, 4), (4, 16)))
    assert relative(parts, whole) < 1e-6


def test_derivative_is_float32_under_autocast_where_it_has_its_own_pass(network):
    latents, labels, record = draw_batch(config=LossConfig())  # no guidance: the tangent is exact

    def run(separate, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return meanflow_loss(
                network, network, latents, labels, record, LossConfig(),
                null_label=NULL, global_num_rows=16, separate_derivative=separate,
            )  # fmt: skip

    exact, separate, shared = run(True, False), run(True, True), run(False, True)
    assert 1e-4 < relative(separate.u, exact.u) < 0.02  # the graded pass is in bfloat16
    assert relative(separate.dudt, exact.dudt) < 1e-6
    assert 1e-4 < relative(shared.dudt, exact.dudt) < 0.05
    assert separate.loss.dtype == shared.loss.dtype == torch.float32


def test_graded_pass_saves_no_more_for_backward_than_flow_matching(network):
    latents, labels, record = draw_batch(num_rows=32)
    _, _, flow_record = draw_batch(num_rows=32, config=OBJECTIVES["flow matching"])

    def saved(record, config):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = meanflow_loss(
                network, network, latents, labels, record, config, null_label=NULL, global_num_rows=32
            )
        assert output.loss.requires_grad
        return sum(sizes.values())

    assert saved(record, GUIDED) <= 1.05 * saved(flow_record, OBJECTIVES["flow matching"])


def test_draws_are_a_function_of_seed_and_step():
    def draw(seed, step):
        return draw_step_record(IMPROVED, seed=seed, step=step, num_rows=8, latent_shape=(4, 8, 8))

    assert torch.equal(draw(1, 2).noise, draw(1, 2).noise)
    assert torch.equal(draw(1, 2).omega, draw(1, 2).omega)
    assert not torch.equal(draw(1, 2).noise, draw(1, 3).noise)
    assert not torch.equal(draw(1, 2).t, draw(2, 2).t)
    assert not torch.equal(draw(1, 2).noise, draw(1, 2).posterior_noise)
    assert not torch.equal(draw(1, 2).noise, draw(2, 1).noise)


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
        ({"noise": torch.zeros(2, 1)}, "shape"),
        ({"omega": torch.tensor([0.5, 2.0])}, "omega >= 1"),
        ({"omega": torch.tensor([float("nan"), 2.0])}, "omega >= 1"),
        ({"guidance_interval_start": torch.tensor([0.6, 0.0])}, "guidance_interval_start <= guidance_interval_end"),
        ({"omega": None}, "needs omega"),
        ({"r": torch.tensor([-0.1, 0.5])}, "0 <= r <= t <= 1"),
        ({"omega": torch.tensor([torch.inf, 2.0])}, "omega >= 1"),
        ({"guidance_interval_start": torch.tensor([-0.1, 0.0])}, "0 <= guidance_interval_start"),
        ({"guidance_interval_end": torch.tensor([1.1, 1.0])}, "guidance_interval_end <= 1"),
    ],
)
def test_impossible_draws_are_refused(changes, words):
    draws = {
        "t": torch.tensor([0.7, 0.5]),
        "r": torch.tensor([0.2, 0.5]),
        "noise": torch.zeros(2, 1, 1, 1),
        "label_dropped": torch.tensor([False, False]),
        "omega": torch.tensor([1.0, 8.0]),
        "guidance_interval_start": torch.tensor([0.2, 0.0]),
        "guidance_interval_end": torch.tensor([0.5, 1.0]),
    }
    with pytest.raises(ValueError, match=words):
        StepRecord.from_draws(**{**draws, **changes}, config=IMPROVED)


def test_batch_that_does_not_fit_the_record_is_refused(network):
    latents, labels, record = draw_batch()
    with pytest.raises(ValueError, match="the record is for latents"):
        meanflow_loss(network, network, latents[:3], labels, record, GUIDED, null_label=NULL, global_num_rows=16)
    with pytest.raises(ValueError, match="the record is for latents"):
        meanflow_loss(network, network, latents, labels[:3], record, GUIDED, null_label=NULL, global_num_rows=16)


def test_improved_meanflow_wants_a_velocity_head(imf_network):
    latents, labels, record = draw_batch(config=IMPROVED)

    def headless(z, conditioning, tangent=None, velocity_only=False):
        answer = imf_network(z, conditioning, tangent, velocity_only)
        return answer if velocity_only else replace(answer, v=None)

    with pytest.raises(ValueError, match="needs a network with a v head"):
        meanflow_loss(headless, headless, latents, labels, record, IMPROVED, null_label=NULL, global_num_rows=16)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.9), (0.1, 1.0)])
def test_rows_with_r_equal_t_may_have_an_interval_of_their_own(imf_network, start, end):
    network = imf_network.double()
    latents, labels, record = draw_batch(config=IMPROVED, dtype=torch.float64)
    guidance_interval_start, guidance_interval_end = torch.full_like(record.t, start), torch.full_like(record.t, end)
    record = StepRecord.from_draws(
        t=record.t, r=record.r, noise=record.noise, label_dropped=record.label_dropped,
        omega=record.omega, guidance_interval_start=guidance_interval_start,
        guidance_interval_end=guidance_interval_end, config=IMPROVED,
    )  # fmt: skip
    output = meanflow_loss(network, network, latents, labels, record, IMPROVED, null_label=NULL, global_num_rows=16)
    assert output.loss.item() == pytest.approx(
        reference_loss(network, latents, labels, record, IMPROVED).item(), rel=1e-12
    )


def test_rows_on_the_edges_of_the_interval_are_guided_and_omega_may_be_one():
    t = torch.tensor([0.125, 0.25, 0.75, 0.875])
    draws = {"t": t, "r": t, "noise": torch.zeros(4, 1, 1, 1), "label_dropped": torch.zeros(4, dtype=torch.bool)}
    config = LossConfig(
        guidance=GuidanceConfig(omega=0.7, kappa=0.5, guidance_interval_start=0.25, guidance_interval_end=0.75)
    )
    assert (StepRecord.from_draws(**draws, config=config).weight_conditional > 0).tolist() == [False, True, True, False]
    drawn = {
        "omega": torch.tensor([2.0, 2.0, 2.0, 1.0]),
        "guidance_interval_start": torch.full((4,), 0.25),
        "guidance_interval_end": torch.full((4,), 0.75),
    }
    record = StepRecord.from_draws(**draws, **drawn, config=IMPROVED)
    assert record.weight_conditional.tolist() == [0.0, 0.5, 0.5, 0.0]


def test_share_of_a_record_has_every_draw_of_its_rows():
    whole = draw_step_record(IMPROVED, seed=1, step=2, num_rows=16, latent_shape=(4, 2, 2))
    share = whole.rows(3, 9, IMPROVED)
    for name in (
        "t",
        "r",
        "noise",
        "posterior_noise",
        "label_dropped",
        "mirrored",
        "omega",
        "guidance_interval_start",
        "guidance_interval_end",
    ):
        assert torch.equal(getattr(share, name), getattr(whole, name)[3:9]), name


def test_record_moves_to_a_device_whole():
    record = draw_step_record(IMPROVED, seed=1, step=2, num_rows=16, latent_shape=(4, 2, 2))
    moved = vars(record.to(torch.device("meta")))
    assert {name: (value.device.type, value.shape) for name, value in moved.items()} == {
        name: ("meta", value.shape) for name, value in vars(record).items()
    }
    assert draw_batch()[2].to(torch.device("meta")).omega is None


def test_half_of_the_rows_are_mirrored_and_posterior_noise_is_standard_normal():
    record = draw_step_record(LossConfig(), seed=0, step=0, num_rows=40_000, latent_shape=(1, 1, 1))
    assert float(record.mirrored.double().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(record.posterior_noise.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(record.posterior_noise.std()) == pytest.approx(1.0, abs=0.02)


def test_labels_are_dropped_on_every_r_equals_t_row_where_these_just_suffice():
    config = LossConfig(label_drop_probability=0.5, times=HALF)
    record = draw_step_record(config, seed=0, step=0, num_rows=1000, latent_shape=(1, 1, 1))
    assert torch.equal(record.label_dropped, record.r == record.t)


def test_flow_matching_makes_no_pass_for_a_derivative(network):
    config = OBJECTIVES["flow matching"]
    latents, labels, record = draw_batch(config=config)
    output = meanflow_loss(
        network, None, latents, labels, record, config,
        null_label=NULL, global_num_rows=16, separate_derivative=True,
    )  # fmt: skip
    assert output.loss.requires_grad


@pytest.mark.parametrize("name", ["omega, kappa, interval", "improved MeanFlow"])
def test_outputs_are_float32_under_autocast(network, imf_network, name):
    config = OBJECTIVES[name]
    network = imf_network if config.objective == "improved_meanflow" else network
    latents, labels, record = draw_batch(config=config)
    with torch.autocast("cpu", torch.bfloat16):
        output = meanflow_loss(network, network, latents, labels, record, config, null_label=NULL, global_num_rows=16)
    assert {value.dtype for value in vars(output).values() if value is not None} == {torch.float32}


def test_draws_of_another_shape_are_refused():
    draws = {
        "t": torch.tensor([0.7, 0.5]), "r": torch.tensor([0.2, 0.5]), "noise": torch.zeros(2, 1, 1, 1),
        "label_dropped": torch.tensor([False, False]), "config": LossConfig(),
    }  # fmt: skip
    with pytest.raises(
        ValueError, match=r"posterior_noise must have noise's shape \(2, 1, 1, 1\), but got \(2, 1, 1, 2\)"
    ):
        StepRecord.from_draws(**draws, posterior_noise=torch.zeros(2, 1, 1, 2))
    with pytest.raises(ValueError, match="label_dropped, mirrored must have shape"):
        StepRecord.from_draws(**draws, mirrored=torch.tensor([True]))
    with pytest.raises(ValueError, match="but row 1 has r = 0.5, t = 0.25"):
        StepRecord.from_draws(**{**draws, "t": torch.tensor([0.7, 0.25])})


def test_labels_are_dropped_on_no_row_with_r_below_t_though_one_minus_rho_is_rounded():
    config = LossConfig(label_drop_probability=0.1, times=TimeSamplingConfig(fraction_r_below_t=0.9))
    record = draw_step_record(config, seed=0, step=0, num_rows=1000, latent_shape=(1, 1, 1))
    assert not record.label_dropped[record.rows_below].any()
    assert int(record.label_dropped.sum()) == 100


def test_conditioning_of_other_rows_is_not_spread_over_the_batch(network):
    one = Conditioning(t=torch.ones(1), r=torch.zeros(1), labels=torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="3 latents need a conditioning of as many rows"):
        network(torch.zeros(3, 4, 8, 8), one)
