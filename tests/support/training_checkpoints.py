"""What the checkpoints of a training with the debug preset hold."""

from pathlib import Path

import torch

from meanflow_core.checkpoint import load_train_state
from meanflow_core.presets import debug
from meanflow_core.training import build_train_state
from pipelines import storage
from pipelines.train import checkpoints


def last_checkpoint(location: str | Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The step of a run's last committed checkpoint, and everything in it by name, on any storage."""
    state = build_train_state(debug(), sample_size=8, in_channels=4, num_classes=10, device=torch.device("cpu"))
    with checkpoints.committed(*storage.open_storage(str(location))).latest.as_directory() as folder:
        load_train_state(state, Path(folder))
    found = {f"network/{name}": value for name, value in state.network.state_dict().items()}
    found |= {f"ema/{name}": value for name, value in state.ema_network.state_dict().items()}
    for name, parameter in state.network.named_parameters():
        found |= {f"optimizer/{name}/{key}": value for key, value in state.optimizer.state[parameter].items()}
    return state.step, found
