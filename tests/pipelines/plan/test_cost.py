"""Counted costs, compared with published figures, with the mathematics, and with the memory of a real step."""

from dataclasses import dataclass, make_dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from meanflow_core.config import DiTConfig, MeanFlowConfig, NetworkConfig, TrainingConfig
from meanflow_core.objectives.interface import Mean, build_objective
from meanflow_core.objectives.meanflow import MeanFlow
from meanflow_core.presets.alpha_flow import AlphaFlowConfig
from meanflow_core.presets.consistency import demo_consistency
from meanflow_core.presets.demo import debug, debug_imf, demo
from meanflow_core.presets.diffusion import demo_ddpm
from meanflow_core.presets.improved_meanflow import imf_b2, imf_l2, imf_m2, imf_xl2
from meanflow_core.presets.meanflow import b2, b4, b4_omega3, b4_unguided, fm_b4, l2, m2, s2, xl2
from meanflow_core.training import build_train_state
from pipelines.plan.cost import (
    checkpoint_bytes,
    executed_flops,
    forward_flops,
    memory_estimate,
    num_parameters,
    step_flops,
    try_step,
)
from tests.support.objectives import draw_record

IMAGENET = {"sample_size": 32, "in_channels": 4, "num_classes": 1000}
SMALL = {"sample_size": 16, "in_channels": 4, "num_classes": 10}


def small(**changes) -> TrainingConfig:
    network = DiTConfig(patch_size=2, hidden_size=128, depth=3, num_heads=4)
    return replace(demo(), **{"network": network, "global_batch_size": 32, **changes})


def small_improved(**changes) -> TrainingConfig:
    network = replace(debug_imf().network, patch_size=2, hidden_size=128, depth=3, aux_head_depth=1)
    return replace(debug_imf(), **{"network": network, "global_batch_size": 32, **changes})


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        (s2, 33), (b4, 131), (b2, 131), (m2, 308), (l2, 459), (xl2, 676),
        (imf_b2, 146), (imf_m2, 231), (imf_l2, 510), (imf_xl2, 711),
    ],
)  # fmt: skip
def test_networks_have_the_published_numbers_of_parameters(preset, millions):
    # 676 M for XL/2: MeanFlow, Table 4.
    assert num_parameters(preset().network, **IMAGENET) / 1e6 == pytest.approx(millions, abs=0.6)


@pytest.mark.parametrize(
    ("preset", "gigaflops"),
    [(b4, 5.6), (b2, 23.1), (m2, 54.0), (l2, 80.9), (xl2, 119.0), (imf_b2, 24.9), (imf_l2, 116.4), (imf_xl2, 174.6)],
)
def test_forward_costs_twice_the_published_multiply_adds(preset, gigaflops):
    # DiT-XL/2: 118.64 G multiply-adds (Peebles and Xie 2023, Table 4); MeanFlow adds a second time embedding.
    assert forward_flops(preset().network, **IMAGENET) == pytest.approx(2e9 * gigaflops, rel=0.02)


@pytest.mark.parametrize(
    ("preset", "forwards"),
    [
        (fm_b4, 3.0),  # forward, and backward at twice its cost
        (b4_unguided, 3.25),  # plus du/dt of a quarter of the samples, at the cost of a forward
        (b4_omega3, 3.25 + 0.9),  # plus the unconditional velocity of all samples with a label (nine tenths)
        (b4, 3.25 + 0.9 + 0.25),  # plus the conditional velocity of the samples with r < t
    ],
)
def test_step_costs_the_sum_of_its_passes(preset, forwards):
    config = preset()
    forward = forward_flops(config.network, **IMAGENET) * config.global_batch_size
    assert step_flops(config, **IMAGENET) / forward == pytest.approx(forwards, rel=0.005)


def test_improved_meanflow_step_counts_each_head_where_it_runs():
    # With S, U and V for the FLOPs of the trunk and the heads, U = V: the training forward runs all three; du/dt of half the
    # samples runs S and U; the conditional velocity of that half and the unconditional one of guided samples run S and V.
    config = small_improved()
    record = draw_record(config.loss, seed=0, step=0, num_rows=8192, latent_shape=(1, 1, 1))
    guided = len(record.plan.null) / 8192
    one_head = forward_flops(config.network, **SMALL)
    trunk_and_output = forward_flops(replace(config.network, depth=2, aux_head_depth=0), **SMALL)
    expected = 3 * (2 * one_head - trunk_and_output) + (0.5 + 0.5 + guided) * one_head
    assert step_flops(config, **SMALL) / config.global_batch_size == pytest.approx(expected, rel=0.05)


def test_flops_are_proportional_to_the_batch():
    config = small()
    once, twice = (step_flops(replace(config, global_batch_size=size), **SMALL) for size in (48, 96))
    assert twice == pytest.approx(2 * once, rel=1e-12)


