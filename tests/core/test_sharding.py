"""Two processes with DDP and with FSDP2 compute the same gradients as one process with the full batch."""

import copy
import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch import distributed
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from meanflow_core.config import OptimizerConfig
from meanflow_core.networks.dit import MeanFlowDiT
from meanflow_core.networks.improved_dit import ImprovedMeanFlowDiT
from meanflow_core.objectives.draws import GUIDANCE_INPUTS
from meanflow_core.objectives.interface import build_objective
from meanflow_core.presets.demo import debug, debug_imf
from meanflow_core.sharding import shard_network
from meanflow_core.training import Batch, TrainState, compile_blocks, train_step, update_emas
from tests.support.objectives import NULL, OBJECTIVES, conditioning_of, draw_batch, make_record, relative, rows_of
from tests.support.processes import run_group
from tests.support.training_steps import IDENTITY

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_ROWS = 16
CONFIGS = {
    name: OBJECTIVES[name] for name in ("flow matching", "omega, kappa, interval", "own velocity", "improved MeanFlow")
}
NETWORKS = {"guided": CONFIGS["omega, kappa, interval"], "improved": CONFIGS["improved MeanFlow"]}
SPLITS = (
    "equal shares",
    "5 and 11 rows",
    "r < t in the second process only",
    "first process outside the guidance interval",
    "first process without labels",
)
CASES = [
    (objective, separate, split)
    for objective, separate, split in itertools.product(CONFIGS, (False, True), SPLITS)
    if not (separate and objective == "flow matching")
]
TIMEOUT_SECONDS = 300
each_network = pytest.mark.parametrize("name", NETWORKS)


def small_network(config, dtype=torch.float64):
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 4, "num_classes": NULL, "hidden_size": 48, "num_heads": 3}
    if config.needs_velocity_head:
        network = ImprovedMeanFlowDiT(**sizes, depth=3, aux_head_depth=1)
    else:
        network = MeanFlowDiT(**sizes, depth=2)
    with torch.no_grad():
        for parameter in network.parameters():  # so that zero-initialised layers do not hide errors
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.to(dtype)


def split_batch(config, split, dtype=torch.float64):
    """A batch of 16 samples, and each of the two processes' shares of it."""
    latents, labels, record = draw_batch(config=config, dtype=dtype)
    names = ("t", "r", "noise", "label_dropped", *GUIDANCE_INPUTS)
    draws = {name: getattr(record.draws, name) for name in names if getattr(record.draws, name) is not None}
    first, below = torch.arange(NUM_ROWS) < NUM_ROWS // 2, draws["r"] < draws["t"]
    if split == "r < t in the second process only":
        order = torch.argsort(below.to(torch.uint8), stable=True)
        draws = {name: value[order] for name, value in draws.items()}
    if split == "first process outside the guidance interval":
        t = torch.where(first, 0.9 + 0.1 * draws["t"], draws["t"])
        draws |= {"t": t, "r": torch.where(first & ~below, t, draws["r"])}
        if "guidance_interval_end" in draws:
            draws["guidance_interval_end"] = torch.where(first, 0.8, draws["guidance_interval_end"])
    if split == "first process without labels":
        draws["label_dropped"] = draws["label_dropped"] | first
    record = make_record(config, **draws)
    edge = 5 if split == "5 and 11 rows" else NUM_ROWS // 2
    shares = [
        (latents[start:stop], labels[start:stop], rows_of(record, start, stop, config))
        for start, stop in ((0, edge), (edge, NUM_ROWS))
    ]
    return (latents, labels, record), shares


def loss_of(training_network, network, batch, config, separate=False):
    return build_objective(config).loss(
        training_network, network, *batch,
        null_label=NULL, global_num_rows=NUM_ROWS, separate_derivative=separate,
    ).loss  # fmt: skip


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().flatten()


def gradient(module):
    """The gradients of all parameters in one vector. Fails if a parameter has none."""
    missing = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert not missing, missing
    return torch.cat([full(parameter.grad) for parameter in module.parameters()])


def parameters(module):
    return torch.cat([full(parameter) for parameter in module.parameters()])


def share_gradient(training_network, network, batch, config, separate=False):
    """The gradient of the sum of both processes' losses."""
    network.zero_grad(set_to_none=True)
    (loss_of(training_network, network, batch, config, separate) * distributed.get_world_size()).backward()
    return gradient(network)


@functools.cache
def full_batch_gradient(objective, separate, split, dtype=torch.float64):
    config = CONFIGS[objective]
    network = small_network(config, dtype)
    loss_of(network, network, split_batch(config, split, dtype)[0], config, separate).backward()
    return gradient(network)


def objective_of(name):
    return next(objective for objective, config in CONFIGS.items() if config is NETWORKS[name])


