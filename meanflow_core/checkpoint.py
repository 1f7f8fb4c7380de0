"""A training's whole state as files: safetensors and JSON, no pickled code, for any number of processes.

Every process writes its part, of sharded tensors its shards and of whole ones a share of them all; any other number of
processes reads the same values back, sharded or not.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from meanflow_core.config import TrainingConfig
from meanflow_core.formats import require_known_format
from meanflow_core.networks import AnyNetwork
from meanflow_core.training import TrainState

FORMAT_VERSION = 1  # 0 had no number
STATE_FILE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, as torch names them
# A file is made up in memory before it is written: as much more than the state itself.
BYTES_PER_FILE = 2**30


def save_train_state(
    state: TrainState, config: TrainingConfig, folder: Path, extra: dict[str, Any] | None = None
) -> None:
    """Writes a state, the configuration it came of, and `extra` (JSON) into an existing folder.

    With a process group it is collective: every process calls it, with a folder of its own or one for several; their
    files together are the checkpoint, and `extra` is the first process's. Raises OSError where a file cannot be
    written, as on a full disk.
    """
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    tensors = _tensors(state, with_moments=_num_updates(state) > 0)
    with _plain_errors():
        writer = HuggingFaceStorageWriter(str(folder), _file_numbers(tensors), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
    own = {path.name: path.stat().st_size for path in folder.glob(f"shard-{rank + 1:05d}-*.safetensors")}
    files = own
    if distributed.is_initialized():
        parts: list[dict[str, int]] = [{}] * distributed.get_world_size()
        distributed.all_gather_object(parts, own)
        files = {name: size for part in parts for name, size in part.items()}
    if rank == 0:
        content = {
            "format_version": FORMAT_VERSION,
            "step": state.step,
            "num_skipped": state.num_skipped,
            "config": asdict(config),
            "files": files,
            "extra": extra or {},
        }
        (folder / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n")


def load_train_state(state: TrainState, folder: Path) -> dict[str, Any]:
    """Restores what `save_train_state` wrote into a state of the same configuration; returns its `extra`.

    Collective as the saving is, for any number of processes. Raises ValueError where a file is missing or torn.
    """
    content = read_state_file(folder)
    state.step, state.num_skipped = content["step"], content["num_skipped"]
    num_updates = _num_updates(state)
    if num_updates > 0:
        for parameter in state.network.parameters():
            state.optimizer.state[parameter] = {
                "step": torch.tensor(float(num_updates)),  # Adam keeps its counts on the CPU
                **{name: torch.zeros_like(parameter) for name in MOMENTS},
            }
    _load(_tensors(state, with_moments=num_updates > 0), folder)
    return content["extra"]


def load_average(network: AnyNetwork, decay: float, folder: Path) -> None:
    """Gives a network the moving average of a decay out of a checkpoint. Raises ValueError as `load_train_state` does."""
    read_state_file(folder)
    _load(_named(f"ema_{decay}", network), folder)


def read_state_file(folder: Path) -> dict[str, Any]:
    """The state's JSON: step, num_skipped, config, files, extra.

    Raises ValueError where a file is missing or torn, or a later release wrote it.
    """
    try:
        content = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no checkpoint: {error}") from error
    require_known_state(content, str(folder))
    if not isinstance(content, dict) or "files" not in content:
        raise ValueError(f"{folder} is no checkpoint: {STATE_FILE} says nothing of its files")
    found = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    damage = damage_of(content["files"], found)
    if damage is not None:
        raise ValueError(f"the checkpoint in {folder} is torn: {damage}")
    strangers = sorted(set(found) - set(content["files"]))
    if strangers:
        raise ValueError(f"the checkpoint in {folder} is a mixture: {', '.join(strangers)} is of another one")
    return content


def require_known_state(content: Any, where: str) -> None:
    """Raises ValueError where a state's JSON is of a format that a later release wrote. content: as it was parsed."""
    version = content.get("format_version", 0) if isinstance(content, dict) else 0
    require_known_format(version, FORMAT_VERSION, f"the checkpoint in {where}")


def damage_of(wanted: Mapping[str, int], found: Mapping[str, int]) -> str | None:
    """What is wrong with a checkpoint's files, {name: bytes} as its state has them and as they lie there; None if nothing."""
    for name, size in wanted.items():
        if found.get(name) != size:
            is_what = f"has {found[name]} bytes" if name in found else "is missing"
            return f"{name} {is_what}, wanted {size} bytes"
    return None


def _num_updates(state: TrainState) -> int:
    return state.step - state.num_skipped


def _named(prefix: str, network: AnyNetwork) -> dict[str, torch.Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in network.state_dict().items()}


def _tensors(state: TrainState, *, with_moments: bool) -> dict[str, torch.Tensor]:
    tensors = _named("network", state.network)
    for decay, ema_network in state.ema_networks.items():
        tensors |= _named(f"ema_{decay}", ema_network)
    if with_moments:
        for name, parameter in state.network.named_parameters():
            for moment in MOMENTS:
                tensors[f"optimizer/{name}/{moment}"] = state.optimizer.state[parameter][moment]
    return tensors


def _file_numbers(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """{name: number of the file, from 1, that each process writes its part of the tensor to}, alike in all of them."""
    numbers, size = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + size // BYTES_PER_FILE
        size += tensor.numel() * tensor.element_size()
    return numbers


def _load(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    with _plain_errors():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What went wrong in any process, as OSError or ValueError instead of torch's collection of tracebacks."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is one process
            yield
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        kind = OSError if isinstance(first, OSError) else ValueError
        raise kind(f"process {rank}: {type(first).__name__}: {first}") from error
