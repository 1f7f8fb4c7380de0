"""Optimisers: which parameters they update, learning rates, checkpoints, and shards."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from meanflow_core.checkpoint import load_train_state, save_train_state
from meanflow_core.config import OptimizerConfig
from meanflow_core.optimizers import build_optimizers
from meanflow_core.presets.demo import debug
from meanflow_core.sharding import shard_network
from meanflow_core.training import Batch, TrainState, learning_rate, train_step
from tests.support.objectives import draw_batch, relative, rows_of
from tests.support.plain_networks import in_forward_mode
from tests.support.processes import run_group
from tests.support.training_checkpoints import differing
from tests.support.training_steps import IDENTITY, fresh_state, parameters, take_steps

pytestmark = pytest.mark.usefixtures("one_thread")
RATE = 1e-3


def config_with(name: str, **options):
    return replace(debug(), optimizer=OptimizerConfig(name=name, learning_rate=RATE, **options))


def with_gradients(network: nn.Module, step: int) -> nn.Module:
    """Sets random gradients."""
    generator = torch.Generator().manual_seed(step)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return network


def is_block_matrix(name: str, value: torch.Tensor) -> bool:
    return name.startswith("blocks.") and value.dim() == 2


def by_hand(name: str, network: nn.Module) -> list[torch.optim.Optimizer]:
    """The same optimisers, composed of torch's."""
    everything = list(network.parameters())
    if name == "adam":
        return [torch.optim.Adam(everything, lr=RATE, betas=(0.9, 0.95))]
    if name == "adamw":
        return [torch.optim.AdamW(everything, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)]
    matrices = [value for key, value in network.named_parameters() if is_block_matrix(key, value)]
    others = [value for key, value in network.named_parameters() if not is_block_matrix(key, value)]
    return [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1),
    ]


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_steps_are_those_of_torchs_optimisers(network, name):
    options = {} if name == "adam" else {"weight_decay": 0.1}
    theirs = copy.deepcopy(network)
    pairs = (
        (network, build_optimizers(network, config_with(name, momentum=0.9, **options).optimizer)),
        (theirs, by_hand(name, theirs)),
    )
    before = parameters(network)
    for step in range(3):
        for module, optimizers in pairs:
            with_gradients(module, step)
            for optimizer in optimizers:
                optimizer.step()
    assert relative(parameters(network), before) > 1e-3
    assert relative(parameters(network), parameters(theirs)) < 1e-6


def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest(network):
    names = {id(value): name for name, value in network.named_parameters()}
    muon, adamw = build_optimizers(network, config_with("muon").optimizer)
    updated = [{names[id(v)] for group in each.param_groups for v in group["params"]} for each in (muon, adamw)]
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    assert updated[0] == {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers}
    assert updated[1] == set(names.values()) - updated[0]
    assert {"y_embedder.embedding_table.weight", "x_embedder.proj.weight", "t_embedder.mlp.0.weight"} <= updated[1]


def test_muon_updates_every_linear_layer_of_a_network_without_blocks():
    network = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(4, 4, 1))
    muon, adamw = build_optimizers(network, config_with("muon").optimizer)
    assert [v.shape for v in muon.param_groups[0]["params"]] == [(4, 3)]
    assert len(adamw.param_groups[0]["params"]) == 3
    with pytest.raises(
        ValueError, match="muon needs a network with linear layers, but this one has none; choose adamw"
    ):
        build_optimizers(nn.Conv2d(4, 4, 1), config_with("muon").optimizer)


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_factors_multiply_the_rate_of_the_schedule(name):
    factors = (("blocks.0", 0.5), ("y_embedder", 0.1), ("blocks", 2.0))
    config = config_with(name, warmup_steps=4, learning_rate_factors=factors)
    state = fresh_state(config)
    names = {id(value): name for name, value in state.network.named_parameters()}
    for step in range(5):
        take_steps(state, config, 1)
        rate = learning_rate(config.optimizer, step, config.num_steps)
        assert rate == pytest.approx(RATE * min(1.0, (step + 1) / 4))
        rates = {
            names[id(value)]: group["lr"] / rate
            for optimizer in state.optimizers
            for group in optimizer.param_groups
            for value in group["params"]
        }
        assert len(rates) == len(names)
        for parameter, factor in rates.items():
            expected = next((factor for prefix, factor in factors if parameter.startswith(prefix)), 1.0)
            assert factor == pytest.approx(expected), parameter


def test_factor_scales_the_first_update():
    plain, halved = config_with("adamw"), config_with("adamw", learning_rate_factors=(("final_layer", 0.5),))
    changes = []
    for config in (plain, halved):
        state = fresh_state(config)
        before = copy.deepcopy(state.network.state_dict())
        take_steps(state, config, 1)
        changes.append({name: value - before[name] for name, value in state.network.state_dict().items()})
    for name, change in changes[0].items():
        factor = 0.5 if name.startswith("final_layer") else 1.0
        torch.testing.assert_close(changes[1][name], factor * change)