def take_steps(state, share, config, gradient_scale):
    """Takes two optimiser steps and returns the norms of their gradients."""
    generator = torch.Generator().manual_seed(1)
    moments = torch.randn(NUM_ROWS, 8, 8, 8, generator=generator, dtype=torch.float64).abs()
    labels = torch.randint(NULL, (NUM_ROWS,), generator=generator)
    start, stop = share
    record = rows_of(draw_batch(config=config.loss, dtype=torch.float64)[2], start, stop, config.loss)
    batch = Batch(moments=moments[start:stop], labels=labels[start:stop], record=record)
    return [
        train_step(state, state.network, [batch], IDENTITY, config, gradient_scale=gradient_scale).gradient_norm
        for _ in range(2)
    ]


def fresh_state(config, prepare):
    network = small_network(config.loss)
    ema_networks = {decay: copy.deepcopy(network).eval().requires_grad_(False) for decay in config.ema_decays}
    for module in (network, *ema_networks.values()):
        prepare(module)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, foreach=True)
    return TrainState(network=network, ema_networks=ema_networks, optimizers=[optimizer], step=0)


def step_config(name):
    return replace(
        debug() if name == "guided" else debug_imf(),
        loss=NETWORKS[name],
        ema_decays=(0.9, 0.5),
        optimizer=OptimizerConfig(learning_rate=1e-3, max_gradient_norm=0.1),
        global_batch_size=NUM_ROWS,
    )


def wrapped(kind, network):
    """Returns the network whose backward reduces gradients, and the one with the parameters."""
    if kind == "ddp":
        return DistributedDataParallel(network, forward_sync_buffers=False, gradient_as_bucket_view=True), network
    shard_network(network)
    return network, network


def gradients_of_all_cases(kind, rank):
    """{case: gradient}; networks are wrapped once, as in training."""
    pairs = {NETWORKS[name].objective: wrapped(kind, small_network(NETWORKS[name])) for name in NETWORKS}
    gradients = {}
    for objective, separate, split in CASES:
        config = CONFIGS[objective]
        batch = split_batch(config, split)[1][rank]
        gradients[objective, separate, split] = share_gradient(*pairs[config.objective], batch, config, separate)
    return gradients


