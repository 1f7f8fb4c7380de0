"""The loss: golden values, the papers' formulas over the whole batch, finite differences, and the number of forwards."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow_core.config import GuidanceConfig, ImprovedMeanFlowConfig, MeanFlowConfig
from meanflow_core.networks.interface import Conditioning
from meanflow_core.objectives.flow import total_derivative
from meanflow_core.objectives.guidance import means_by_time
from meanflow_core.objectives.interface import build_objective
from tests.golden_check import GOLDEN_FOLDER, check, load
from tests.support.objectives import (
    FLOW_MATCHING,
    GUIDED,
    IMPROVED,
    NULL,
    OBJECTIVES,
    OTHER_OBJECTIVES,
    conditioning_of,
    draw_batch,
    gradients,
    make_record,
    relative,
    rows_of,
    run_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["guided", "improved"])
def setting(request, network, imf_network):
    """A network and an objective for it."""
    return (network, GUIDED) if request.param == "guided" else (imf_network, IMPROVED)


def uses_own_velocity(config):
    return isinstance(config, ImprovedMeanFlowConfig) or config.tangent == "own_velocity"


def reference_loss(network, x, labels, record, config):
    """The loss as in the papers: guidance and the JVP over the whole batch, in one forward with a graph."""
    conditioning, record = conditioning_of(record, labels), record.draws
    t, r, column = record.t, record.r, (-1, 1, 1, 1)
    z = (1 - t.view(column)) * x + t.view(column) * record.noise
    v = record.noise - x
    y = torch.where(record.label_dropped, NULL, labels)
    null = torch.full_like(y, NULL)
    improved = isinstance(config, ImprovedMeanFlowConfig)
    conditioning = replace(conditioning, labels=y)

    def velocity(classes, omega):
        inputs = Conditioning(t=t, r=t, labels=classes)
        if improved:
            inputs = replace(
                inputs,
                omega=omega,
                guidance_interval_start=torch.zeros_like(t),
                guidance_interval_end=torch.ones_like(t),
            )
        return network(z, inputs).velocity

    with torch.no_grad():
        if improved:
            inside = (t >= record.guidance_interval_start) & (t <= record.guidance_interval_end)
            omega = torch.where(inside, record.omega, torch.ones_like(t))
            own = velocity(labels, omega)
            guided = v + (1 - 1 / omega).view(column) * (own - velocity(null, torch.ones_like(t)))
        else:
            guidance = config.guidance
            inside = ((t >= guidance.guidance_interval_start) & (t <= guidance.guidance_interval_end)).view(column)
            omega = torch.where(inside, guidance.omega, torch.ones_like(t.view(column)))
            kappa = torch.where(inside, guidance.kappa, torch.zeros_like(t.view(column)))
            own = velocity(labels, None)
            guided = omega * v + kappa * own + (1 - omega - kappa) * velocity(null, None)
        guided = torch.where(record.label_dropped.view(column), v, guided)

    def function(z, t, r):
        output = network(z, replace(conditioning, t=t, r=r))
        return output.u, output.velocity

    tangent = own if uses_own_velocity(config) else guided
    with sdpa_kernel(SDPBackend.MATH):
        (u, head), (dudt, _) = torch.func.jvp(function, (z, t, r), (tangent, torch.ones_like(t), torch.zeros_like(r)))
    errors = [u - (guided - (t - r).view(column) * dudt).detach()]
    if improved:
        errors.append(head - guided)
    squares = [error.square().flatten(1).sum(1) for error in errors]
    return sum((square / (square.detach() + config.norm_eps) ** config.norm_p).mean() for square in squares)


@pytest.mark.parametrize("path", sorted(GOLDEN_FOLDER.glob("*.npz")), ids=lambda path: path.stem)
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_matches_the_authors_values_gradients_and_samples(path, separate):
    errors = check(load(path), separate_derivative=separate)
    assert len(errors) > 40  # including every gradient
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def test_golden_check_notices_a_wrong_gradient():
    golden = load(GOLDEN_FOLDER / "mf_cfg_interval.npz")
    key = next(key for key in golden if key.startswith("grad:") and "blocks/layers_0/attn/qkv" in key)
    golden[key] = golden[key] * 1.001
    wrong = [name for name, error in check(golden).items() if error > 1e-4]
    assert wrong == ["gradient of blocks.0.attn.qkv.weight"] or wrong == ["gradient of blocks.0.attn.qkv.bias"]


@pytest.mark.parametrize("name", ["mf_cfg_interval", "imf"])
def test_result_does_not_depend_on_the_order_of_rows(name):
    golden = load(GOLDEN_FOLDER / f"{name}.npz")
    num_rows = len(golden["t"])
    rows = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1)).numpy()
    for key, value in golden.items():
        if not key.startswith(("param:", "grad:", "config")) and value.shape[:1] == (num_rows,):
            golden[key] = value[rows]
    assert max(check(golden).values()) < 1e-5


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_equals_the_papers_form_over_the_whole_batch(network, imf_network, name, separate):
    config = OBJECTIVES[name]
    network = (imf_network if isinstance(config, ImprovedMeanFlowConfig) else network).double()
    batch = draw_batch(config=config, dtype=torch.float64)
    ours = run_loss(network, batch, config, separate=separate).loss
    theirs = reference_loss(network, *batch, config)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    assert relative(gradients(network, ours), gradients(network, theirs)) < 1e-9


def test_total_derivative_agrees_with_finite_differences(setting):
    network, config = setting[0].double(), setting[1]
    latents, labels, record = draw_batch(config=config, dtype=torch.float64)
    tangent, eps = torch.randn_like(latents), 1e-6
    conditioning = conditioning_of(record, labels)
    dudt = total_derivative(network, latents, conditioning, tangent)

    def u(sign):
        return network(latents + sign * eps * tangent, replace(conditioning, t=record.draws.t + sign * eps)).u

    with torch.no_grad():
        numeric = (u(1) - u(-1)) / (2 * eps)
    assert relative(dudt, numeric) < 1e-7


def test_gradient_agrees_with_finite_differences_for_a_fixed_target(network):
    network = network.double()
    config = replace(GUIDED, norm_p=0.0)  # the gradient treats the weight as a constant
    batch = draw_batch(config=config, dtype=torch.float64)
    record, output = batch[2], run_loss(network, batch, config)
    column = (record.draws.t - record.draws.r).view(-1, 1, 1, 1)
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
            return (run_loss(network, batch, config).u - target).square().sum() / 16

    eps = 1e-6
    numeric = (moved(eps) - moved(-2 * eps)) / (2 * eps)
    assert float(abs(slope - numeric) / abs(numeric)) < 1e-7


def test_target_is_the_velocity_when_r_equals_t(network):
    batch = draw_batch(config=FLOW_MATCHING)
    output = run_loss(network, batch, FLOW_MATCHING)
    v = batch[2].draws.noise - batch[0]
    torch.testing.assert_close(output.squared_error, (output.u - v).square().flatten(1).sum(1))
    assert torch.equal(output.dudt, torch.zeros_like(v))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_grad_forward_has_only_needed_velocities_and_padding(network, imf_network, name):
    config = OBJECTIVES[name]
    network = imf_network if isinstance(config, ImprovedMeanFlowConfig) else network
    latents, labels, record = draw_batch(num_rows=64, config=config)
    velocity_sizes, training_sizes = [], []

    def plain(z, conditioning, tangent=None, velocity_only=False):
        assert velocity_only
        assert tangent is None
        velocity_sizes.append(len(z))
        return network(z, conditioning, tangent, velocity_only)

    def training(z, conditioning, tangent=None, velocity_only=False):
        training_sizes.append((len(z), 0 if tangent is None else len(tangent)))
        return network(z, conditioning, tangent, velocity_only)

    build_objective(config).loss(training, plain, latents, labels, record, null_label=NULL, global_num_rows=64)
    # A forward is needed for null velocities with a weight and for own velocities that are used if r < t; then padding.
    record, guidance = record.draws, getattr(config, "guidance", GuidanceConfig())
    is_labelled = ~record.label_dropped
    if isinstance(config, ImprovedMeanFlowConfig):
        start, end, has_null, is_off = record.guidance_interval_start, record.guidance_interval_end, True, False
    else:
        start, end, is_off = guidance.guidance_interval_start, guidance.guidance_interval_end, guidance.is_off
        has_null = abs(1 - guidance.omega - guidance.kappa) > 1e-9
    guided = is_labelled & (record.t >= start) & (record.t <= end) & (not is_off)
    needs_own = torch.ones_like(guided) if uses_own_velocity(config) else guided & (guidance.kappa > 0)
    needed = int((guided & has_null).sum() + (needs_own & (record.r < record.t)).sum())
    assert training_sizes == [(64, int((record.r < record.t).sum()))]
    assert velocity_sizes == ([] if needed == 0 else [-(-needed // 8) * 8])


def test_number_of_forwards_does_not_depend_on_the_draws(network, imf_network):
    # Under FSDP, the other workers would wait forever for a worker that makes fewer forwards.
    configs = [*OBJECTIVES.values(), *OTHER_OBJECTIVES.values()]
    for config, separate in itertools.product(configs, (False, True)):
        net = imf_network if isinstance(config, ImprovedMeanFlowConfig) else network
        latents, labels, whole = draw_batch(config=config)
        kinds = {  # one row of each kind: r = t or below, inside the interval or not, dropped or not
            (
                bool(whole.draws.r[row] < whole.draws.t[row]),
                bool(whole.weights.null[row] != 0),
                bool(whole.draws.label_dropped[row]),
            ): row
            for row in range(16)
        }
        counts = set()
        for row in kinds.values():
            calls = []

            def counting(*arguments, net=net, calls=calls, **options):
                calls.append(1)
                return net(*arguments, **options)

            share = latents[row : row + 1], labels[row : row + 1], rows_of(whole, row, row + 1, config)
            with torch.no_grad():
                run_loss(counting, share, config, separate=separate)
            counts.add(len(calls))
        assert len(counts) == 1, config


def test_uneven_shares_of_a_batch_add_up_to_the_whole(setting):
    network, config = setting
    latents, labels, record = draw_batch(config=config)

    def loss(start, stop):
        share = rows_of(record, start, stop, config)
        rows = slice(start, stop)
        output = build_objective(config).loss(
            network, network, latents[rows], labels[rows], share, null_label=NULL, global_num_rows=16
        )
        return output.loss

    whole = gradients(network, loss(0, 16))
    parts = sum(gradients(network, loss(start, stop)) for start, stop in ((0, 3), (3, 4), (4, 16)))
    assert relative(parts, whole) < 1e-6


def test_separate_derivative_is_float32_under_autocast(network):
    config = MeanFlowConfig()  # no guidance: the tangent is exact
    batch = draw_batch(config=config)

    def run(separate, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return run_loss(network, batch, config, separate=separate)

    exact, separate, shared = run(True, False), run(True, True), run(False, True)
    assert 1e-4 < relative(separate.u, exact.u) < 0.02  # the training forward is in bfloat16
    assert relative(separate.dudt, exact.dudt) < 1e-6
    assert 1e-4 < relative(shared.dudt, exact.dudt) < 0.05


def test_outputs_are_float32_under_autocast(setting):
    network, config = setting
    with torch.autocast("cpu", torch.bfloat16):
        output = run_loss(network, draw_batch(config=config), config)
    tensors = [value for value in vars(output).values() if isinstance(value, torch.Tensor)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_training_forward_saves_no_more_for_backward_than_flow_matching(network):
    def saved(config):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run_loss(network, draw_batch(num_rows=32, config=config), config)
        assert output.loss.requires_grad
        return sum(sizes.values())

    assert saved(GUIDED) <= 1.05 * saved(FLOW_MATCHING)


def test_flow_matching_needs_no_forward_for_a_derivative(network):
    latents, labels, record = draw_batch(config=FLOW_MATCHING)
    output = build_objective(FLOW_MATCHING).loss(
        network, None, latents, labels, record,
        null_label=NULL, global_num_rows=16, separate_derivative=True,
    )  # fmt: skip
    assert output.loss.requires_grad


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.9), (0.1, 1.0)])
def test_rows_with_r_equal_to_t_may_have_any_interval(imf_network, start, end):
    network = imf_network.double()
    latents, labels, record = draw_batch(config=IMPROVED, dtype=torch.float64)
    draws = {name: getattr(record.draws, name) for name in ("t", "r", "noise", "label_dropped", "omega")}
    record = make_record(
        IMPROVED,
        **draws,
        guidance_interval_start=torch.full_like(draws["t"], start),
        guidance_interval_end=torch.full_like(draws["t"], end),
    )
    loss = run_loss(network, (latents, labels, record), IMPROVED).loss
    assert loss.item() == pytest.approx(reference_loss(network, latents, labels, record, IMPROVED).item(), rel=1e-12)


def test_batch_that_does_not_match_the_record_is_refused(network):
    latents, labels, record = draw_batch()
    with pytest.raises(ValueError, match="the record is for latents"):
        run_loss(network, (latents[:3], labels, record), GUIDED)
    with pytest.raises(ValueError, match="the record is for labels"):
        run_loss(network, (latents, labels[:3], record), GUIDED)


def test_improved_meanflow_requires_a_velocity_head(imf_network):
    def headless(z, conditioning, tangent=None, velocity_only=False):
        output = imf_network(z, conditioning, tangent, velocity_only)
        return output if velocity_only else replace(output, v=None)

    with pytest.raises(ValueError, match="needs a network with a v head"):
        run_loss(headless, draw_batch(config=IMPROVED), IMPROVED)


def test_means_by_time_keep_their_precision_and_other_bins_under_autocast():
    values, t = torch.tensor([1.0, 1000.125, float("nan")]), torch.tensor([0.05, 1.0, 0.5])
    with torch.autocast("cpu", torch.bfloat16):
        means = means_by_time("error", values, t)
    assert means["error_by_t/0.0"] == (1.0, 1)
    assert means["error_by_t/0.9"] == (1000.125, 1)
    assert means["error_by_t/0.5"].total.isnan()
    assert means["error_by_t/0.4"] == (0.0, 0)
