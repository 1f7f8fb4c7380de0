"""Two processes on this machine, with DDP and with FSDP2, against one process with the whole batch."""

import copy
import functools
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from meanflow_core.config import OptimizerConfig
from meanflow_core.draws import StepRecord
from meanflow_core.imf_transformer import ImprovedMeanFlowDiT
from meanflow_core.latents import LatentNormalization
from meanflow_core.loss import meanflow_loss
from meanflow_core.presets import debug, debug_imf
from meanflow_core.sharding import shard_network
from meanflow_core.training import Batch, TrainState, compile_blocks, train_step, update_emas
from meanflow_core.transformer import Conditioning, MeanFlowDiT
from tests.core.test_loss import NULL, OBJECTIVES, draw_batch, relative
from tests.support.processes import join_group, run_processes

NUM_ROWS = 16
CONFIGS = {
    name: OBJECTIVES[name] for name in ("flow matching", "omega, kappa, interval", "own velocity", "improved MeanFlow")
}
GUIDED, IMPROVED = CONFIGS["omega, kappa, interval"], CONFIGS["improved MeanFlow"]
ARRANGEMENTS = (
    "equal shares",
    "5 and 11 rows",
    "r < t in the second process alone",
    "first process outside the guidance interval",
    "first process without labels",
)
# By precision: what is arranged, and the bound on errors.
CHECKS = {torch.float32: (ARRANGEMENTS[1:3], 1e-6), torch.float64: (ARRANGEMENTS, 1e-12)}
PASSES = {"shared": False, "separate": True}
CASES = [case for case in itertools.product(CONFIGS, PASSES, CHECKS) if case[:2] != ("flow matching", "separate")]
GRACE_SECONDS = 60  # a collective that the other process never joins fails after this


def small_network(config, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 4, "num_classes": NULL, "hidden_size": 48, "num_heads": 3}
    if config.objective == "improved_meanflow":
        network = ImprovedMeanFlowDiT(**sizes, depth=3, aux_head_depth=1)
    else:
        network = MeanFlowDiT(**sizes, depth=2)
    with torch.no_grad():
        for parameter in network.parameters():  # no zero-initialised layer may hide an error
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.to(dtype)


def arranged_batch(config, arrangement, dtype=torch.float32):
    """A batch of 16 rows, its record, and each process's share (first row, last row + 1, latents, labels, record)."""
    latents, labels, record = draw_batch(config=config, dtype=dtype)
    names = ("t", "r", "noise", "label_dropped", "omega", "guidance_interval_start", "guidance_interval_end")
    draws = {name: getattr(record, name) for name in names if getattr(record, name) is not None}
    first, below = torch.arange(NUM_ROWS) < NUM_ROWS // 2, draws["r"] < draws["t"]
    if arrangement == "r < t in the second process alone":
        order = torch.argsort(below.to(torch.uint8), stable=True)
        draws = {name: value[order] for name, value in draws.items()}
    if arrangement == "first process outside the guidance interval":
        t = torch.where(first, 0.9 + 0.1 * draws["t"], draws["t"])
        draws |= {"t": t, "r": torch.where(first & ~below, t, draws["r"])}
        if "guidance_interval_end" in draws:
            draws["guidance_interval_end"] = torch.where(first, 0.8, draws["guidance_interval_end"])
    if arrangement == "first process without labels":
        draws["label_dropped"] = draws["label_dropped"] | first
    record = StepRecord.from_draws(**draws, config=config)
    edge = 5 if arrangement == "5 and 11 rows" else NUM_ROWS // 2
    shares = [
        (latents[start:stop], labels[start:stop], record.rows(start, stop, config))
        for start, stop in ((0, edge), (edge, NUM_ROWS))
    ]
    return (latents, labels, record), shares


def loss_of(graded_network, network, batch, config, separate):
    return meanflow_loss(
        graded_network, network, *batch, config,
        null_label=NULL, global_num_rows=NUM_ROWS, separate_derivative=separate,
    ).loss  # fmt: skip


def gradient(module):
    """The whole gradient; a parameter without one is an error."""
    without = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert not without, without
    gradients = [parameter.grad for parameter in module.parameters()]
    return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten() for g in gradients])


def share_gradient(graded_network, network, batch, config, separate):
    """This process's part of the work on one batch, and the gradient that comes of both."""
    network.zero_grad(set_to_none=True)
    (loss_of(graded_network, network, batch, config, separate) * distributed.get_world_size()).backward()
    return gradient(network)


