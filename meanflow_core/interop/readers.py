"""Reads parameters from checkpoint files without running any code that they contain."""

import mmap
import pickle
import re
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import safetensors.torch
import torch

# Keys of the moving average and the parameters in training states, as saved by torch scripts and by Flax.
TRAINING_STATES = (("ema", "model"), ("ema_params", "params"))
# Flax's msgpack extension types for arrays and scalars, and its marker for arrays above 1 GiB, which it splits.
_FLAX_ARRAY, _FLAX_SCALAR = 1, 3
_FLAX_CHUNKED = "__msgpack_chunked_array__"


def read_checkpoint(path: Path, *, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """Reads {name in the file: parameter} from a checkpoint, in float32 on the CPU.

    The suffix determines the format: .npz holds arrays named by Flax paths; .safetensors; .pt, .pth, .ckpt and .bin are
    written by torch.save; any other suffix is read as Flax's msgpack. If any name in an .npz file starts with "param:",
    only such names are read, without this prefix.

    use_ema: from a training state, read the moving average (True) or the parameters (False).
    Raises ValueError if the file cannot be read or contains anything but tensors, numbers and names.
    """
    readers = {".npz": _read_npz, ".safetensors": safetensors.torch.load_file} | dict.fromkeys(
        (".pt", ".pth", ".ckpt", ".bin"), _read_torch
    )
    if path.is_dir() or path.suffix == ".zip":
        raise ValueError(
            f"{path} must be a file, but is a folder or an archive; save an Orbax checkpoint's parameters as .npz first, "
            f'with numpy.savez of {{"net/...": array}}'
        )
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        flat = _flatten(_choose(readers.get(path.suffix, _read_flax)(path), use_ema))
        return {name: _as_tensor(name, value) for name, value in flat.items()}
    except pickle.UnpicklingError as error:
        # torch's own message is left out, because it explains how to load the file unsafely.
        match = re.search(r"GLOBAL (\S+)", str(error))
        if match is None:
            raise ValueError(f"cannot read {path}: it is damaged, or was not written by torch.save") from error
        raise ValueError(
            f"{path} contains {match[1]}, which could run code when opened; only tensors, numbers and names are allowed"
        ) from error
    except Exception as error:  # readers raise any kind of error for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read {path}: {reason}") from error


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        prefix = "param:" if any(name.startswith("param:") for name in archive.files) else ""
        names = [name for name in archive.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): archive[name] for name in names}


def _read_torch(path: Path) -> dict[str, Any]:
    # Training scripts save their argparse.Namespace with the parameters; read it as a plain namespace.
    with torch.serialization.safe_globals([(types.SimpleNamespace, "argparse.Namespace")]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _read_flax(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return msgpack.unpackb(content, ext_hook=_unpack_flax_array, raw=False)


def _unpack_flax_array(code: int, content: bytes) -> np.ndarray | None:
    if code not in (_FLAX_ARRAY, _FLAX_SCALAR):
        return None
    shape, dtype, values = msgpack.unpackb(content, raw=True)
    if dtype == b"bfloat16":  # numpy has no bfloat16; its values are the upper halves of float32
        return (np.frombuffer(values, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(values, np.dtype(dtype.decode())).reshape(shape)


def _choose(tree: object, use_ema: bool) -> dict[str, Any]:
    """Selects the moving average or the parameters of a training state. Returns any other file unchanged."""
    if not isinstance(tree, dict):
        raise ValueError(f"it must contain named parameters, but contains a {type(tree).__name__}")
    for average, plain in TRAINING_STATES:
        if average in tree or plain in tree:
            key, other = (average, plain) if use_ema else (plain, average)
            if key not in tree:
                raise ValueError(f"it has {other!r} but no {key!r}; choose the other one with use_ema")
            return tree[key]
    if not use_ema:
        raise ValueError("it contains one set of parameters, not a training state; leave use_ema at its default")
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and _FLAX_CHUNKED in value:
            chunks, shape = ([value[part][str(i)] for i in range(len(value[part]))] for part in ("chunks", "shape"))
            flat[path] = np.concatenate(chunks).reshape(shape)
        elif isinstance(value, dict):
            flat.update(_flatten(value, f"{path}/"))
        else:
            flat[path] = value
    return flat


def _as_tensor(name: str, value: object) -> torch.Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, dtype=np.float32))
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, but is a {type(value).__name__}")
    return value.detach().float()