def sgd(network: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """An optimiser from outside the package."""
    return [torch.optim.SGD(network.parameters(), lr=config.learning_rate)]


def half(network: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Leaves out the last parameter."""
    return [torch.optim.SGD(list(network.parameters())[:-1], lr=config.learning_rate)]


def twice(network: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Updates every parameter twice."""
    return [*sgd(network, config), *sgd(network, config)]


def test_an_optimizer_from_outside_takes_its_steps_at_the_rate_of_the_schedule():
    config = config_with(f"{__name__}:sgd", warmup_steps=2)
    state = fresh_state(config)
    before = copy.deepcopy(state.network.state_dict())
    take_steps(state, config, 1)
    for name, parameter in state.network.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.5 * RATE * parameter.grad)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adan", "optimizer.name must be one of adam, adamw, muon or a module:function, but got 'adan'"),
        ("my_absent:adan", "cannot find 'my_absent:adan': No module named 'my_absent'"),
        (f"{__name__}:adan", "cannot find '.*:adan': module .* has no attribute 'adan'"),
        (
            f"{__name__}:half",
            "must update every parameter once, but updates final_layer.adaLN_modulation.1.bias 0 times",
        ),
        (f"{__name__}:twice", "must update every parameter once, but updates .* 2 times"),
    ],
)
def test_unusable_optimizer_is_refused(network, name, message):
    with pytest.raises(ValueError, match=message):
        build_optimizers(network, config_with(name).optimizer)


def test_settings_that_have_no_effect_are_refused(network):
    with pytest.raises(
        ValueError, match=r"no parameter's name starts with 'block1' .*; some names: x_embedder.proj.weight"
    ):
        build_optimizers(network, config_with("adam", learning_rate_factors=(("block1", 0.1),)).optimizer)
    with pytest.raises(ValueError, match="weight_decay is for adamw and muon, but got 0.1 for adam"):
        build_optimizers(network, config_with("adam", weight_decay=0.1).optimizer)


def tensors_of(state: TrainState) -> dict[str, torch.Tensor]:
    """Parameters and optimiser states, by name."""
    tensors = dict(state.network.state_dict())
    for name, parameter in state.network.named_parameters():
        for number, optimizer in enumerate(state.optimizers):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{number}/{key}"] = value
    return tensors


@pytest.mark.parametrize("name", ["adamw", "muon", f"{__name__}:sgd"])
def test_training_resumes_from_a_checkpoint_bit_for_bit(name, tmp_path):
    options = {"weight_decay": 0.1} if ":" not in name else {}
    config = config_with(name, warmup_steps=4, learning_rate_factors=(("y_embedder", 0.1),), **options)
    if ":" in name:
        config = config_with(name, warmup_steps=4)
    whole, first = fresh_state(config), fresh_state(config)
    take_steps(whole, config, 5)
    take_steps(first, config, 3)
    save_train_state(first, config, tmp_path)
    second = fresh_state(replace(config, seed=1))
    load_train_state(second, tmp_path)
    take_steps(second, config, 2)
    assert differing(tensors_of(second), tensors_of(whole)) == []
    assert len(tensors_of(whole)) > len(whole.network.state_dict()) or ":" in name


# Two processes


def train(network, config, rows, num_processes):
    """The state after three steps on these of 16 samples."""
    ema_networks = {0.9: copy.deepcopy(network).eval().requires_grad_(False)}
    if num_processes > 1:
        for module in (network, *ema_networks.values()):
            shard_network(module)
    optimizers = build_optimizers(network, config.optimizer)
    state = TrainState(network=network, ema_networks=ema_networks, optimizers=optimizers, step=0)
    latents, labels, record = draw_batch(config=config.loss, dtype=torch.float64)
    moments = torch.cat([latents, torch.zeros_like(latents)], dim=1)
    start, stop = rows
    share = Batch(
        moments=moments[start:stop], labels=labels[start:stop], record=rows_of(record, start, stop, config.loss)
    )
    for _ in range(3):
        train_step(state, network, [share], IDENTITY, config, gradient_scale=float(num_processes))
    return state


def whole_parameters(network):
    values = [value.full_tensor() if isinstance(value, DTensor) else value for value in network.parameters()]
    return torch.cat([value.detach().flatten() for value in values])


def train_in_two_processes(rank, network, config, folder):
    state = train(copy.deepcopy(network), config, ((0, 5), (5, 16))[rank], 2)
    save_train_state(state, config, folder)
    return whole_parameters(state.network)


@pytest.mark.parametrize("is_plain", [False, True], ids=["dit", "plain module"])
def test_muon_on_shards_gives_the_parameters_of_one_process(network, is_plain, tmp_path):
    network = network.double().train()
    network = in_forward_mode(network) if is_plain else network
    config = config_with("muon", weight_decay=0.1)
    one = train(copy.deepcopy(network), config, (0, 16), 1)
    found = run_group(train_in_two_processes, (network, config, tmp_path), 2, timeout_seconds=300)
    assert relative(whole_parameters(one.network), parameters(network)) > 1e-3
    assert relative(found, whole_parameters(one.network)) < 1e-5
    # The sharded checkpoint continues in one process.
    other = train(copy.deepcopy(network), replace(config, seed=1), (0, 16), 1)
    load_train_state(other, tmp_path)
    for name, value in tensors_of(one).items():
        torch.testing.assert_close(tensors_of(other)[name], value, rtol=1e-4, atol=1e-5, msg=name)