@functools.cache
def whole_gradient(objective, passes, dtype, arrangement):
    config = CONFIGS[objective]
    network = small_network(config, dtype)
    loss_of(network, network, arranged_batch(config, arrangement, dtype)[0], config, PASSES[passes]).backward()
    return gradient(network)


def take_steps(state, share, config, gradient_scale):
    """Two optimiser steps; the norms of their gradients."""
    generator = torch.Generator().manual_seed(1)
    moments = torch.randn(NUM_ROWS, 8, 8, 8, generator=generator, dtype=torch.float64).abs()
    labels = torch.randint(NULL, (NUM_ROWS,), generator=generator)
    start, stop = share
    record = draw_batch(config=config.loss, dtype=torch.float64)[2].rows(start, stop, config.loss)
    batch = Batch(moments=moments[start:stop], labels=labels[start:stop], record=record)
    normalization = LatentNormalization(mean=(0.0,) * 4, std=(1.0,) * 4)
    return [
        train_step(state, state.network, [batch], normalization, config, gradient_scale=gradient_scale).gradient_norm
        for _ in range(2)
    ]


def fresh_state(config, prepare):
    network = small_network(config.loss, torch.float64)
    ema_networks = {decay: copy.deepcopy(network).eval().requires_grad_(False) for decay in config.ema_decays}
    for module in (network, *ema_networks.values()):
        prepare(module)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, foreach=True)
    return TrainState(network=network, ema_networks=ema_networks, optimizer=optimizer, step=0)


def parameters(module):
    found = [parameter.detach() for parameter in module.parameters()]
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).flatten() for p in found])


def wrapped(kind, network):
    """The network whose backward reduces gradients, and the one that is asked without a graph."""
    if kind == "ddp":
        return DistributedDataParallel(network, forward_sync_buffers=False, gradient_as_bucket_view=True), network
    shard_network(network, init_device_mesh("cpu", (2,)))
    return network, network


def gradients_of_all_cases(kind, rank):
    """{case: gradient}, every network wrapped once and used for all of its cases, as in training."""
    pairs = {}
    for objective, dtype in itertools.product(CONFIGS, CHECKS):
        key = CONFIGS[objective].objective, dtype
        if key not in pairs:
            pairs[key] = wrapped(kind, small_network(CONFIGS[objective], dtype))
    gradients = {}
    for objective, passes, dtype in CASES:
        config = CONFIGS[objective]
        for arrangement in CHECKS[dtype][0]:
            batch = arranged_batch(config, arrangement, dtype)[1][rank]
            case = objective, passes, dtype, arrangement
            gradients[case] = share_gradient(*pairs[config.objective, dtype], batch, config, PASSES[passes])
    return gradients


def gradient_in_bfloat16(kind, rank, config, *, checkpointing=False, **options):
    network = small_network(config)
    networks = (network, network)
    if checkpointing:
        network.enable_gradient_checkpointing()
    if options:
        shard_network(network, init_device_mesh("cpu", (2,)), **options)
    elif kind is not None:
        networks = wrapped(kind, network)
    whole, shares = arranged_batch(config, "5 and 11 rows")
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(*networks, whole if kind is None else shares[rank], config, separate=False)
    (loss * (1 if kind is None else 2)).backward()
    return gradient(network)


def run_ddp(rank):
    results = {"cases": gradients_of_all_cases("ddp", rank)}
    for name, config in {"guided": GUIDED, "improved": IMPROVED}.items():
        results[f"bfloat16 {name}"] = gradient_in_bfloat16("ddp", rank, config)
        graded_network, network = wrapped("ddp", small_network(config))
        batch = arranged_batch(config, "equal shares")[1][rank]
        results[f"wrapper {name}"] = share_gradient(graded_network, network, batch, config, separate=False)
        results[f"bare {name}"] = share_gradient(network, network, batch, config, separate=False)
    return results