def test_model_flops_do_not_depend_on_precision_checkpointing_and_compile():
    config = small()
    other = replace(config, precision="bfloat16", activation_checkpointing=True, compile=True)
    assert step_flops(other, **SMALL) == step_flops(config, **SMALL)


@pytest.mark.parametrize(
    ("changes", "more", "of_derivative"),
    [
        ({}, 0.0, 0.0),
        ({"precision": "bfloat16", "derivative_precision": "bfloat16"}, 0.0, 0.0),
        # The separate du/dt pass also recomputes u of a quarter of the samples.
        ({"precision": "bfloat16"}, 0.25, 0.5),
        ({"activation_checkpointing": True}, 1.25, 0.0),  # plus a recomputed forward
        ({"precision": "bfloat16", "activation_checkpointing": True}, 1.25, 0.5),
    ],
)
def test_executed_flops_include_recomputation(changes, more, of_derivative):
    config = replace(b4(), **{"precision": "float32", **changes})
    forward = forward_flops(config.network, **IMAGENET) * config.global_batch_size
    found = executed_flops(config, **IMAGENET)
    whole = found.in_precision + found.of_derivative
    assert (whole - step_flops(config, **IMAGENET)) / forward == pytest.approx(more, abs=0.03)
    assert found.of_derivative / forward == pytest.approx(of_derivative, abs=0.03)


def test_checkpointed_flow_matching_recomputes_one_forward_and_no_derivative():
    config = replace(fm_b4(), precision="bfloat16", activation_checkpointing=True)
    forward = forward_flops(config.network, **IMAGENET) * config.global_batch_size
    found = executed_flops(config, **IMAGENET)
    assert found.in_precision / forward == pytest.approx(4.0, rel=0.005)
    assert found.of_derivative == 0.0


def test_few_samples_estimate_the_flops_within_a_few_percent():
    config = small()
    assert step_flops(config, **SMALL, num_drawn_samples=32) == pytest.approx(step_flops(config, **SMALL), rel=0.05)


@pytest.mark.parametrize(
    ("config", "deeper"), [(small(), {"depth": 5}), (small_improved(), {"depth": 5, "aux_head_depth": 2})]
)
def test_flops_of_a_deep_network_are_extrapolated_from_shallow_ones(config, deeper, monkeypatch):
    config = replace(config, network=replace(config.network, **deeper))
    flops = step_flops(config, **SMALL)
    monkeypatch.setattr("pipelines.plan.cost.at_full_depth", lambda network, measure, shallow: measure(network))
    assert flops == pytest.approx(step_flops(config, **SMALL), rel=1e-12)


def test_persistent_state_is_float32_and_divided_among_shards():
    config = small(ema_decays=(0.9, 0.99))
    parameters = 4 * num_parameters(config.network, **SMALL)
    whole, half = (memory_estimate(config, **SMALL, samples_per_pass=4, num_shards=shards) for shards in (1, 2))
    assert (whole.parameters, whole.gradients, whole.optimizer, whole.averages) == tuple(
        factor * parameters for factor in (1, 1, 2, 2)
    )
    for name in ("parameters", "gradients", "optimizer", "averages"):
        assert getattr(half, name) == getattr(whole, name) // 2, name
    assert half.activations == whole.activations
    lines = ("parameters", "gradients", "optimizer", "averages", "activations", "temporaries")
    assert half.total == sum(getattr(half, name) for name in lines)


def test_activations_grow_with_samples_and_checkpointing_removes_most():
    few, many = (memory_estimate(small(), **SMALL, samples_per_pass=rows) for rows in (8, 32))
    assert many.activations == pytest.approx(4 * few.activations, rel=0.02)
    checkpointed = memory_estimate(small(activation_checkpointing=True), **SMALL, samples_per_pass=32)
    assert checkpointed.activations < many.activations / 8
    assert checkpointed.total < many.total


def test_bfloat16_reduces_activations():
    in_bfloat16 = memory_estimate(small(precision="bfloat16"), **SMALL, samples_per_pass=32)
    assert in_bfloat16.activations < 0.75 * memory_estimate(small(), **SMALL, samples_per_pass=32).activations


