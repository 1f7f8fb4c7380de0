"""Compiled and checkpointed networks against plain ones."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow_core.draws import draw_step_record
from meanflow_core.loss import meanflow_loss
from meanflow_core.training import compile_blocks
from meanflow_core.transformer import Conditioning
from tests.core.test_loss import NULL, OBJECTIVES, draw_batch, gradients, relative

GUIDED, IMPROVED = OBJECTIVES["omega, kappa, interval"], OBJECTIVES["improved MeanFlow"]
BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-9}
NO_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor wants a C++ compiler, and g++ is not here"
)


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small only wait for a second one
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


@pytest.fixture(params=["dit", "imf_dit"])
def kind(request, network, imf_network):
    """A network and an objective for it."""
    return (network, GUIDED) if request.param == "dit" else (imf_network, IMPROVED)


def run(network, batch, config, separate):
    return meanflow_loss(
        network, network, *batch, config,
        null_label=NULL, global_num_rows=len(batch[1]), separate_derivative=separate,
    )  # fmt: skip


def check_like(ours, plain, batch, config, bound):
    """Loss, du/dt and gradient of both, with the derivative beside the graded pass and in one of its own."""
    for separate in (False, True):
        found, wanted = run(ours, batch, config, separate), run(plain, batch, config, separate)
        assert wanted.dudt.norm() > 1.0
        assert found.loss.item() == pytest.approx(wanted.loss.item(), rel=bound)
        assert relative(found.dudt, wanted.dudt) < bound
        assert relative(gradients(ours, found.loss), gradients(plain, wanted.loss)) < bound


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("aot_eager", torch.float64),  # traced as for inductor, and then run by torch's own kernels
        pytest.param("aot_eager", torch.float32, marks=pytest.mark.soak),
        # A minute's work for the C++ compiler each.
        pytest.param("inductor", torch.float64, marks=[NO_COMPILER, pytest.mark.soak]),
        pytest.param("inductor", torch.float32, marks=[NO_COMPILER, pytest.mark.soak]),
    ],
)
def test_compiled_blocks_compute_what_plain_ones_do(kind, backend, dtype):
    network, config = kind[0].to(dtype), kind[1]
    plain = copy.deepcopy(network)
    compile_blocks(network, backend=backend)
    check_like(network, plain, draw_batch(config=config, dtype=dtype), config, BOUNDS[dtype])
    assert counters["stats"]["unique_graphs"] >= 3
    assert counters["graph_break"] == {}


def test_blocks_are_handed_contiguous_tokens(kind):
    # Inductor's C++ kernels of torch 2.13 give wrong gradients, by per cents, to a block whose input is transposed.
    network, config = kind
    seen = []

    def note(block, arguments):
        seen.extend(tensor.is_contiguous() for tensor in arguments[0] if tensor is not None)

    for module in network.modules():
        if type(module).__name__ in network._repeated_blocks:
            module.register_forward_pre_hook(note)
    run(network, draw_batch(config=config), config, separate=False)
    assert len(seen) >= 6
    assert all(seen)


@NO_COMPILER
def test_inductors_backward_is_that_of_the_plain_network(network):
    config = OBJECTIVES["flow matching"]
    network = network.double()
    plain, batch = copy.deepcopy(network), draw_batch(config=config, dtype=torch.float64)
    compile_blocks(network)
    found, wanted = (run(module, batch, config, separate=False).loss for module in (network, plain))
    assert counters["stats"]["unique_graphs"] == 1
    assert relative(gradients(network, found), gradients(plain, wanted)) < 1e-9


@pytest.mark.soak
def test_whole_network_compiles_to_a_graph_without_breaks(kind):
    network, config = kind[0].double(), kind[1]
    compiled = torch.compile(network, dynamic=False, fullgraph=True, backend="aot_eager")
    batch = draw_batch(config=config, dtype=torch.float64)
    wanted = run(network, batch, config, separate=False)
    found = run(compiled, batch, config, separate=False)
    assert relative(found.dudt, wanted.dudt) < 1e-9
    assert relative(gradients(network, found.loss), gradients(network, wanted.loss)) < 1e-9
    assert counters["stats"]["unique_graphs"] == 2


def test_compiled_derivative_is_that_of_forward_mode_through_the_plain_network(kind):
    # Stock compiled graphs drop the jvp of a custom autograd function without a word (pytorch#192985).
    network, config = kind[0].double(), kind[1]
    plain = copy.deepcopy(network)
    compile_blocks(network, backend="aot_eager")
    latents, labels, record = draw_batch(config=config, dtype=torch.float64)
    told = {
        "omega": record.omega,
        "guidance_interval_start": record.guidance_interval_start,
        "guidance_interval_end": record.guidance_interval_end,
    }

    def u(z, t, r):
        return plain(z, Conditioning(t=t, r=r, labels=labels, **told)).u

    along = record.noise, torch.ones_like(record.t), torch.zeros_like(record.t)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        wanted = torch.func.jvp(u, (latents, record.t, record.r), along)[1]
    found = network(latents, Conditioning(t=record.t, r=record.r, labels=labels, **told), record.noise)
    assert found.u.requires_grad
    assert relative(found.dudt, wanted) < 1e-9


def test_number_of_compilations_is_bounded_over_steps_of_different_draws(kind):
    network, config = kind
    compile_blocks(network, backend="aot_eager")

    def take_steps(steps):
        sizes = set()
        for step in steps:
            record = draw_step_record(config, seed=1, step=step, num_rows=64, latent_shape=(4, 8, 8))
            batch = torch.randn(64, 4, 8, 8), torch.randint(NULL, (64,)), record
            run(network, batch, config, separate=step % 2 == 0).loss.backward()
            sizes.add(len(record.rows_velocity))
        return sizes

    sizes = take_steps(range(20))
    assert 2 <= len(sizes) <= 4
    # Blocks of a kind share their graphs. One for each size of the velocities' batch; the graded pass with a tangent
    # and without, and the derivative's own; improved MeanFlow's v head has no tangent in that one either.
    of_sizes = len(sizes)
    assert counters["stats"]["unique_graphs"] == of_sizes + (3 if config is GUIDED else 4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert take_steps(range(5)) <= sizes


def test_every_size_that_a_long_run_meets_is_compiled(network):
    # Twelve sizes, where dynamo stops at eight: the fixture makes reaching its limit an error.
    compile_blocks(network, backend="aot_eager")
    z = torch.randn(12, 4, 8, 8)
    with torch.no_grad():
        for rows in range(1, 13):
            times = torch.full((rows,), 0.5)
            network(z[:rows], Conditioning(t=times, r=times, labels=torch.zeros(rows, dtype=torch.long)))
    assert counters["stats"]["unique_graphs"] == 12


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[NO_COMPILER, pytest.mark.soak])])
def test_compiled_blocks_in_bfloat16_are_as_near_as_plain_ones(kind, backend):
    network, config = kind
    plain, batch = copy.deepcopy(network), draw_batch(config=config)
    compile_blocks(network, backend=backend)
    exact = run(plain, batch, config, separate=False)

    def errors(module, separate):
        with torch.autocast("cpu", torch.bfloat16):
            output = run(module, batch, config, separate)
        return relative(output.dudt, exact.dudt), relative(gradients(module, output.loss), gradient)

    gradient = gradients(plain, exact.loss)
    for separate in (False, True):
        for ours, theirs in zip(errors(network, separate), errors(plain, separate), strict=True):
            assert 1e-4 < theirs < 0.05
            assert 1e-4 < ours < 1.5 * theirs


@pytest.mark.parametrize("is_compiled", [False, True], ids=["plain", "compiled"])
def test_checkpointed_blocks_have_the_same_gradient(kind, is_compiled):
    network, config = kind[0].double(), kind[1]
    plain = copy.deepcopy(network)
    network.enable_gradient_checkpointing()
    if is_compiled:
        compile_blocks(network, backend="aot_eager")
    check_like(network, plain, draw_batch(config=config, dtype=torch.float64), config, 1e-12)


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_checkpointed_blocks_have_the_same_gradient_in_bfloat16(kind, separate):
    # The pass that runs again may not find other casts of the weights than the first one did.
    network, config = kind
    plain, batch = copy.deepcopy(network), draw_batch(config=config)
    network.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (run(module, batch, config, separate).loss for module in (network, plain))
    assert relative(gradients(network, found), gradients(plain, wanted)) < 1e-6


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_checkpointed_blocks_keep_less_for_backward(kind, separate):
    network, config = kind
    batch = draw_batch(num_rows=32, config=config)

    def kept():
        """Bytes of what autograd saves, and of what goes into blocks, which checkpointing keeps by itself."""
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        def note(block, arguments):
            if torch.is_grad_enabled():
                for tensor in torch.utils._pytree.tree_leaves(arguments):
                    if tensor is not None:
                        pack(tensor)

        blocks = [module for module in network.modules() if type(module).__name__ in network._repeated_blocks]
        handles = [block.register_forward_pre_hook(note) for block in blocks]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = run(network, batch, config, separate).loss
        for handle in handles:
            handle.remove()
        assert loss.requires_grad
        return sum(sizes.values())

    without = kept()
    network.enable_gradient_checkpointing()
    assert kept() < 0.4 * without