def run_fsdp2(rank):
    results = {"cases": gradients_of_all_cases("fsdp2", rank)}
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for name, config in {"guided": GUIDED, "improved": IMPROVED}.items():
        results[f"bfloat16 {name}"] = gradient_in_bfloat16("fsdp2", rank, config)
        results[f"bfloat16 checkpointed {name}"] = gradient_in_bfloat16("fsdp2", rank, config, checkpointing=True)
        results[f"bfloat16 parameters {name}"] = gradient_in_bfloat16("fsdp2", rank, config, mixed_precision=policy)

        batch = arranged_batch(config, "r < t in the second process alone", torch.float64)[1][rank]
        network = small_network(config, torch.float64)
        network.enable_gradient_checkpointing()
        if name == "guided":  # once: most of this run's seconds
            compile_blocks(network, backend="aot_eager")
        shard_network(network, mesh)
        for passes, separate in PASSES.items():
            results[f"checkpointed {name} {passes}"] = share_gradient(network, network, batch, config, separate)
        results[f"graphs {name}"] = counters["stats"]["unique_graphs"]

        network = small_network(config, torch.float64)
        shard_network(network, mesh)
        results[f"jvp {name}"] = derivatives(network, config)
        results[f"sharded {name}"] = [isinstance(parameter, DTensor) for parameter in network.parameters()]
        results[f"groups {name}"] = sum(isinstance(module, FSDPModule) for module in network.modules())
        results[f"numbers of a process {name}"] = sum(p.to_local().numel() for p in network.parameters())

    for name, config in step_configs().items():
        state = fresh_state(config, functools.partial(shard_network, mesh=mesh))
        norms = take_steps(state, ((0, 5), (5, NUM_ROWS))[rank], config, gradient_scale=2.0)
        results[f"norms {name}"] = norms
        derivatives(state.ema_network, config.loss)  # an average may sample, and be updated again
        update_emas(state)
        results[f"trained {name}"] = [parameters(m) for m in (state.network, *state.ema_networks.values())]
    return results


def step_configs():
    clipped = OptimizerConfig(learning_rate=1e-3, max_gradient_norm=0.1)
    common = {"ema_decays": (0.9, 0.5), "optimizer": clipped, "global_batch_size": NUM_ROWS}
    return {
        "guided": replace(debug(), loss=GUIDED, **common),
        "improved": replace(debug_imf(), loss=IMPROVED, **common),
    }


@torch.no_grad()
def derivatives(network, config):
    """du/dt by the network, and by torch's forward-mode AD through every hook of it."""
    (latents, labels, record), _ = arranged_batch(config, "equal shares", torch.float64)
    told = {
        "omega": record.omega,
        "guidance_interval_start": record.guidance_interval_start,
        "guidance_interval_end": record.guidance_interval_end,
    }

    def u(z, t, r):
        return network(z, Conditioning(t=t, r=r, labels=labels, **told)).u

    ones, zeros = torch.ones_like(record.t), torch.zeros_like(record.t)
    ours = network(latents, Conditioning(t=record.t, r=record.r, labels=labels, **told), record.noise).dudt
    with sdpa_kernel(SDPBackend.MATH):
        return ours, torch.func.jvp(u, (latents, record.t, record.r), (record.noise, ones, zeros))[1]


def work(rank, kind, folder):
    join_group(rank, 2, f"{folder}/meeting", GRACE_SECONDS)
    results = {"ddp": run_ddp, "fsdp2": run_fsdp2}[kind](rank)
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    distributed.destroy_process_group()


def run_two_processes(kind, folder):
    """What the first process saved."""
    run_processes(work, (kind, str(folder)), 2, 5 * GRACE_SECONDS)
    return torch.load(folder / "results.pt")


@pytest.fixture(autouse=True)
def _one_thread():
    # As the two processes; and networks this small only wait for a second one.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return run_two_processes("ddp", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    return run_two_processes("fsdp2", tmp_path_factory.mktemp("fsdp2"))


def test_arrangements_are_what_their_names_say():
    for name, config in CONFIGS.items():
        shares = {arrangement: [s[2] for s in arranged_batch(config, arrangement)[1]] for arrangement in ARRANGEMENTS}
        assert [len(share.t) for share in shares["5 and 11 rows"]] == [5, 11]
        for share in shares["first process outside the guidance interval"], shares["first process without labels"]:
            assert len(share[0].rows_null) == 0
            assert name == "flow matching" or len(share[1].rows_null) > 0
        assert shares["first process without labels"][0].label_dropped.all()
        counts = [len(share.rows_below) for share in shares["r < t in the second process alone"]]
        assert counts == ([0, 0] if name == "flow matching" else [0, 8])


def errors_beyond_bound(results, objective, passes, dtype):
    arrangements, bound = CHECKS[dtype]
    cases = {arrangement: (objective, passes, dtype, arrangement) for arrangement in arrangements}
    errors = {name: relative(results["cases"][case], whole_gradient(*case)) for name, case in cases.items()}
    return {name: error for name, error in errors.items() if not error < bound}


@pytest.mark.parametrize(("objective", "passes", "dtype"), CASES)
def test_two_processes_with_ddp_have_the_gradient_of_one(ddp, objective, passes, dtype):
    assert errors_beyond_bound(ddp, objective, passes, dtype) == {}


