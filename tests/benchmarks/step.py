"""Measures the cost of a MeanFlow training step relative to a flow matching step of the same network.

    python tests/benchmarks/step.py --json step.json
    python tests/benchmarks/step.py --json step.json --preset xl2 --batch-size 64 --device cuda --precision bfloat16 --peers

Reports ratios of FLOPs, median time and bytes saved for backward. FLOPs are counted with math attention, because the
counter misses fused attention on CPUs. "guided" means omega 1 and kappa 0.5 on [0, 1], with r < t in 25 % of samples
and 10 % of labels dropped. Improved MeanFlow's FLOPs are compared with the theoretical minimum of its objective.
`--peers` adds two other implementations of the same objective, as in public trainers.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from _harness import interleaved_medians, main, synchronize
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meanflow_core.config import (
    DiTConfig,
    GuidanceConfig,
    LossConfig,
    MeanFlowConfig,
    TimeSamplingConfig,
    TrainingConfig,
)
from meanflow_core.latents import LatentNormalization
from meanflow_core.networks.building import build_network
from meanflow_core.networks.dit import MeanFlowDiT
from meanflow_core.networks.forward_mode import ForwardModeNetwork
from meanflow_core.networks.interface import Conditioning
from meanflow_core.objectives.flow import LossOutput
from meanflow_core.objectives.interface import build_objective
from meanflow_core.presets import PRESETS
from meanflow_core.presets.improved_meanflow import imf_b2
from meanflow_core.training import Batch, TrainState, build_train_state, compile_blocks, train_step

FLOW_MATCHING = MeanFlowConfig(times=TimeSamplingConfig(fraction_r_below_t=0.0))
UNGUIDED = MeanFlowConfig()
GUIDED = MeanFlowConfig(guidance=GuidanceConfig(omega=1.0, kappa=0.5))
CHANNELS, SIZE, CLASSES = 4, 32, 1000
IDENTITY = LatentNormalization(mean=(0.0,) * CHANNELS, std=(1.0,) * CHANNELS)


class PlainDiT(nn.Module):
    """The DiT as a plain module: its u alone, without du/dt."""

    def __init__(self, **arguments: object) -> None:
        super().__init__()
        self.dit = MeanFlowDiT(**arguments)

    def forward(self, z: torch.Tensor, t: torch.Tensor, h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Computes u."""
        return self.dit(z, Conditioning(t=t, r=t - h, labels=labels)).u


def make_batch(loss: LossConfig, rows: int, device: str, step: int = 0) -> Batch:
    """Makes a batch whose data is the same for every objective and whose draws depend on the step."""
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(rows, 2 * CHANNELS, SIZE, SIZE, generator=generator).abs()
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    objective = build_objective(loss)
    draws = objective.draw(seed=0, step=step, num_rows=rows, latent_shape=(CHANNELS, SIZE, SIZE))
    record = objective.record(draws, 0, rows)
    return Batch(moments=moments.to(device), labels=labels.to(device), record=record.to(torch.device(device)))


def fresh_state(config: TrainingConfig, device: str) -> TrainState:
    """A new training state. Noise is added to the parameters, so that no layer is zero."""
    state = build_train_state(
        config, sample_size=SIZE, in_channels=CHANNELS, num_classes=CLASSES, device=torch.device(device)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in state.network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(device))
    return state


def posterior_means(batch: Batch) -> torch.Tensor:
    """Latents (B, C, H, W) for forwards outside train_step."""
    return batch.moments[:, :CHANNELS]


def run_loss(network, batch: Batch, loss: LossConfig, *, separate: bool = False) -> LossOutput:
    """The loss of a batch. separate: du/dt in a forward of its own."""
    return build_objective(loss).loss(
        network, network, posterior_means(batch), batch.labels, batch.record,
        null_label=CLASSES, global_num_rows=len(batch.labels), separate_derivative=separate,
    )  # fmt: skip


