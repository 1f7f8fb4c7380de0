"""One optimiser step on one device, and the moving averages. Whoever has several devices hands in the wrapped network."""

import copy
import inspect
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from meanflow_core.config import LossConfig, OptimizerConfig, TrainingConfig
from meanflow_core.latents import LatentNormalization, sample_latents
from meanflow_core.loss import ASKED_PARTS, Network, StepRecord, meanflow_loss
from meanflow_core.networks import AnyNetwork, build_network, require_same_kind


@dataclass
class TrainState:
    """Everything that training changes."""

    network: AnyNetwork
    """The parameters that the optimiser moves."""
    ema_networks: dict[float, AnyNetwork]
    """{decay: their moving average}; the first one samples."""
    optimizer: torch.optim.Adam
    """Adam and its moments."""
    step: int
    """Optimiser steps taken."""

    @property
    def ema_network(self) -> AnyNetwork:
        """The moving average that samples."""
        return next(iter(self.ema_networks.values()))


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One step's figures over this worker's rows, as tensors: reading them is the caller's synchronisation."""

    sums: torch.Tensor
    """float32 (6,): loss (already over the global B); squared error and number of rows with r = t; the same, r < t; the
    v head's squared error, 0 without one."""
    gradient_norm: torch.Tensor
    """Scalar: norm of the whole gradient before clipping, the same on every worker."""


def build_train_state(
    config: TrainingConfig, *, sample_size: int, in_channels: int, num_classes: int, device: torch.device
) -> TrainState:
    """A fresh state, its initial parameters a function of config.seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_network(
            config.network, sample_size=sample_size, in_channels=in_channels, num_classes=num_classes
        )
    network = network.to(device).train()
    optimizer = torch.optim.Adam(
        network.parameters(),
        lr=config.optimizer.learning_rate,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        foreach=True,
    )
    ema_networks = {decay: copy.deepcopy(network).eval().requires_grad_(False) for decay in config.ema_decays}
    if config.activation_checkpointing:
        network.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(network)
    return TrainState(network=network, ema_networks=ema_networks, optimizer=optimizer, step=0)


def compile_blocks(network: AnyNetwork, backend: str = "inductor") -> None:
    """Compiles a network block by block, in place: once for all blocks of a kind, with hooks between them still run."""
    # Over a long run every size of `loss.ASKED_PARTS` comes, with graphs of the graded pass beside: more than dynamo's
    # 8, after which it runs new sizes uncompiled without a word. Older torch (2.11) has no such option for one module.
    has_limit = "recompile_limit" in inspect.signature(torch.compile).parameters
    limit = {"recompile_limit": 4 * ASKED_PARTS} if has_limit else {}
    network.compile_repeated_blocks(dynamic=False, backend=backend, **limit)


def begin_from(state: TrainState, network: AnyNetwork) -> None:
    """Gives a fresh state, and its averages, the parameters of a trained network of the same kind and size.

    For warm starts, of MeanFlow from flow matching for one. Raises ValueError where the networks differ, naming how.
    """
    require_same_kind(network, state.network)
    for target in (state.network, *state.ema_networks.values()):
        target.load_state_dict(network.state_dict())


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of 0-based step `step` of `num_steps`: linear warm-up, constant, linear cool-down to 0 after the last."""
    warmup = (step + 1) / max(config.warmup_steps, 1)
    cooldown = (num_steps - step) / config.cooldown_steps if config.cooldown_steps else 1.0
    return config.learning_rate * max(0.0, min(1.0, warmup, cooldown))


@torch.no_grad()
def update_emas(state: TrainState) -> None:
    """ema = decay ema + (1 - decay) parameters, from the first step on, as the papers do (no warm-up of the decay)."""
    parameters = list(state.network.parameters())
    for decay, ema_network in state.ema_networks.items():
        torch._foreach_lerp_(list(ema_network.parameters()), parameters, 1.0 - decay)


def train_step(
    state: TrainState,
    graded_network: Network,
    moments: torch.Tensor,
    labels: torch.Tensor,
    record: StepRecord,
    normalization: LatentNormalization,
    config: TrainingConfig,
    *,
    gradient_scale: float = 1.0,
) -> StepMetrics:
    """One step on this worker's rows of the global batch.

    moments: (B, 2C, H, W), mirrored already where the record says so; labels: int64 (B,). graded_network is
    state.network or a wrapper whose backward reduces gradients; a wrapper that averages over W workers wants
    gradient_scale = W, since the loss is already over the global number of rows. Raises ValueError as the loss does.
    """
    loss_config: LossConfig = config.loss
    latents = sample_latents(moments, record.posterior_noise, normalization)
    in_bfloat16 = config.precision == "bfloat16"
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=in_bfloat16):
        output = meanflow_loss(
            graded_network,
            state.network,
            latents,
            labels,
            record,
            loss_config,
            null_label=state.network.config.num_classes,
            global_num_rows=config.global_batch_size,
            # Checkpointing would compute the derivative again with the activations.
            separate_derivative=(in_bfloat16 and config.float32_derivative) or config.activation_checkpointing,
        )
    state.optimizer.zero_grad(set_to_none=True)
    (output.loss * gradient_scale).backward()
    gradient_norm = torch.nn.utils.clip_grad_norm_(
        state.network.parameters(), config.optimizer.max_gradient_norm or float("inf")
    )
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config.optimizer, state.step, config.num_steps)
    state.optimizer.step()
    update_emas(state)
    state.step += 1

    below = output.squared_error[record.rows_below]
    num_below = float(len(record.rows_below))
    counts = torch.tensor([len(labels) - num_below, num_below], device=latents.device)
    head = torch.zeros_like(output.squared_error) if output.squared_error_v is None else output.squared_error_v
    equal = output.squared_error.sum() - below.sum()
    sums = torch.stack([output.loss.detach(), equal, counts[0], below.sum(), counts[1], head.sum()])
    return StepMetrics(sums=sums, gradient_norm=gradient_norm)


def save_train_state(state: TrainState, config: TrainingConfig, folder: Path) -> None:
    """Writes a state's tensors as safetensors, its step and the configuration it came of: no pickled code."""
    save_file(_contiguous(state.network.state_dict()), folder / "network.safetensors")
    for decay, ema_network in state.ema_networks.items():
        save_file(_contiguous(ema_network.state_dict()), folder / f"ema_{decay}.safetensors")
    moments = {}
    for name, parameter in state.network.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            moments[f"{name}/{key}"] = value
    save_file(_contiguous(moments), folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": state.step, "config": asdict(config)}, indent=2) + "\n")


def load_train_state(state: TrainState, folder: Path) -> None:
    """Restores what `save_train_state` wrote into a state of the same configuration."""
    device = str(state.network.device)
    state.network.load_state_dict(load_file(folder / "network.safetensors", device))
    for decay, ema_network in state.ema_networks.items():
        ema_network.load_state_dict(load_file(folder / f"ema_{decay}.safetensors", device))
    moments = load_file(folder / "optimizer.safetensors")
    for name, parameter in state.network.named_parameters():
        if f"{name}/step" not in moments:  # saved before the first step
            continue
        state.optimizer.state[parameter] = {
            # Adam keeps its step counts on the CPU.
            key: moments[f"{name}/{key}"].to("cpu" if key == "step" else parameter.device)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    state.step = json.loads((folder / "state.json").read_text())["step"]


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