@pytest.mark.parametrize(("objective", "passes", "dtype"), CASES)
def test_two_processes_with_fsdp2_have_the_gradient_of_one(fsdp2, objective, passes, dtype):
    assert errors_beyond_bound(fsdp2, objective, passes, dtype) == {}


@pytest.mark.parametrize(
    ("name", "objective"), [("guided", "omega, kappa, interval"), ("improved", "improved MeanFlow")]
)
def test_grading_the_module_instead_of_its_ddp_wrapper_is_wrong(ddp, name, objective):
    whole = whole_gradient(objective, "shared", torch.float32, "equal shares")
    assert relative(ddp[f"wrapper {name}"], whole) < 1e-6
    assert relative(ddp[f"bare {name}"], whole) > 0.1


@pytest.mark.parametrize(("name", "config"), [("guided", GUIDED), ("improved", IMPROVED)])
def test_two_processes_in_bfloat16_are_as_near_as_one(ddp, fsdp2, name, config):
    exact = whole_gradient(
        next(key for key, value in CONFIGS.items() if value is config), "shared", torch.float32, "5 and 11 rows"
    )
    one = relative(gradient_in_bfloat16(None, 0, config), exact)
    assert 1e-3 < one < 0.01
    ways = "bfloat16", "bfloat16 checkpointed", "bfloat16 parameters"
    for found in ddp[f"bfloat16 {name}"], *(fsdp2[f"{way} {name}"] for way in ways):
        assert found.dtype == torch.float32
        assert 1e-3 < relative(found, exact) < 2 * one


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize(
    ("name", "objective"), [("guided", "omega, kappa, interval"), ("improved", "improved MeanFlow")]
)
def test_sharded_network_may_be_checkpointed_and_the_guided_one_compiled(fsdp2, name, objective, passes):
    whole = whole_gradient(objective, passes, torch.float64, "r < t in the second process alone")
    assert fsdp2["graphs guided"] >= 3
    assert relative(fsdp2[f"checkpointed {name} {passes}"], whole) < 1e-12


@pytest.mark.parametrize(("name", "config"), [("guided", GUIDED), ("improved", IMPROVED)])
def test_sharded_network_gives_its_derivative_and_passes_forward_mode(fsdp2, name, config):
    ours, _ = derivatives(small_network(config, torch.float64), config)
    for found in fsdp2[f"jvp {name}"]:
        assert relative(found, ours) < 1e-12


@pytest.mark.parametrize(("name", "num_blocks"), [("guided", 2), ("improved", 4)])
def test_every_block_is_gathered_by_itself(fsdp2, name, num_blocks):
    assert fsdp2[f"groups {name}"] == num_blocks + 1  # and the root, with the rest


@pytest.mark.parametrize(("name", "config"), [("guided", GUIDED), ("improved", IMPROVED)])
def test_every_parameter_is_sharded_again_after_a_call_without_backward(fsdp2, name, config):
    whole = sum(parameter.numel() for parameter in small_network(config).parameters())
    assert all(fsdp2[f"sharded {name}"])
    assert fsdp2[f"numbers of a process {name}"] < 0.51 * whole


@pytest.mark.parametrize("name", step_configs())
def test_sharded_steps_train_clip_and_average_as_one_process_does(fsdp2, name):
    config = step_configs()[name]
    state = fresh_state(config, lambda network: None)
    norms = take_steps(state, (0, NUM_ROWS), config, gradient_scale=1.0)
    update_emas(state)
    start = parameters(small_network(config.loss, torch.float64))
    assert min(norms) > 0.1  # above the bound that gradients are clipped to
    assert fsdp2[f"norms {name}"] == pytest.approx([norm.item() for norm in norms], rel=1e-12)
    for ours, network in zip(fsdp2[f"trained {name}"], (state.network, *state.ema_networks.values()), strict=True):
        moved = parameters(network) - start
        assert relative(ours - start, moved) < 1e-9


@pytest.mark.parametrize("version", ["2.9.1", "2.12.1+cu128", "2.13.0a0+git1234567"])
def test_older_torch_is_refused(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(RuntimeError, match=r"needs torch 2\.13 or newer, but this is 2\."):
        shard_network(small_network(GUIDED))


def test_policy_that_rounds_times_is_refused():
    with pytest.raises(ValueError, match="cast_forward_inputs=False"):
        shard_network(small_network(GUIDED), mixed_precision=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