def count_flops(function: Callable[[], object]) -> float:
    """FLOPs of a call, including attention."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    by_operator = counter.get_flop_counts()["Global"]
    assert by_operator.get(torch.ops.aten.bmm, 0) > 0, "attention was not counted"
    return float(counter.get_total_flops())


def count_step_flops(network, loss: LossConfig, rows: int) -> float:
    """FLOPs of forward and backward, counted on the meta device without computing them."""
    batch = make_batch(loss, rows, "meta")
    return count_flops(lambda: run_loss(network, batch, loss).loss.backward())


def measure_flops(config: TrainingConfig, rows: int) -> dict[str, float]:
    """FLOPs of MeanFlow with and without guidance, relative to flow matching. Forward mode: of the DiT as a plain module."""
    with torch.device("meta"):
        network = build_network(config.network, sample_size=SIZE, in_channels=CHANNELS, num_classes=CLASSES)
        in_forward_mode = ForwardModeNetwork(f"{__name__}:PlainDiT", asdict(config.network), SIZE, CHANNELS, CLASSES)
    flow_matching = count_step_flops(network, FLOW_MATCHING, rows)
    return {
        "flow_matching_step_teraflops": flow_matching / 1e12,
        "unguided_over_flow_matching_flops": count_step_flops(network, UNGUIDED, rows) / flow_matching,
        "guided_over_flow_matching_flops": count_step_flops(network, GUIDED, rows) / flow_matching,
        "forward_mode_unguided_flops": count_step_flops(in_forward_mode, UNGUIDED, rows) / flow_matching,
        "forward_mode_guided_flops": count_step_flops(in_forward_mode, GUIDED, rows) / flow_matching,
    }


def measure_improved_flops(config: TrainingConfig, rows: int) -> dict[str, float]:
    """FLOPs of improved MeanFlow and their theoretical minimum, relative to the baseline 3 (S + U + V).

    S, U and V are the FLOPs of one forward of the shared blocks, the blocks of u and the blocks of v. The minimum is
    3 (S + U + V) + rho (S + U) for the tangent + rho (S + V) for the conditional velocity + g (S + V) for the null
    velocity, where rho is the fraction of samples with r < t and g the fraction of guided samples.
    """
    loss = config.loss
    with torch.device("meta"):
        network = build_network(config.network, sample_size=SIZE, in_channels=CHANNELS, num_classes=CLASSES)
    batch = make_batch(loss, rows, "meta")
    plan = batch.record.plan
    conditioning = batch.record.draws.conditioning(batch.labels, CLASSES)
    z = posterior_means(batch)
    with torch.no_grad():
        all_blocks = count_flops(lambda: network(z, conditioning))
        for_velocity = count_flops(lambda: network(z, conditioning, velocity_only=True))
        for_average = count_flops(lambda: network.for_sampling()(z, conditioning))
    rho, guided = len(plan.below) / rows, len(plan.null) / rows
    floor = 3 * all_blocks + rho * for_average + (rho + guided) * for_velocity
    taken = count_flops(lambda: run_loss(network, batch, loss).loss.backward())
    return {
        "improved_floor_over_its_baseline_flops": floor / (3 * all_blocks),
        "improved_over_its_baseline_flops": taken / (3 * all_blocks),
        "improved_over_its_floor_flops": taken / floor,
    }


def saved_bytes(network, batch: Batch, loss: LossConfig) -> int:
    """Bytes that the training forward saves for backward, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run_loss(network, batch, loss)
    assert output.loss.requires_grad
    return sum(sizes.values())


def measure_saved(state: TrainState, rows: int, device: str) -> dict[str, float]:
    """Bytes saved for backward, relative to flow matching."""
    kept = {
        name: saved_bytes(state.network, make_batch(loss, rows, device), loss)
        for name, loss in (("flow_matching", FLOW_MATCHING), ("unguided", UNGUIDED), ("guided", GUIDED))
    }
    return {
        "flow_matching_saved_megabytes": kept["flow_matching"] / 1e6,
        "unguided_over_flow_matching_saved_bytes": kept["unguided"] / kept["flow_matching"],
        "guided_over_flow_matching_saved_bytes": kept["guided"] / kept["flow_matching"],
    }


