"""Public checkpoints -> our parameters: one function per source, the network, and reading files without running them.

Where a source has other conventions its values are rewritten, so that the network is ours, without flags: t = 1 is
noise, and velocities point from data to noise. Files are opened for their tensors alone: no code in them is run.

    # C channels, P patch side, N tokens, D width
"""

import math
import mmap
import pickle
import re
import types
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgpack  # type: ignore[import-untyped]
import numpy as np
import safetensors.torch
import torch

from meanflow_core.config import NetworkConfig, TrainingConfig
from meanflow_core.dual import Dual
from meanflow_core.imf_transformer import ImprovedMeanFlowDiT
from meanflow_core.networks import AnyNetwork, build_network, without_velocity_head
from meanflow_core.presets import PRESETS, dit_network, imf_network
from meanflow_core.transformer import FREQUENCY_EMBEDDING_SIZE, MeanFlowDiT, sine_cosine_positions, sinusoids

T = TypeVar("T")

# The authors' Flax modules wrap every layer, and nest a Sequential's layers; ours carry DiT's and SiT's names.
_OFFICIAL_RENAMES = (
    (r"^net/", ""),
    (r"/_flax_linear", ""),
    (r"/_flax_embedding/embedding$", "/weight"),
    (r"blocks/layers_(\d+)", r"blocks/\1"),
    (r"(shared_blocks|u_heads|v_heads)_(\d+)", r"\1/\2"),
    (r"/layers_(\d+)", r"/\1"),
    (r"/kernel$", "/weight"),
    (r"/", "."),
)
# Their PyTorch port keeps the wrappers' names.
_IMF_TORCH_RENAMES = ((r"^net\.", ""), (r"\._flax_(linear|embedding)\.", "."))

# Stored position embeddings went through the moving average, whose rounding moves a constant by up to 1.7e-4 (measured
# at decay 0.9999 in float32); another layout differs by about 1.
POSITION_TOLERANCE = 1e-3
# A step-size embedder that has still to learn: DiT's deviation of embedder weights, the same draws every time.
STEP_SIZE_INIT, STEP_SIZE_SEED = 0.02, 0
DEFAULT_SAMPLE_SIZE = 32  # ImageNet 256x256 behind an 8-fold VAE

# What training states call the moving average and the parameters: torch scripts', and Flax's.
TRAINING_STATES = (("ema", "model"), ("ema_params", "params"))
# Flax's serialisation: array extension types, and how arrays above 1 GiB are cut.
_FLAX_ARRAY, _FLAX_SCALAR = 1, 3
_FLAX_CHUNKED = "__msgpack_chunked_array__"


def _rename(state: Mapping[str, T], renames: tuple[tuple[str, str], ...]) -> dict[str, T]:
    renamed: dict[str, T] = {}
    for source_name, value in state.items():
        name = source_name
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"two entries of the checkpoint, one of them {source_name}, would both be {name}")
        renamed[name] = value
    return renamed


def _from_flax(parameters: Mapping[str, np.ndarray | torch.Tensor]) -> dict[str, torch.Tensor]:
    arrays = {}
    for path, value in parameters.items():
        array = np.asarray(value)
        if path.endswith("/kernel"):  # linear (in, out), convolution HWIO; a norm's weight has one axis
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        arrays[path] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return _rename(arrays, _OFFICIAL_RENAMES)


def _without_lone_velocity_layer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the v head's last layer where the blocks before it are not there: files for sampling keep it."""
    if any(name.startswith("v_heads.") for name in state):
        return state
    return {name: value for name, value in state.items() if not name.startswith("v_final_layer.")}


def from_official_meanflow(parameters: Mapping[str, np.ndarray | torch.Tensor]) -> dict[str, torch.Tensor]:
    """Flat Flax parameters of Gsunshine/meanflow ("net/blocks/layers_0/attn/qkv/_flax_linear/kernel": (in, out)).

    Returns a state dict for MeanFlowDiT, float32: linear kernels transposed, the patch convolution from HWIO to OIHW;
    qkv is packed alike on both sides. What is missing or unknown stays so; `convert_checkpoint` lists it.
    """
    return _from_flax(parameters)


