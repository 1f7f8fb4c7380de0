"""A DiT as a plain module, differentiated by torch in forward mode, computes the same as the DiT on pairs."""

import copy
import shutil
from dataclasses import make_dataclass, replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from meanflow_core.config import LossConfig, NetworkConfig
from meanflow_core.networks.building import build_network, require_same_architecture
from meanflow_core.networks.forward_mode import ForwardModeNetwork
from meanflow_core.networks.interface import Conditioning
from meanflow_core.objectives.interface import build_objective
from meanflow_core.presets.demo import debug
from meanflow_core.sharding import shard_network
from meanflow_core.training import build_train_state, compile_blocks, train_step
from tests.support.objectives import (
    GUIDED,
    NULL,
    OBJECTIVES,
    conditioning_of,
    draw_batch,
    gradients,
    relative,
    rows_of,
    run_loss,
)
from tests.support.plain_networks import in_forward_mode
from tests.support.processes import run_group
from tests.support.training_steps import IDENTITY, make_batch, parameters

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"sample_size": 8, "in_channels": 4, "num_classes": NULL}
NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


def config_of(name: str, **fields: object) -> NetworkConfig:
    """A configuration of a class of tests.support.plain_networks, with these fields."""
    columns = [(field, object, value) for field, value in fields.items()]
    reference = f"tests.support.plain_networks:{name}"
    return make_dataclass(
        "Config", columns, bases=(NetworkConfig,), namespace={"network": reference}, frozen=True, kw_only=True
    )()


def assert_same_loss(ours, theirs, config: LossConfig, bound: float, dtype=torch.float32):
    batch = draw_batch(config=config, dtype=dtype)
    for separate in (False, True):
        found, expected = (run_loss(network, batch, config, separate=separate) for network in (ours, theirs))
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=bound)
        assert relative(gradients(ours, found.loss), gradients(theirs, expected.loss)) < bound
        if config.times.fraction_r_below_t > 0:
            assert expected.dudt.norm() > 1.0
            assert relative(found.dudt, expected.dudt) < bound


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if "improved" not in name])
def test_loss_gradient_and_du_dt_are_those_of_the_pair_written_network(network, objective):
    assert_same_loss(in_forward_mode(network), network, OBJECTIVES[objective], 1e-5)


@torch.no_grad()
def test_one_call_without_a_graph_gives_u_and_du_dt(network):
    plain, batch = in_forward_mode(network), draw_batch()
    latents, labels, record = batch
    calls = []
    plain.module.dit.register_forward_pre_hook(lambda *_: calls.append(1))
    found = plain(latents, conditioning_of(record, labels), record.draws.noise)
    assert len(calls) == 1
    assert relative(found.u, network(latents, conditioning_of(record, labels)).u) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "dtype", "step", "bound"),
    [
        ("Attention", torch.float64, 1e-5, 1e-7),
        # Attention and then group normalization. diffusers embeds times in float32.
        ("UNet", torch.float32, 1e-2, 1e-2),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_du_dt_of_attention_is_a_difference_quotient(name, dtype, step, bound, training):
    # In evaluation mode, torch's layers have a fused path without forward-mode AD.
    network = build_network(config_of(name), **SIZES).to(dtype).train(training)
    latents, labels, record = draw_batch(dtype=dtype)
    conditioning = conditioning_of(record, labels)
    found = network(latents, conditioning, record.draws.noise).dudt
    later, earlier = (
        network(latents + sign * record.draws.noise, replace(conditioning, t=conditioning.t + sign)).u
        for sign in (step, -step)
    )
    assert relative(found, (later - earlier) / (2 * step)) < bound


def test_du_dt_is_accurate_under_bfloat16_autocast(network):
    plain, batch = in_forward_mode(network), draw_batch()
    exact = run_loss(network, batch, GUIDED)
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = (run_loss(module, batch, GUIDED) for module in (plain, network))
        assert plain(batch[0], conditioning_of(batch[2], batch[1])).u.dtype == torch.bfloat16
    # The direction of du/dt, the guided velocity, comes from a bfloat16 forward in both.
    conditioning = batch[2].draws.conditioning(batch[1], NULL)
    below = batch[2].plan.below
    z = (1 - batch[2].draws.t.view(-1, 1, 1, 1)) * batch[0] + batch[2].draws.t.view(-1, 1, 1, 1) * batch[2].draws.noise
    with torch.no_grad():
        same_direction = network(z[below], conditioning.rows(below), found.tangent).dudt
    assert relative(found.dudt[below], same_direction) < 1e-5
    assert relative(theirs.dudt, exact.dudt) > 1e-3


# Two processes

EDGES = {"one": (0, 16), 0: (0, 5), 1: (5, 16)}


def gradient_of_rows(training_network, network, rows) -> torch.Tensor:
    """The gradient of these rows' share of the loss of 16 samples, times the number of processes."""
    latents, labels, record = draw_batch(config=GUIDED, dtype=torch.float64)
    start, stop = EDGES[rows]
    share = rows_of(record, start, stop, GUIDED)
    loss = (
        build_objective(GUIDED)
        .loss(
            training_network,
            network,
            latents[start:stop],
            labels[start:stop],
            share,
            null_label=NULL,
            global_num_rows=16,
        )
        .loss
    )
    (loss * (1 if rows == "one" else 2)).backward()
    return torch.cat([full(parameter.grad).flatten() for parameter in network.parameters()])


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients_of_two_processes(rank, plain, compiled):
    networks = {kind: copy.deepcopy(plain) for kind in ("ddp", "fsdp2")}
    if compiled:
        for network in networks.values():
            compile_blocks(network, backend="aot_eager")
    shard_network(networks["fsdp2"])
    wrapper = DistributedDataParallel(networks["ddp"], forward_sync_buffers=False, gradient_as_bucket_view=True)
    found = {
        "ddp": gradient_of_rows(wrapper, networks["ddp"], rank),
        "fsdp2": gradient_of_rows(networks["fsdp2"], networks["fsdp2"], rank),
    }
    sharded = [isinstance(parameter, DTensor) for parameter in networks["fsdp2"].parameters()]
    groups = sum(isinstance(module, FSDPModule) for module in networks["fsdp2"].modules())
    return {**found, "sharded": sharded, "groups": groups}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_two_processes_compute_the_gradient_of_one(network, compiled):
    plain = in_forward_mode(network.double())
    expected = gradient_of_rows(plain, plain, "one")
    plain.zero_grad(set_to_none=True)
    found = run_group(gradients_of_two_processes, (plain, compiled), 2, timeout_seconds=300)
    for kind in ("ddp", "fsdp2"):
        assert relative(found[kind], expected) < 1e-12
    assert all(found["sharded"])
    assert found["groups"] == 3  # two blocks and the rest


# Compilation and checkpointing


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[NO_COMPILER, pytest.mark.soak])])
def test_compiled_module_computes_the_same_and_keeps_its_names(network, backend):
    torch._dynamo.reset()
    counters.clear()
    plain = in_forward_mode(network)
    names = list(plain.state_dict())
    compile_blocks(plain, backend=backend)
    assert list(plain.state_dict()) == names
    assert_same_loss(plain, network, GUIDED, 1e-4)
    assert counters["stats"]["unique_graphs"] >= 2
    assert counters["graph_break"] == {}
    torch._dynamo.reset()