def whole_batch_loss(network, batch: Batch, loss: LossConfig, *, separate: bool) -> torch.Tensor:
    """The same loss as public trainers compute it: a JVP and two forwards for guidance, all on the whole batch.

    With `separate`, an additional forward computes u, as in PyTorch ports. Otherwise u comes from the JVP, as in the
    authors' JAX code.
    """
    record, x, column = batch.record.draws, posterior_means(batch), (-1, 1, 1, 1)
    t, r = record.t, record.r
    z = (1 - t.view(column)) * x + t.view(column) * record.noise
    labels = torch.where(record.label_dropped, CLASSES, batch.labels)
    guided = v = record.noise - x
    if not loss.guidance.is_off:
        with torch.no_grad():
            conditional = network(z, Conditioning(t=t, r=t, labels=labels)).u.float()
            null = network(z, Conditioning(t=t, r=t, labels=torch.full_like(labels, CLASSES))).u.float()
        omega, kappa = loss.guidance.omega, loss.guidance.kappa
        guided = omega * v + kappa * conditional + (1 - omega - kappa) * null
        guided = torch.where(record.label_dropped.view(column), v, guided)

    def function(z: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return network(z, Conditioning(t=t, r=r, labels=labels)).u

    with sdpa_kernel(SDPBackend.MATH):
        u, dudt = torch.func.jvp(function, (z, t, r), (guided, torch.ones_like(t), torch.zeros_like(r)))
    if separate:
        u = function(z, t, r)
    error = u.float() - (guided - (t - r).view(column) * dudt).detach()
    squared = error.square().flatten(1).sum(1)
    return (squared / (squared.detach() + loss.norm_eps) ** loss.norm_p).mean()


def make_steps(
    arguments: argparse.Namespace, config: TrainingConfig, state: TrainState
) -> dict[str, Callable[[], object]]:
    """{name: function that runs a whole training step}. All functions share one state."""
    rows, device = arguments.batch_size, arguments.device
    steps: dict[str, Callable[[], object]] = {}
    for name, loss in (("flow_matching", FLOW_MATCHING), ("unguided", UNGUIDED), ("guided", GUIDED)):
        batch, step_config = make_batch(loss, rows, device), replace(config, loss=loss)
        steps[name] = lambda batch=batch, step_config=step_config: train_step(
            state, state.network, [batch], IDENTITY, step_config
        )
    if arguments.peers:
        batch = make_batch(GUIDED, rows, device)

        def peer(separate: bool) -> None:
            state.network.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss = whole_batch_loss(state.network, batch, GUIDED, separate=separate)
            loss.backward()
            state.optimizers[0].step()

        steps["guided_whole_batch_one_pass"] = lambda: peer(False)
        steps["guided_whole_batch_separate"] = lambda: peer(True)
    return steps


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference, relative to the norm of `theirs`."""
    return float((ours - theirs).norm() / theirs.norm())


def compare_with_compiled(state: TrainState, rows: int, device: str) -> dict[str, float]:
    """Compiles the network's blocks in place and compares gradient and derivative with eager mode."""
    batch = make_batch(GUIDED, rows, device)
    results = []
    for compiled in (False, True):
        if compiled:
            compile_blocks(state.network)
        output = run_loss(state.network, batch, GUIDED)
        gradient = torch.autograd.grad(output.loss, list(state.network.parameters()))
        results.append((torch.cat([g.flatten() for g in gradient]), output.dudt))
    (eager_gradient, eager_dudt), (gradient, dudt) = results
    return {
        "compiled_gradient_error": relative(gradient, eager_gradient),
        "compiled_dudt_error": relative(dudt, eager_dudt),
    }


def time_steps(
    arguments: argparse.Namespace, config: TrainingConfig, state: TrainState, label: str
) -> dict[str, float]:
    """Median time of each step relative to flow matching and, on GPUs, its peak memory."""
    steps = make_steps(arguments, config, state)
    seconds = interleaved_medians(steps, rounds=arguments.rounds)
    figures = {f"{label}flow_matching_step_seconds": seconds["flow_matching"]}
    for name in steps:
        if name != "flow_matching":
            figures[f"{label}{name}_over_flow_matching_time"] = seconds[name] / seconds["flow_matching"]
    if arguments.device == "cuda":
        for name, step in steps.items():
            torch.cuda.reset_peak_memory_stats()
            step()
            synchronize()
            figures[f"{label}{name}_peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Measures everything for a preset."""
    config = replace(
        PRESETS[arguments.preset](),
        global_batch_size=arguments.batch_size,
        precision=arguments.precision,
        compile=False,
    )
    if not isinstance(config.network, DiTConfig):
        raise SystemExit(f"--preset must use the dit architecture, but got {arguments.preset}")
    figures = measure_flops(config, arguments.batch_size)
    figures |= measure_improved_flops(imf_b2(), arguments.batch_size)
    state = fresh_state(config, arguments.device)
    figures |= measure_saved(state, arguments.batch_size, arguments.device)
    figures |= time_steps(arguments, config, state, "")
    if arguments.peak_teraflops:
        achieved = figures["flow_matching_step_teraflops"] / figures["flow_matching_step_seconds"]
        figures["flow_matching_share_of_peak"] = achieved / arguments.peak_teraflops
    if arguments.compile:
        state = fresh_state(config, arguments.device)
        figures |= compare_with_compiled(state, arguments.batch_size, arguments.device)
        arguments.peers = False
        figures |= time_steps(arguments, config, state, "compiled_")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="s4", choices=sorted(PRESETS))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each kind")
    parser.add_argument("--peers", action="store_true", help="also time the implementations of public trainers")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="skip the compiled step")
    parser.add_argument(
        "--peak-teraflops",
        type=float,
        help="peak throughput of the device at this precision; adds the achieved fraction to the report",
    )
    main(
        measure,
        {
            "unguided_over_flow_matching_flops": ("<=", 1.20),
            "guided_over_flow_matching_flops": ("<=", 1.58),
            "forward_mode_unguided_flops": ("<=", 1.30),
            "forward_mode_guided_flops": ("<=", 1.70),
            "improved_over_its_floor_flops": ("<=", 1.20),
            "unguided_over_flow_matching_saved_bytes": ("<=", 1.05),
            "guided_over_flow_matching_saved_bytes": ("<=", 1.05),
            "unguided_over_flow_matching_time": ("<=", 1.40),
            "guided_over_flow_matching_time": ("<=", 1.80),
            "compiled_gradient_error": ("<=", 1e-4),
            "compiled_dudt_error": ("<=", 1e-4),
        },
        parser,
    )