def gradient_in_bfloat16(kind, rank, config, *, checkpointing=False):
    network = small_network(config, torch.float32)
    networks = (network, network)
    if checkpointing:
        network.enable_gradient_checkpointing()
    if kind is not None:
        networks = wrapped(kind, network)
    whole, shares = split_batch(config, "5 and 11 rows", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(*networks, whole if kind is None else shares[rank], config)
    (loss * (1 if kind is None else 2)).backward()
    return gradient(network)


def checkpointed_gradients(rank, config, *, compiled=False):
    """{separate: gradient} of a sharded network with activation checkpointing."""
    batch = split_batch(config, "r < t in the second process only")[1][rank]
    network = small_network(config)
    network.enable_gradient_checkpointing()
    if compiled:
        compile_blocks(network, backend="aot_eager")
    shard_network(network)
    return {separate: share_gradient(network, network, batch, config, separate) for separate in (False, True)}


@torch.no_grad()
def derivatives(network, config):
    """du/dt by the network, and by torch's forward-mode AD through all its hooks."""
    (latents, labels, record), _ = split_batch(config, "equal shares")
    conditioning = conditioning_of(record, labels)

    def u(z, t, r):
        return network(z, replace(conditioning, t=t, r=r)).u

    t, r, noise = record.draws.t, record.draws.r, record.draws.noise
    ours = network(latents, conditioning, noise).dudt
    with sdpa_kernel(SDPBackend.MATH):
        return ours, torch.func.jvp(u, (latents, t, r), (noise, torch.ones_like(t), torch.zeros_like(r)))[1]


def run_all(rank):
    results = {kind: gradients_of_all_cases(kind, rank) for kind in ("ddp", "fsdp2")}
    for name, config in NETWORKS.items():
        results[f"bfloat16 {name}"] = [
            gradient_in_bfloat16("ddp", rank, config),
            gradient_in_bfloat16("fsdp2", rank, config),
            gradient_in_bfloat16("fsdp2", rank, config, checkpointing=True),
        ]
        wrapper, network = wrapped("ddp", small_network(config))
        batch = split_batch(config, "equal shares")[1][rank]
        results[f"wrapper {name}"] = share_gradient(wrapper, network, batch, config)
        results[f"bare {name}"] = share_gradient(network, network, batch, config)
        results[f"checkpointed {name}"] = checkpointed_gradients(rank, config)

        network = small_network(config)
        shard_network(network)
        results[f"derivatives {name}"] = derivatives(network, config)
        results[f"sharded {name}"] = [isinstance(parameter, DTensor) for parameter in network.parameters()]
        results[f"groups {name}"] = sum(isinstance(module, FSDPModule) for module in network.modules())
        results[f"local numbers {name}"] = sum(p.to_local().numel() for p in network.parameters())

        state = fresh_state(step_config(name), shard_network)
        share = ((0, 5), (5, NUM_ROWS))[rank]
        results[f"norms {name}"] = take_steps(state, share, step_config(name), gradient_scale=2.0)
        derivatives(state.ema_network, config)  # an average must remain updatable after sampling
        update_emas(state)
        results[f"trained {name}"] = [parameters(m) for m in (state.network, *state.ema_networks.values())]
    return results


def run_compiled(rank):
    found = checkpointed_gradients(rank, NETWORKS["guided"], compiled=True)
    return {"checkpointed guided": found, "num_graphs": counters["stats"]["unique_graphs"]}


@pytest.fixture(scope="module")
def results():
    return run_group(run_all, (), 2, timeout_seconds=TIMEOUT_SECONDS)


def test_splits_are_as_named():
    for name, config in CONFIGS.items():
        shares = {split: [s[2] for s in split_batch(config, split)[1]] for split in SPLITS}
        assert [len(share.mirrored) for share in shares["5 and 11 rows"]] == [5, 11]
        for share in shares["first process outside the guidance interval"], shares["first process without labels"]:
            assert len(share[0].plan.null) == 0
            assert name == "flow matching" or len(share[1].plan.null) > 0
        assert shares["first process without labels"][0].draws.label_dropped.all()
        counts = [len(share.plan.below) for share in shares["r < t in the second process only"]]
        assert counts == ([0, 0] if name == "flow matching" else [0, 8])


@pytest.mark.parametrize("objective", CONFIGS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_compute_the_same_gradient_as_one(results, kind, objective):
    errors = {case: relative(results[kind][case], full_batch_gradient(*case)) for case in CASES if case[0] == objective}
    assert {case: error for case, error in errors.items() if not error < 1e-12} == {}


@each_network
def test_gradients_are_wrong_without_the_ddp_wrapper(results, name):
    whole = full_batch_gradient(objective_of(name), False, "equal shares")
    assert relative(results[f"wrapper {name}"], whole) < 1e-12
    assert relative(results[f"bare {name}"], whole) > 0.1


@each_network
def test_two_processes_in_bfloat16_are_as_accurate_as_one(results, name):
    exact = full_batch_gradient(objective_of(name), False, "5 and 11 rows", torch.float32)
    error = relative(gradient_in_bfloat16(None, 0, NETWORKS[name]), exact)
    assert 1e-3 < error < 0.01
    for found in results[f"bfloat16 {name}"]:
        assert found.dtype == torch.float32
        assert 1e-3 < relative(found, exact) < 2 * error


@each_network
def test_sharded_network_supports_activation_checkpointing(results, name):
    for separate, found in results[f"checkpointed {name}"].items():
        whole = full_batch_gradient(objective_of(name), separate, "r < t in the second process only")
        assert relative(found, whole) < 1e-12


@pytest.mark.soak
def test_sharded_network_supports_compiled_blocks():
    compiled = run_group(run_compiled, (), 2, timeout_seconds=TIMEOUT_SECONDS)
    assert compiled["num_graphs"] >= 3
    for separate, found in compiled["checkpointed guided"].items():
        whole = full_batch_gradient(objective_of("guided"), separate, "r < t in the second process only")
        assert relative(found, whole) < 1e-12


@each_network
def test_sharded_network_computes_du_dt_and_supports_forward_mode(results, name):
    ours, _ = derivatives(small_network(NETWORKS[name]), NETWORKS[name])
    for found in results[f"derivatives {name}"]:
        assert relative(found, ours) < 1e-12


@pytest.mark.parametrize(("name", "num_blocks"), [("guided", 2), ("improved", 4)])
def test_every_block_is_a_group_and_is_resharded_after_forward(results, name, num_blocks):
    whole = sum(parameter.numel() for parameter in small_network(NETWORKS[name]).parameters())
    assert results[f"groups {name}"] == num_blocks + 1  # and the root
    assert all(results[f"sharded {name}"])
    assert results[f"local numbers {name}"] < 0.51 * whole


@each_network
def test_sharded_training_clipping_and_averages_match_one_process(results, name):
    config = step_config(name)
    state = fresh_state(config, lambda network: None)
    norms = take_steps(state, (0, NUM_ROWS), config, gradient_scale=1.0)
    update_emas(state)
    start = parameters(small_network(config.loss))
    assert min(norms) > 0.1  # so that gradients are clipped
    assert results[f"norms {name}"] == pytest.approx([norm.item() for norm in norms], rel=1e-12)
    for ours, network in zip(results[f"trained {name}"], (state.network, *state.ema_networks.values()), strict=True):
        moved = parameters(network) - start
        assert relative(ours - start, moved) < 1e-9


@pytest.mark.parametrize("version", ["2.9.1", "2.13.0a0+git1234567"])
def test_older_torch_is_refused(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(RuntimeError, match=r"needs torch 2\.13 or newer, but this is 2\."):
        shard_network(small_network(NETWORKS["guided"]))