def real_peak_bytes(config: TrainingConfig, rows: int) -> int:
    """Peak bytes that a real step allocates on top of its persistent state, as reported by torch."""
    torch.manual_seed(0)
    state = build_train_state(config, **SMALL, device=torch.device("cpu"))
    network = state.network
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizers[0].step()  # creates the moments
    record = draw_record(config.loss, seed=config.seed, step=0, num_rows=rows, latent_shape=(4, 16, 16))
    latents, labels = torch.randn(rows, 4, 16, 16), torch.randint(10, (rows,))
    in_bfloat16 = config.precision == "bfloat16"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            loss = build_objective(config.loss).loss(
                network, network, latents, labels, record, null_label=10, global_num_rows=rows,
                separate_derivative=in_bfloat16 or config.activation_checkpointing,
            ).loss  # fmt: skip
        loss.backward()
        del loss
        state.optimizers[0].step()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(
    ("make", "changes", "rows"),
    [
        (small, {}, 32),
        (small, {}, 1),  # the optimiser's copy of the parameters exceeds the activations
        (small, {"precision": "bfloat16", "activation_checkpointing": True}, 32),
        (small_improved, {"precision": "bfloat16", "activation_checkpointing": True}, 16),
    ],
)
# With more threads, CPU kernels allocate a scratch buffer for each.
@pytest.mark.usefixtures("one_thread")
def test_real_step_allocates_the_estimated_memory(make, changes, rows):
    config = make(**changes, global_batch_size=rows)
    memory = memory_estimate(config, **SMALL, samples_per_pass=rows)
    assert memory.activations + memory.temporaries == pytest.approx(real_peak_bytes(config, rows), rel=0.03)


def saved_bytes(config: TrainingConfig, rows: int) -> int:
    """Bytes that the graph saves for backward, without parameters, counting every storage once."""
    network = build_train_state(config, **SMALL, device=torch.device("cpu")).network
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    record = draw_record(config.loss, seed=config.seed, step=0, num_rows=rows, latent_shape=(4, 16, 16))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = build_objective(config.loss).loss(
            network, network, torch.randn(rows, 4, 16, 16), torch.randint(10, (rows,)), record,
            null_label=10, global_num_rows=rows,
        )  # fmt: skip
    assert output.loss.requires_grad
    return sum(sizes.values())


def test_activations_are_the_tensors_saved_for_backward():
    assert memory_estimate(small(), **SMALL, samples_per_pass=32).activations == pytest.approx(
        saved_bytes(small(), 32), rel=0.01
    )


def test_memory_of_a_deep_network_is_extrapolated_from_shallow_ones(monkeypatch):
    config = small(precision="bfloat16", activation_checkpointing=True)
    config = replace(config, network=replace(config.network, depth=6))
    estimate = memory_estimate(config, **SMALL, samples_per_pass=16)
    monkeypatch.setattr("pipelines.plan.cost.at_full_depth", lambda network, measure, shallow: measure(network))
    traced = memory_estimate(config, **SMALL, samples_per_pass=16)
    assert estimate.activations == traced.activations
    assert estimate.total == pytest.approx(traced.total, rel=0.02)


def test_checkpoint_holds_parameters_averages_and_moments():
    config = small(ema_decays=(0.9, 0.99))
    assert checkpoint_bytes(config, **SMALL) == 4 * num_parameters(config.network, **SMALL) * 5


def test_numbers_below_one_are_refused():
    with pytest.raises(ValueError, match="samples_per_pass must be at least 1, but got 0"):
        memory_estimate(small(), **SMALL, samples_per_pass=0)
    with pytest.raises(ValueError, match="num_shards must be at least 1, but got 0"):
        memory_estimate(small(), **SMALL, samples_per_pass=1, num_shards=0)


def plain_network(name):
    reference = {"network": f"tests.support.plain_networks:{name}"}
    return make_dataclass("Config", [], bases=(NetworkConfig,), namespace=reference, frozen=True, kw_only=True)()


def test_a_step_of_this_packages_objectives_and_networks_can_be_tried_without_data():
    for config in (debug(), debug_imf(), replace(debug(), loss=AlphaFlowConfig()), demo_consistency(), demo_ddpm()):
        try_step(config, **SMALL)


def test_every_phase_of_the_objective_is_tried_and_measured():
    # Only the last phase of alpha-Flow has a derivative, and it is not the longest.
    config = replace(debug(), network=plain_network("WithUnsupportedOperation"), loss=AlphaFlowConfig())
    with pytest.raises(ValueError, match="WithUnsupportedOperation has an operation without forward-mode AD"):
        try_step(config, **SMALL)
    try_step(replace(config, loss=AlphaFlowConfig(ratio=0.5)), **SMALL)
    whole, *parts = (
        memory_estimate(replace(debug(), loss=loss), **SMALL, samples_per_pass=16).total
        for loss in (AlphaFlowConfig(), *(AlphaFlowConfig(ratio=ratio) for ratio in (0.0, 0.5, 1.0)))
    )
    assert whole == max(parts) > min(parts)


class Misnamed(MeanFlow):
    metric_names = ("error",)

    def __init__(self, config):
        self.config = config
        self.has_r_below_t = True

    def _metrics(self, *_):
        return {"eror": Mean(torch.zeros(()), 1)}


@dataclass(frozen=True, kw_only=True)
class MisnamedConfig(MeanFlowConfig):
    objective: ClassVar[str] = f"{__name__}:Misnamed"


def test_metrics_must_have_the_names_that_the_objective_states():
    with pytest.raises(ValueError, match="must be its metric_names error, but its loss returns eror"):
        try_step(replace(debug(), loss=MisnamedConfig()), **SMALL)
