"""Training gives the same parameters with 1, 2 or 4 processes, DDP or FSDP2, and one or several passes per step."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from meanflow_core.checkpoint import load_train_state, save_train_state
from meanflow_core.config import GuidanceConfig, OptimizerConfig
from meanflow_core.presets.demo import debug
from meanflow_core.sharding import shard_network
from meanflow_core.training import (
    build_train_state,
    contiguous_share,
    num_passes,
    relative_ema_distance,
    train_step,
    warm_up_ddp_buckets,
)
from tests.support.objectives import relative
from tests.support.processes import run_group
from tests.support.training_steps import IDENTITY, make_batch, part_of

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_STEPS, SAVE_STEP = 10, 4
CONFIG = replace(
    debug(),
    loss=replace(debug().loss, guidance=GuidanceConfig(omega=1.0, kappa=0.5, guidance_interval_end=0.8)),
    optimizer=OptimizerConfig(learning_rate=1e-3, max_gradient_norm=1.0),
    global_batch_size=22,  # shares of 11, or of 5 and 6, in passes of different sizes
    num_steps=NUM_STEPS,
    ema_decays=(0.9, 0.99),
)
SAMPLES_PER_PASS = {1: 5, 2: 4, 4: 2}
KINDS = ("ddp", "fsdp2")
TIMEOUT_SECONDS = 360


def batches(step, rank, world_size, samples_per_pass):
    batch, num_rows = make_batch(CONFIG, step), CONFIG.global_batch_size
    first, last = contiguous_share(num_rows, rank, world_size)
    passes = num_passes(num_rows, world_size, samples_per_pass)
    edges = [contiguous_share(last - first, number, passes) for number in range(passes)]
    return [part_of(batch, first + start, first + stop, CONFIG) for start, stop in edges]


def initial_state(kind="ddp"):
    return build_train_state(
        CONFIG, sample_size=8, in_channels=4, num_classes=10, device=torch.device("cpu"),
        shard=shard_network if kind == "fsdp2" else None,
    )  # fmt: skip


def take_steps(state, *, kind="ddp", rank=0, world_size=1, samples_per_pass=None, save=None):
    """Trains to the end; `save` is called after SAVE_STEP steps."""
    network, accumulating = state.network, nullcontext
    if world_size > 1 and kind == "ddp":
        network = DistributedDataParallel(state.network, forward_sync_buffers=False, gradient_as_bucket_view=True)
        accumulating = network.no_sync
        warm_up_ddp_buckets(state, network, batches(state.step, rank, world_size, samples_per_pass)[0], CONFIG)
    while state.step < NUM_STEPS:
        train_step(
            state, network, batches(state.step, rank, world_size, samples_per_pass), IDENTITY, CONFIG,
            gradient_scale=float(world_size), accumulating=accumulating,
        )  # fmt: skip
        if save is not None and state.step == SAVE_STEP:
            save(state)
    return state


def tensors(state):
    """Every tensor of a state by name, unsharded; collective."""
    found = {}
    for prefix, network in (("network", state.network), *state.ema_networks.items()):
        found |= {f"{prefix}/{name}": value for name, value in network.state_dict().items()}
    for name, parameter in state.network.named_parameters():
        found |= {
            f"{moment}/{name}": state.optimizers[0].state[parameter][moment] for moment in ("exp_avg", "exp_avg_sq")
        }
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in found.items()
    }


def saver(kind, rank, folder):
    """Saves a checkpoint into one folder per process, as on several nodes, and merges them, as Ray Train does."""

    def save(state):
        own, merged = folder / f"{kind}-{rank}", folder / kind
        own.mkdir()
        save_train_state(state, CONFIG, own)
        merged.mkdir(exist_ok=True)
        for path in own.iterdir():
            path.rename(merged / path.name)
        distributed.barrier()

    return save


def train_and_save(rank, world_size, folder):
    options = {"rank": rank, "world_size": world_size}
    results = {"ddp": tensors(take_steps(initial_state(), **options))}
    options["samples_per_pass"] = SAMPLES_PER_PASS[world_size]
    for kind in KINDS:
        state = take_steps(initial_state(kind), kind=kind, save=saver(kind, rank, folder), **options)
        results[f"{kind} in passes"] = tensors(state)
        results[f"{kind} distances"] = relative_ema_distance(state)
    resumed = initial_state()
    load_train_state(resumed, folder / "ddp")
    results["ddp resumed"] = tensors(take_steps(resumed, **options))
    return results


def resume_sharded(rank, world_size, folder):
    state = initial_state("fsdp2")
    load_train_state(state, folder / "fsdp2")
    results = {"loaded": tensors(state)}
    results["resumed"] = tensors(take_steps(state, kind="fsdp2", rank=rank, world_size=world_size))
    return results


@pytest.fixture(scope="module", params=[4, pytest.param(2, marks=pytest.mark.soak)])
def runs(request, tmp_path_factory):
    """The folder of the checkpoints after SAVE_STEP steps, and {name: tensors after NUM_STEPS}."""
    folder = tmp_path_factory.mktemp("world-sizes")
    results = run_group(train_and_save, (request.param, folder), request.param, timeout_seconds=TIMEOUT_SECONDS)
    results["one"] = tensors(take_steps(initial_state()))
    results["one in passes"] = tensors(take_steps(initial_state(), samples_per_pass=SAMPLES_PER_PASS[1]))
    for kind in KINDS:
        state = initial_state()
        load_train_state(state, folder / kind)
        results[f"one loaded from {kind}"] = tensors(state)
        results[f"one resumed from {kind}"] = tensors(take_steps(state))
    if request.param == 2:
        resumed = run_group(resume_sharded, (4, folder), 4, timeout_seconds=TIMEOUT_SECONDS)
        results |= {f"four {name}": value for name, value in resumed.items()}
    return folder, results


def without_key_bias(name, value):
    """Drops the key's part of a qkv bias; returns other tensors unchanged.

    The key's bias adds a constant to all attention logits of a row, which softmax removes. Its true gradient is zero;
    the computed one is rounding error, which Adam scales up to steps of the size of the learning rate.
    """
    if not name.endswith("attn.qkv.bias"):
        return value
    query, _, rest = value.chunk(3)
    return torch.cat([query, rest])


def test_every_number_of_processes_ends_with_the_same_parameters(runs):
    results = runs[1]
    expected = results["one"]
    names = [name for name in results if "distances" not in name and "loaded" not in name and name != "one"]
    assert len(names) >= 7
    for name in names:
        for prefix in ("network", 0.9, 0.99):
            pairs = {
                key: (without_key_bias(key, results[name][key]), without_key_bias(key, value))
                for key, value in expected.items()
                if key.startswith(f"{prefix}/")
            }
            whole = [torch.cat([pair[side].flatten() for pair in pairs.values()]) for side in (0, 1)]
            assert relative(*whole) < 1e-5, name
            errors = {key: relative(*pair) for key, pair in pairs.items() if pair[1].norm() > 0}
            assert max(errors.values()) < 1e-4, (name, max(errors, key=errors.get))


def test_training_changes_every_parameter(runs):
    start = {f"network/{name}": value for name, value in initial_state().network.state_dict().items()}
    changes = [relative(runs[1]["one"][name], value) for name, value in start.items() if value.norm() > 0]
    assert min(changes) > 1e-3


def test_resumed_ddp_run_matches_an_uninterrupted_one_bit_for_bit(runs):
    # Four processes matter here: with more than two, the rounding of a summed gradient depends on its position in
    # DDP's buckets.
    ours, theirs = runs[1]["ddp resumed"], runs[1]["ddp in passes"]
    assert [name for name, value in theirs.items() if not torch.equal(ours[name], value)] == []


def test_sharded_checkpoint_loads_identically_in_any_number_of_processes(runs):
    results = runs[1]
    expected = results["one loaded from fsdp2"]
    if "four loaded" in results:
        assert set(results["four loaded"]) == set(expected)
        assert all(torch.equal(results["four loaded"][key], value) for key, value in expected.items())
    errors = {
        key: relative(value, expected[key])
        for key, value in results["one loaded from ddp"].items()
        if expected[key].norm() > 0
    }
    assert max(error for key, error in errors.items() if not key.endswith("qkv.bias")) < 1e-3


def test_checkpoint_stores_every_value_once_and_no_pickled_code(runs):
    folder, results = runs
    for kind in KINDS:
        suffixes = {path.suffix for path in (folder / kind).iterdir()}
        assert suffixes == {".safetensors", ".json"}
        size = sum(path.stat().st_size for path in (folder / kind).glob("*.safetensors"))
        num_values = sum(value.numel() for value in results["one loaded from fsdp2"].values())
        assert 4 * num_values < size < 4.1 * num_values + 200_000  # 4 bytes per value, plus the headers of the files


@pytest.mark.parametrize("kind", KINDS)
def test_ema_distance_covers_the_whole_sharded_network(runs, kind):
    tensors_by_name, distances = (runs[1][f"{kind} {name}"] for name in ("in passes", "distances"))
    names = [name for name, _ in initial_state().network.named_parameters()]
    parameters = torch.cat([tensors_by_name[f"network/{name}"].flatten() for name in names])
    for decay, distance in distances.items():
        average = torch.cat([tensors_by_name[f"{decay}/{name}"].flatten() for name in names])
        assert distance == pytest.approx(float((average - parameters).norm() / parameters.norm()), rel=1e-3)