def test_training_state_of_a_compiled_module_trains():
    config = replace(debug(), network=config_of("Attention"), compile=True)
    eager = replace(config, compile=False)
    trained = []
    for each in (config, eager):
        state = build_train_state(each, **SIZES, device=torch.device("cpu"))
        if each.compile:
            state.network.module.compile(backend="aot_eager")  # instead of a minute of C++ compilation
        for step in range(2):
            train_step(state, state.network, [make_batch(each, step)], IDENTITY, each)
        trained.append(parameters(state.ema_network))
    assert relative(*trained) < 1e-5


def test_activation_checkpointing_is_left_to_the_module(network):
    config = replace(debug(), network=config_of("Attention"), activation_checkpointing=True)
    with pytest.raises(ValueError, match="call torch.utils.checkpoint.checkpoint.* in the forward of tests.support"):
        build_train_state(config, **SIZES, device=torch.device("cpu"))
    network = network.double()
    assert_same_loss(in_forward_mode(network, checkpointing=True), network, GUIDED, 1e-12, torch.float64)


# Rules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WithDropout", "WithDropout must treat each sample alone.* but layer is Dropout"),
        ("WithBatchNorm", "but layer is BatchNorm2d; use layer or group normalisation"),
        (
            "WithoutSizes",
            "WithoutSizes must take sample_size, in_channels, num_classes as arguments, but: ",
        ),
        (
            "not_a_class",
            "a network must be a subclass of torch.nn.Module, but 'tests.support.plain_networks:not_a_class'",
        ),
        ("Absent", "cannot find 'tests.support.plain_networks:Absent'.* a reference is module:name"),
    ],
)
def test_module_that_breaks_the_rules_is_not_built(name, message):
    with pytest.raises(ValueError, match=message):
        build_network(config_of(name), **SIZES)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OtherShape", r"OtherShape must return the shape of z \(16, 4, 8, 8\), but got \(16, 4, 4, 8\)"),
        ("WithCustomFunction", "without forward-mode AD.*You must implement the jvp function"),
        ("WithOldCustomFunction", "without forward-mode AD.*must override the setup_context"),
        ("WithUnsupportedOperation", "without forward-mode AD.*_cdist_forward.*replace the operation"),
        ("WithOutArgument", "without forward-mode AD.*mul_out"),
    ],
)
def test_module_that_breaks_a_rule_of_the_forward_says_which(name, message, device):
    with torch.device(device):
        network = build_network(config_of(name), **SIZES)
        z, times, labels = torch.rand(16, 4, 8, 8), torch.rand(16), torch.zeros(16, dtype=torch.int64)
        conditioning = Conditioning(t=times, r=times / 2, labels=labels)
        with pytest.raises(ValueError, match=message):
            network(z, conditioning, torch.ones_like(z))


def test_arguments_are_the_same_before_and_after_saving(tmp_path):
    network = build_network(config_of("WithWidths", widths=(3, 4)), **SIZES)
    network.save_pretrained(tmp_path)
    loaded = ForwardModeNetwork.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert loaded.module.widths == network.module.widths == [3, 4]
    require_same_architecture(loaded, network)
    other = build_network(config_of("WithWidths", widths=(3, 5)), **SIZES)
    with pytest.raises(ValueError, match=r"arguments is .*\[3, 4\].*, expected .*\[3, 5\]"):
        require_same_architecture(loaded, other)
