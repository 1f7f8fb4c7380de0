"""Training checkpoints: the whole state in safetensors and JSON, without pickled code.

Every process writes its own part: its shards of sharded tensors, and a share of the unsharded ones. Any number of processes,
sharded or not, can load the checkpoint.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from meanflow_core.config import RunConfig
from meanflow_core.formats import require_format_version
from meanflow_core.networks.interface import NetworkModel
from meanflow_core.training import TrainState

FORMAT_VERSION = 4
STATE_FILE = "state.json"
# A file is assembled in memory before it is written, so its size bounds the additional memory.
BYTES_PER_FILE = 2**30
_COUNTS = ("step", "num_updates", "num_skipped")
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def save_train_state(state: TrainState, config: RunConfig, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Writes a training state, its configuration and `extra` (JSON) into an existing folder.

    Collective if there is a process group: every process must call it, with the same folder or its own. The files
    of all processes together are the checkpoint; `extra` is taken from rank 0. Raises OSError if a file cannot be
    written, for example because the disk is full.
    """
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    tensors = _tensors(state, with_optimizers=state.num_updates > 0)
    with _plain_errors():
        writer = HuggingFaceStorageWriter(str(folder), _file_numbers(tensors), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
    files = {path.name: path.stat().st_size for path in folder.glob(f"shard-{rank + 1:05d}-*.safetensors")}
    if distributed.is_initialized():
        parts: list[dict[str, int]] = [{}] * distributed.get_world_size()
        distributed.all_gather_object(parts, files)
        files = {name: size for part in parts for name, size in part.items()}
    if rank == 0:
        content = {
            "format_version": FORMAT_VERSION,
            **{name: getattr(state, name) for name in _COUNTS},
            "config": config.as_dict(),
            "files": files,
            "extra": extra or {},
        }
        (folder / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n")


def load_train_state(state: TrainState, folder: Path) -> dict[str, Any]:
    """Restores a checkpoint into a state of the same configuration and returns its `extra`.

    Collective if there is a process group, which may have any size. Raises ValueError if a file is missing or truncated.
    """
    content = read_state_file(folder)
    state.step, state.num_updates, state.num_skipped = (content[name] for name in _COUNTS)
    with_optimizers = state.num_updates > 0
    optimizer_state = _optimizer_state(state) if with_optimizers else {}
    _load(_tensors(state, with_optimizers=False) | _only_tensors(optimizer_state), folder)
    if with_optimizers:
        set_optimizer_state_dict(state.network, state.optimizers, optimizer_state, options=_OPTIONS)
    return content["extra"]


def load_average(network: NetworkModel, decay: float, folder: Path) -> None:
    """Loads the moving average with this decay from a checkpoint. Raises ValueError as `load_train_state` does."""
    read_state_file(folder)
    _load(_named(f"ema_{decay}", network), folder)


def read_state_file(folder: Path) -> dict[str, Any]:
    """Reads and checks state.json: step, num_updates, num_skipped, config, files, extra.

    Raises ValueError if it has another format version, or if a file of the checkpoint is missing or truncated.
    """
    try:
        content = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a checkpoint: {error}") from error
    require_known_format(content, str(folder))
    if not isinstance(content, dict) or "files" not in content:
        raise ValueError(f"{folder} is not a checkpoint: {STATE_FILE} does not list its files")
    found = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    damage = describe_damage(content["files"], found)
    if damage is not None:
        raise ValueError(f"the checkpoint in {folder} is incomplete: {damage}")
    unexpected = sorted(set(found) - set(content["files"]))
    if unexpected:
        raise ValueError(f"the checkpoint in {folder} contains files of another checkpoint: {', '.join(unexpected)}")
    return content


def require_known_format(content: object, where: str) -> None:
    """Raises ValueError if state.json has another format version. content: the parsed JSON, possibly damaged."""
    if isinstance(content, dict):
        require_format_version(content.get("format_version"), FORMAT_VERSION, f"the checkpoint in {where}")


def describe_damage(expected: Mapping[str, int], found: Mapping[str, int]) -> str | None:
    """Describes the first file that is missing or has the wrong size; None if the checkpoint is complete.

    expected, found: {file name: bytes}, as listed in state.json and as found in the folder.
    """
    for name, size in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} bytes instead of {size}"
    return None


def _named(prefix: str, network: NetworkModel) -> dict[str, torch.Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in network.state_dict().items()}


def _tensors(state: TrainState, *, with_optimizers: bool) -> dict[str, torch.Tensor]:
    tensors = _named("network", state.network)
    for decay, ema_network in state.ema_networks.items():
        tensors |= _named(f"ema_{decay}", ema_network)
    tensors |= {f"buffer/{name}": tensor for name, tensor in state.buffers.items()}
    return tensors | (_only_tensors(_optimizer_state(state)) if with_optimizers else {})


def _optimizer_state(state: TrainState) -> dict[str, Any]:
    """{"state.PARAMETER.exp_avg": tensor, "param_groups.PARAMETER.lr": number, ...} of all optimisers."""
    return get_optimizer_state_dict(state.network, state.optimizers, options=_OPTIONS)


def _only_tensors(optimizer_state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"optimizer/{name}": value for name, value in optimizer_state.items() if isinstance(value, torch.Tensor)}


def _file_numbers(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """{tensor name: number of its file, from 1}, the same on every process."""
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
    """Replaces torch's collection of per-process failures by its first, as an OSError or ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # expected with a single process
            yield
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        kind = OSError if isinstance(first, OSError) else ValueError
        raise kind(f"process {rank}: {type(first).__name__}: {first}") from error