def from_official_imf(parameters: Mapping[str, np.ndarray | torch.Tensor]) -> dict[str, torch.Tensor]:
    """Flat Flax parameters of Lyy-iiis/imeanflow ("net/shared_blocks_0/attn/q_proj/_flax_linear/kernel": (in, out)).

    Returns a state dict for ImprovedMeanFlowDiT, float32, without a v head where the file has none.
    """
    return _without_lone_velocity_layer(_from_flax(parameters))


def from_imf_torch(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of Lyy-iiis/imeanflow's PyTorch port ("net.shared_blocks.0.attn.q_proj._flax_linear.weight").

    Returns a state dict for ImprovedMeanFlowDiT, float32. The published files are for sampling: they have no v head, but
    its last layer, which is dropped.
    """
    renamed = _rename(state, _IMF_TORCH_RENAMES)
    return _without_lone_velocity_layer({name: value.float() for name, value in renamed.items()})


def from_sit(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of willisma/SiT, a velocity in which t = 1 is data, v = x - e, as ours in which t = 1 is noise.

    Returns a state dict for MeanFlowDiT, float32, that answers -SiT(z, 1 - t) whatever r is: time runs the other way by
    the first layer of its embedder, the sign by the last layer of all. Dropped are the position embedding, after a look
    whether it is ours, and the predicted variance, the second C channels of each position in a patch.
    Raises ValueError for a file of another kind.
    """
    converted = _from_timm(state)
    hidden_size, channels, patch_size = _patch_sizes(converted)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if name in converted:
            converted[name] = -_without_variance(converted[name], channels, patch_size)
    first = "t_embedder.mlp.0.weight"
    if first in converted and converted[first].shape[1:] == (FREQUENCY_EMBEDDING_SIZE,):
        converted[first] = reverse_time(converted[first])
    return {**converted, **silent_step_size_embedder(hidden_size)}


def from_repa(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of sihyun-yu/REPA's SiT: a velocity with our times and sign.

    Returns a state dict for MeanFlowDiT, float32, that does not depend on r yet. Dropped are the position embedding,
    after a look whether it is ours, and `projectors`, which only REPA's training needs.
    Raises ValueError for a file of another kind.
    """
    converted = _from_timm(state, dropped="projectors.")
    hidden_size, _, _ = _patch_sizes(converted)
    return {**converted, **silent_step_size_embedder(hidden_size)}


def from_zhuyu_cs(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of zhuyu-cs/MeanFlow: SiT's names, and an `r_embedder` that is fed t - r, our h_embedder.

    Returns a state dict for MeanFlowDiT, float32. Dropped is the position embedding, after a look whether it is ours.
    The code there decodes by sd-vae-ft-ema and, until it was corrected, by a scale of 0.18125 instead of 0.18215.
    """
    return _rename(_from_timm(state), ((r"^r_embedder\.", "h_embedder."),))


def _from_timm(state: Mapping[str, torch.Tensor], dropped: str | None = None) -> dict[str, torch.Tensor]:
    """SiT's names are ours, except that SiT stores its position embedding and has no h_embedder."""
    foreign = [name for name in state if name.startswith("h_embedder.")]
    if foreign:
        raise ValueError(f"{len(foreign)} unknown: {', '.join(foreign)}; this source's files have no h_embedder")
    _grid_size(state)
    kept = [name for name in state if name != "pos_embed" and not (dropped and name.startswith(dropped))]
    return {name: state[name].float() for name in kept}


def _grid_size(state: Mapping[str, torch.Tensor]) -> int | None:
    """Tokens on a side by the stored position embedding, (1, N, D); None where none is stored.

    Raises ValueError where it is not the one that our network computes.
    """
    if "pos_embed" not in state:
        return None
    hidden_size, _, _ = _patch_sizes(state)
    stored = state["pos_embed"].float()
    side = math.isqrt(stored.numel() // hidden_size)
    if stored.shape == (1, side**2, hidden_size) and hidden_size % 4 == 0:
        ours = sine_cosine_positions(hidden_size, side)
        if torch.allclose(stored[0], ours, rtol=0.0, atol=POSITION_TOLERANCE):
            return side
    raise ValueError(
        f"pos_embed {tuple(stored.shape)} is not the fixed sine-cosine embedding (1, N, {hidden_size}) of the network "
        f"here, which has no place for another"
    )


def _without_variance(value: torch.Tensor, channels: int, patch_size: int) -> torch.Tensor:
    """The last layer's rows (P * P * 2C, ...) -> (P * P * C, ...): each position's first C."""
    if value.shape[:1] != (2 * channels * patch_size**2,):
        return value
    return value.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)


def reverse_time(weight: torch.Tensor) -> torch.Tensor:
    """A time embedder's first layer, (D, 256), that was fed 1 - t -> the one that says the same when fed t, float32.

    cos((1 - t) w) = cos w cos(t w) + sin w sin(t w), and sin((1 - t) w) = sin w cos(t w) - cos w sin(t w).
    """
    cos, sin = sinusoids(torch.ones(1, 1, dtype=torch.float64))[0].chunk(2)  # of every w, by the network's own rule
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    return torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1).float()


def silent_step_size_embedder(hidden_size: int) -> dict[str, torch.Tensor]:
    """An h_embedder that says 0 for every t - r, and can learn to say more: its last layer is 0, its first is not."""
    generator = torch.Generator().manual_seed(STEP_SIZE_SEED)
    first = STEP_SIZE_INIT * torch.randn(hidden_size, FREQUENCY_EMBEDDING_SIZE, generator=generator)
    return {
        "h_embedder.mlp.0.weight": first,
        "h_embedder.mlp.0.bias": torch.zeros(hidden_size),
        "h_embedder.mlp.2.weight": torch.zeros(hidden_size, hidden_size),
        "h_embedder.mlp.2.bias": torch.zeros(hidden_size),
    }


@torch.no_grad()
def silence_step_size(network: MeanFlowDiT) -> None:
    """Makes a network say at every t - r what it says at t = r, where it says the same as before.

    For one that learnt flow matching, whose step-size embedder has seen nothing but 0. Its last layer becomes its answer
    there, and can learn to say more, as in `silent_step_size_embedder`.
    """
    embedder = network.h_embedder
    told_zero = embedder(Dual(torch.zeros(1, device=network.device))).value[0]
    last = {name: value for name, value in embedder.named_parameters() if name.startswith("mlp.2.")}
    last["mlp.2.weight"].zero_()
    last["mlp.2.bias"].copy_(told_zero)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where public checkpoints come from."""

    convert: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    """Its parameters -> ours."""
    architecture: Literal["dit", "imf_dit"]
    """The network that they are of."""
    is_flow_matching: bool = False
    """Its networks learnt velocities alone."""


SOURCES = {
    "official-meanflow": Source(convert=from_official_meanflow, architecture="dit"),
    "official-imf": Source(convert=from_official_imf, architecture="imf_dit"),
    "imf-torch": Source(convert=from_imf_torch, architecture="imf_dit"),
    "sit": Source(convert=from_sit, architecture="dit", is_flow_matching=True),
    "repa": Source(convert=from_repa, architecture="dit", is_flow_matching=True),
    "zhuyu-cs": Source(convert=from_zhuyu_cs, architecture="dit"),
}


def find_source(name: str) -> Source:
    """The source of a name. Raises ValueError for an unknown one."""
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; known: {', '.join(SOURCES)}")
    return SOURCES[name]


def published_training(architecture: str, hidden_size: int, depth: int) -> TrainingConfig | None:
    """The first preset with a network of this kind, width and depth; None where there is none."""
    for preset in PRESETS.values():
        config = preset()
        if (config.network.architecture, config.network.hidden_size, config.network.depth) == (
            architecture, hidden_size, depth,
        ):  # fmt: skip
            return config
    return None


def convert_checkpoint(
    source_name: str, state: Mapping[str, torch.Tensor], *, sample_size: int | None = None, num_heads: int | None = None
) -> AnyNetwork:
    """Makes the network of a source's parameters, in float32, its size read from their shapes.

    sample_size: side of the latents, where no stored position embedding tells it; 32 unless given. num_heads: where
    the size is none of the published ones. An improved MeanFlow's network has a v head where the file has one.
    Raises ValueError for an unknown source, for a file of another kind, and for one whose names or shapes differ from
    the network's: it lists all of them.
    """
    source = find_source(source_name)
    converted = source.convert(state)
    grid_size = _grid_size(state)
    if grid_size is not None:
        stored_size = grid_size * _patch_sizes(converted)[2]
        if sample_size not in (None, stored_size):
            raise ValueError(f"the stored positions are for latents of side {stored_size}, but asked was {sample_size}")
        sample_size = stored_size
    config = _read_network_config(converted, source.architecture, num_heads)
    network = build_network(
        config,
        sample_size=DEFAULT_SAMPLE_SIZE if sample_size is None else sample_size,
        in_channels=_patch_sizes(converted)[1],
        num_classes=len(_find(converted, "y_embedder.embedding_table.weight", 2)) - 1,
    )
    if isinstance(network, ImprovedMeanFlowDiT) and not _num_blocks(converted, "v_heads"):
        network = without_velocity_head(network)
    _require_fit(source_name, converted, network)
    network.load_state_dict(converted)
    return network


def _require_fit(source_name: str, converted: Mapping[str, torch.Tensor], network: AnyNetwork) -> None:
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in converted.items()}
    differences = {
        "missing": [name for name in wanted if name not in found],
        "unknown": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} {found[name]} instead of {wanted[name]}"
            for name in wanted
            if name in found and found[name] != wanted[name]
        ],
    }
    listing = "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in differences.items() if names)
    if listing:
        raise ValueError(f"the file does not fit a network of source {source_name}: {listing}")


def _find(state: Mapping[str, torch.Tensor], name: str, num_axes: int) -> torch.Tensor:
    if name not in state or state[name].dim() != num_axes:
        some = ", ".join(list(state)[:5])
        raise ValueError(
            f"the file is of another kind: no {name} of {num_axes} axes among its {len(state)} names ({some}, ...)"
        )
    return state[name]


def _patch_sizes(state: Mapping[str, torch.Tensor]) -> tuple[int, int, int]:
    """D, C and P."""
    hidden_size, channels, patch_size, _ = _find(state, "x_embedder.proj.weight", 4).shape
    return hidden_size, channels, patch_size


def _num_blocks(state: Mapping[str, torch.Tensor], group: str) -> int:
    numbers = [int(match[1]) for name in state if (match := re.match(rf"{group}\.(\d+)\.", name))]
    return 1 + max(numbers, default=-1)


def _read_network_config(state: Mapping[str, torch.Tensor], architecture: str, num_heads: int | None) -> NetworkConfig:
    hidden_size, _, patch_size = _patch_sizes(state)
    if architecture == "imf_dit":
        kind, first_layer = imf_network("B"), ".mlp.w1.weight"
        aux_head_depth = _num_blocks(state, "u_heads")
        depth = _num_blocks(state, "shared_blocks") + aux_head_depth
    else:
        kind, first_layer = dit_network("B", 2), ".mlp.fc1.weight"
        aux_head_depth, depth = kind.aux_head_depth, _num_blocks(state, "blocks")
    if depth == 0:
        raise ValueError(f"the file is of another kind: no transformer blocks among its {len(state)} names")
    published = published_training(architecture, hidden_size, depth)
    if num_heads is None:
        if published is None:
            raise ValueError(
                f"a network of width {hidden_size} and depth {depth} is none of the published, and the number of its "
                f"attention heads stands nowhere in the file; give num_heads"
            )
        num_heads = published.network.num_heads
    mlp_ratio = kind.mlp_ratio
    widths = {len(value) for name, value in state.items() if name.endswith(first_layer)}
    if len(widths) == 1 and widths != {int(hidden_size * mlp_ratio)}:
        mlp_ratio = widths.pop() / hidden_size
    return replace(
        kind,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        aux_head_depth=aux_head_depth,
    )


def read_checkpoint(path: Path, *, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """Reads a file's parameters by their names in it, on the CPU; no code in the file is run.

    By its ending: .npz of flat Flax paths, those after "param:" where there are such; .safetensors; .pt, .pth, .ckpt
    and .bin of torch.save; all others as Flax's msgpack. use_ema: where the file is a whole training state, its moving
    average, else what the optimiser had. Raises ValueError, naming the file, where it cannot be read or holds more than
    tensors, numbers and names.
    """
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors} | dict.fromkeys(
        (".pt", ".pth", ".ckpt", ".bin"), _read_torch
    )
    if path.is_dir() or path.suffix == ".zip":
        raise ValueError(
            f"{path} is a folder or an archive, but a file is wanted; write an Orbax checkpoint's parameters as .npz first, "
            f'by numpy.savez of {{"net/...": array}}'
        )
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        flat = _flatten(_choose(readers.get(path.suffix, _read_flax)(path), use_ema))
        return {name: _as_tensor(name, value) for name, value in flat.items()}
    except pickle.UnpicklingError as error:
        # Not torch's own words, which tell how to open the file all the same.
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise ValueError(f"cannot read {path}: it is damaged, or not of torch.save's making") from error
        raise ValueError(
            f"{path} holds more than tensors, numbers and names: {found[1]}, which could run code when opened; it was not "
            f"opened"
        ) from error
    except Exception as error:  # a damaged file makes its reader raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read {path}: {reason}") from error


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        prefix = "param:" if any(name.startswith("param:") for name in archive.files) else ""
        names = [name for name in archive.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): archive[name] for name in names}


def _read_safetensors(path: Path) -> dict[str, Any]:
    return safetensors.torch.load_file(path)


def _read_torch(path: Path) -> dict[str, Any]:
    # Training scripts store their argparse.Namespace beside the parameters; here it becomes a plain record.
    with torch.serialization.safe_globals([(types.SimpleNamespace, "argparse.Namespace")]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _read_flax(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return msgpack.unpackb(content, ext_hook=_unpack_flax_array, raw=False)


def _unpack_flax_array(code: int, content: bytes) -> np.ndarray | None:
    if code not in (_FLAX_ARRAY, _FLAX_SCALAR):
        return None
    shape, dtype, values = msgpack.unpackb(content, raw=True)
    if dtype == b"bfloat16":  # numpy has none; they are the upper halves of float32
        return (np.frombuffer(values, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(values, np.dtype(dtype.decode())).reshape(shape)


def _choose(tree: object, use_ema: bool) -> dict[str, Any]:
    """The wanted part of a training state; all of what is parameters alone."""
    if not isinstance(tree, dict):
        raise ValueError(f"named parameters are wanted, but it holds a {type(tree).__name__}")
    for average, plain in TRAINING_STATES:
        if average in tree or plain in tree:
            wanted, other = (average, plain) if use_ema else (plain, average)
            if wanted not in tree:
                raise ValueError(f"it has {other!r} and no {wanted!r}; ask for the other by use_ema")
            return tree[wanted]
    if not use_ema:
        raise ValueError("it holds one set of parameters, not a training state to choose from; leave use_ema as it is")
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
        raise ValueError(f"{name} is a {type(value).__name__}, but a tensor is wanted")
    return value.detach().float()
