"""Compiled and activation-checkpointed networks compute the same as plain ones."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from meanflow_core.networks.interface import Conditioning
from meanflow_core.training import compile_blocks
from tests.support.objectives import (
    FLOW_MATCHING,
    GUIDED,
    IMPROVED,
    NULL,
    draw_batch,
    draw_record,
    gradients,
    relative,
    run_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")
BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-9}
NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def _reset_compiler():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(params=["dit", "imf_dit"])
def setting(request, network, imf_network):
    """A network and an objective for it."""
    return (network, GUIDED) if request.param == "dit" else (imf_network, IMPROVED)


def assert_same_loss(ours, plain, batch, config, bound):
    """Compares loss, du/dt and gradient, with du/dt from the training forward and from a separate one."""
    for separate in (False, True):
        found, expected = (run_loss(module, batch, config, separate=separate) for module in (ours, plain))
        assert expected.dudt.norm() > 1.0
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=bound)
        assert relative(found.dudt, expected.dudt) < bound
        assert relative(gradients(ours, found.loss), gradients(plain, expected.loss)) < bound


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("aot_eager", torch.float64),  # traced as for inductor, but executed by PyTorch's own kernels
        pytest.param("aot_eager", torch.float32, marks=pytest.mark.soak),
        # A minute of C++ compilation each.
        pytest.param("inductor", torch.float64, marks=[NO_COMPILER, pytest.mark.soak]),
        pytest.param("inductor", torch.float32, marks=[NO_COMPILER, pytest.mark.soak]),
    ],
)
def test_compiled_blocks_compute_the_same_as_plain_ones(setting, backend, dtype):
    network, config = setting[0].to(dtype), setting[1]
    plain = copy.deepcopy(network)
    compile_blocks(network, backend=backend)
    assert_same_loss(network, plain, draw_batch(config=config, dtype=dtype), config, BOUNDS[dtype])
    assert counters["stats"]["unique_graphs"] >= 3
    assert counters["graph_break"] == {}


def test_inputs_of_blocks_are_contiguous(setting):
    # In torch 2.13, inductor's C++ kernels compute gradients with errors of several percent if a block's input is
    # transposed.
    network, config = setting
    seen = []

    def record(block, arguments):
        seen.extend(tensor.is_contiguous() for tensor in arguments[0] if tensor is not None)

    for module in network.modules():
        if type(module).__name__ in network._repeated_blocks:
            module.register_forward_pre_hook(record)
    run_loss(network, draw_batch(config=config), config, separate=False)
    assert len(seen) >= 6
    assert all(seen)


@pytest.mark.soak
@NO_COMPILER
def test_inductor_computes_the_same_gradient_as_the_plain_network(network):
    config = FLOW_MATCHING
    network = network.double()
    plain, batch = copy.deepcopy(network), draw_batch(config=config, dtype=torch.float64)
    compile_blocks(network)
    found, expected = (run_loss(module, batch, config, separate=False).loss for module in (network, plain))
    assert counters["stats"]["unique_graphs"] == 1
    assert relative(gradients(network, found), gradients(plain, expected)) < 1e-9


@pytest.mark.soak
def test_whole_network_compiles_without_graph_breaks(setting):
    network, config = setting[0].double(), setting[1]
    compiled = torch.compile(network, dynamic=False, fullgraph=True, backend="aot_eager")
    batch = draw_batch(config=config, dtype=torch.float64)
    expected = run_loss(network, batch, config, separate=False)
    found = run_loss(compiled, batch, config, separate=False)
    assert relative(found.dudt, expected.dudt) < 1e-9
    assert relative(gradients(network, found.loss), gradients(network, expected.loss)) < 1e-9
    assert counters["stats"]["unique_graphs"] == 2


def test_number_of_compilations_is_bounded_over_many_steps(setting):
    network, config = setting
    compile_blocks(network, backend="eager")  # traces only

    def take_steps(steps):
        sizes = set()
        for step in steps:
            record = draw_record(config, seed=1, step=step, num_rows=64, latent_shape=(4, 8, 8))
            batch = torch.randn(64, 4, 8, 8), torch.randint(NULL, (64,)), record
            run_loss(network, batch, config, separate=step % 2 == 0).loss.backward()
            sizes.add(len(record.plan.velocity))
        return sizes

    sizes = take_steps(range(12))
    assert 2 <= len(sizes) <= 4
    # Blocks of a class share their graphs. The no-grad velocity forward needs one graph per batch size, and the training
    # forward two, with and without a tangent. The separate derivative needs one for MeanFlow, but two for improved
    # MeanFlow, whose v head has no tangent.
    assert counters["stats"]["unique_graphs"] == len(sizes) + (3 if config is GUIDED else 4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert take_steps(range(5)) <= sizes


def test_every_batch_size_of_a_long_run_is_compiled(network):
    # Twelve sizes exceed dynamo's default limit of eight recompilations; the fixture makes reaching a limit an error.
    compile_blocks(network, backend="eager")
    z = torch.randn(12, 4, 8, 8)
    with torch.no_grad():
        for rows in range(1, 13):
            times = torch.full((rows,), 0.5)
            network(z[:rows], Conditioning(t=times, r=times, labels=torch.zeros(rows, dtype=torch.long)))
    assert counters["stats"]["unique_graphs"] == 12


@pytest.mark.soak
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=NO_COMPILER)])
def test_compiled_blocks_in_bfloat16_are_as_accurate_as_plain_ones(setting, backend):
    network, config = setting
    plain, batch = copy.deepcopy(network), draw_batch(config=config)
    compile_blocks(network, backend=backend)
    exact = run_loss(plain, batch, config, separate=False)

    def errors(module, separate):
        with torch.autocast("cpu", torch.bfloat16):
            output = run_loss(module, batch, config, separate=separate)
        return relative(output.dudt, exact.dudt), relative(gradients(module, output.loss), exact_gradient)

    exact_gradient = gradients(plain, exact.loss)
    for separate in (False, True):
        for ours, theirs in zip(errors(network, separate), errors(plain, separate), strict=True):
            assert 1e-4 < theirs < 0.05
            assert 1e-4 < ours < 1.5 * theirs


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["plain", "compiled"])
def test_checkpointed_blocks_have_the_same_gradient(setting, is_compiled):
    network, config = setting[0].double(), setting[1]
    plain = copy.deepcopy(network)
    network.enable_gradient_checkpointing()
    if is_compiled:
        compile_blocks(network, backend="aot_eager")
    assert_same_loss(network, plain, draw_batch(config=config, dtype=torch.float64), config, 1e-12)


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_checkpointed_blocks_have_the_same_gradient_in_bfloat16(setting, separate):
    # The recomputed forward must use the same casts of the weights as the first one.
    network, config = setting
    plain, batch = copy.deepcopy(network), draw_batch(config=config)
    network.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (run_loss(module, batch, config, separate=separate).loss for module in (network, plain))
    assert relative(gradients(network, found), gradients(plain, expected)) < 1e-6


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_checkpointed_blocks_save_less_for_backward(setting, separate):
    network, config = setting
    batch = draw_batch(num_rows=32, config=config)

    def saved_bytes():
        """Bytes saved for backward, including block inputs, which the hooks do not see under checkpointing."""
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        def pack_inputs(block, arguments):
            if torch.is_grad_enabled():
                for tensor in torch.utils._pytree.tree_leaves(arguments):
                    if tensor is not None:
                        pack(tensor)

        blocks = [module for module in network.modules() if type(module).__name__ in network._repeated_blocks]
        handles = [block.register_forward_pre_hook(pack_inputs) for block in blocks]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = run_loss(network, batch, config, separate=separate).loss
        for handle in handles:
            handle.remove()
        assert loss.requires_grad
        return sum(sizes.values())

    without = saved_bytes()
    network.enable_gradient_checkpointing()
    assert saved_bytes() < 0.4 * without
