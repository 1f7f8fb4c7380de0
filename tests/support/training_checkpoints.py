"""Reads the tensors of a training run's last checkpoint, compares tensors, and trains without a cluster."""

from dataclasses import dataclass
from pathlib import Path

import torch

from meanflow_core.checkpoint import load_train_state
from meanflow_core.config import TrainingConfig
from meanflow_core.latents import LatentNormalization
from meanflow_core.presets.demo import debug
from meanflow_core.training import TrainState, build_train_state, train_step
from pipelines import storage
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.cache import open_latents
from pipelines.train.batches import BatchSource
from pipelines.training import checkpoints

CPU = torch.device("cpu")


def tensors_of(state: TrainState) -> dict[str, torch.Tensor]:
    """Parameters, EMA parameters and optimizer state, by name."""
    tensors = {f"network/{name}": value for name, value in state.network.state_dict().items()}
    for decay, network in state.ema_networks.items():
        tensors |= {f"ema_{decay}/{name}": value for name, value in network.state_dict().items()}
    for name, parameter in state.network.named_parameters():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in state.optimizers[0].state[parameter].items()}
    return tensors


def last_checkpoint(location: str | Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Step and tensors of the last committed checkpoint of a debug-preset run; `location` is a path or URI."""
    state = build_train_state(debug(), sample_size=8, in_channels=4, num_classes=10, device=CPU)
    with checkpoints.committed(*storage.open_storage(str(location))).latest.as_directory() as folder:
        load_train_state(state, Path(folder))
    return state.step, tensors_of(state)


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not bitwise equal or that only one side contains."""
    return [
        name
        for name in sorted({*ours, *theirs})
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]


@dataclass(frozen=True)
class LocalTraining:
    """Result of a training run in this process, without Ray."""

    state: TrainState
    """The state after the last step."""
    gradient_norms: list[float]
    """One per step."""


def train_in_this_process(latents: Path, config: TrainingConfig, num_threads: int | None = None) -> LocalTraining:
    """Runs all training steps of `config` on a dataset of 10 classes."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads or threads_before)
    dataset = open_latents(str(latents), "none", mirrored=config.mirror)
    state = build_train_state(config, sample_size=8, in_channels=4, num_classes=10, device=CPU)
    source = BatchSource(dataset, config, rank=0, world_size=1, device=CPU)
    normalization = LatentNormalization.from_vae_config(open_autoencoder(str(latents)).config)
    norms = [
        float(train_step(state, state.network, source.batches(step), normalization, config).gradient_norm)
        for step in range(config.num_steps)
    ]
    torch.set_num_threads(threads_before)
    return LocalTraining(state, norms)
