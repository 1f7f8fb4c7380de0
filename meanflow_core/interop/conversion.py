"""Converts parameters of public checkpoints to this package's networks, with one function per source.

In this package t = 1 is noise, and velocities point from data to noise. If a source has other conventions, its
parameters are rewritten, so that the networks need no flags.

    # C channels, P patch side, N tokens, D width
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from meanflow_core.config import DiTConfig, ImprovedDiTConfig, TrainingConfig
from meanflow_core.networks.building import build_network
from meanflow_core.networks.dit import MeanFlowDiT, sine_cosine_positions
from meanflow_core.networks.dual import Dual
from meanflow_core.networks.interface import NetworkModel
from meanflow_core.networks.layers import FREQUENCY_EMBEDDING_SIZE, sinusoids
from meanflow_core.presets import PRESETS
from meanflow_core.presets.improved_meanflow import imf_network
from meanflow_core.presets.meanflow import dit_network

# The authors' Flax modules wrap every layer and nest the layers of a Sequential; our names are those of DiT and SiT.
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
# The authors' PyTorch port keeps the wrappers' names.
_IMF_TORCH_RENAMES = ((r"^net\.", ""), (r"\._flax_(linear|embedding)\.", "."))

# Checkpoints hold the moving average of the position embedding. The embedding is constant, but rounding changes its average
# by up to 1.7e-4 (measured at decay 0.9999 in float32). An embedding of a different layout differs by about 1.
POSITION_TOLERANCE = 1e-3
# Initialisation of an untrained step-size embedder: DiT's standard deviation, with a fixed seed.
STEP_SIZE_INIT, STEP_SIZE_SEED = 0.02, 0
DEFAULT_SAMPLE_SIZE = 32  # ImageNet 256x256 with an 8-fold VAE


def _rename(state: Mapping[str, torch.Tensor], renames: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    renamed: dict[str, torch.Tensor] = {}
    for source_name, value in state.items():
        name = source_name
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"two entries of the checkpoint, {source_name} and another, map to {name}")
        renamed[name] = value
    return renamed


def _without_lone_velocity_layer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drops the v head's last layer if the blocks of that head are missing, as in published files for sampling."""
    if any(name.startswith("v_heads.") for name in state):
        return state
    return {name: value for name, value in state.items() if not name.startswith("v_final_layer.")}


def from_official(parameters: Mapping[str, np.ndarray | torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts flat Flax parameters of Gsunshine/meanflow or Lyy-iiis/imeanflow.

    Their names are like "net/blocks/layers_0/attn/qkv/_flax_linear/kernel". Returns a float32 state dict for MeanFlowDiT
    or ImprovedMeanFlowDiT, without a v head if the file has none. Linear kernels (in, out) are transposed, and the patch
    convolution becomes OIHW; qkv is packed in the same order.
    """
    arrays = {}
    for path, value in parameters.items():
        array = np.asarray(value)
        if path.endswith("/kernel"):  # linear (in, out), convolution HWIO, or a norm (D,), which .T leaves as it is
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        arrays[path] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return _without_lone_velocity_layer(_rename(arrays, _OFFICIAL_RENAMES))


def from_imf_torch(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts parameters of Lyy-iiis/imeanflow's PyTorch port.

    Their names are like "net.shared_blocks.0.attn.q_proj._flax_linear.weight". Returns a float32 state dict for
    ImprovedMeanFlowDiT. The published files are for sampling and contain only the last layer of the v head, which is
    dropped.
    """
    renamed = _rename(state, _IMF_TORCH_RENAMES)
    return _without_lone_velocity_layer({name: value.float() for name, value in renamed.items()})


def from_sit(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts parameters of willisma/SiT: a velocity v = x - e with data at t = 1.

    Returns a float32 state dict for MeanFlowDiT whose u is -SiT(z, 1 - t) for any r: the first layer of the
    time embedder is rewritten to reverse time, and the last layer of the network is negated. The position embedding is
    checked against ours, then dropped. The predicted variance is dropped too: the second C of the 2C output channels of
    each position in a patch.
    Raises ValueError if the file is not a SiT checkpoint.
    """
    converted = _from_timm(state)
    hidden_size, channels, patch_size = _patch_sizes(converted)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if name in converted:
            converted[name] = -_without_variance(converted[name], channels, patch_size)
    first = "t_embedder.mlp.0.weight"
    if first in converted and converted[first].shape[1:] == (FREQUENCY_EMBEDDING_SIZE,):
        converted[first] = reverse_time(converted[first])
    return {**converted, **zero_step_size_embedder(hidden_size)}


def from_repa(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts parameters of sihyun-yu/REPA's SiT: a velocity whose time and sign follow our conventions.

    Returns a float32 state dict for MeanFlowDiT whose u does not depend on r. The position embedding is checked against
    ours, then dropped. The `projectors`, which only REPA's training uses, are dropped too.
    Raises ValueError if the file is not a REPA checkpoint.
    """
    converted = _from_timm(state, dropped="projectors.")
    hidden_size, _, _ = _patch_sizes(converted)
    return {**converted, **zero_step_size_embedder(hidden_size)}


def from_zhuyu_cs(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts parameters of zhuyu-cs/MeanFlow: SiT's names, plus an `r_embedder` of t - r (our h_embedder).

    Returns a float32 state dict for MeanFlowDiT. The position embedding is checked against ours and dropped. Note: that
    code decodes with sd-vae-ft-ema and, until it was corrected, with a scale of 0.18125 instead of 0.18215.
    """
    return _rename(_from_timm(state), ((r"^r_embedder\.", "h_embedder."),))


def _from_timm(state: Mapping[str, torch.Tensor], dropped: str | None = None) -> dict[str, torch.Tensor]:
    """Checks and drops the stored position embedding, and drops names that start with `dropped`.

    The other parameters already have our names. Raises ValueError if the file has an h_embedder or another position
    embedding than ours.
    """
    unexpected = [name for name in state if name.startswith("h_embedder.")]
    if unexpected:
        raise ValueError(f"the file is from another source: it has {', '.join(unexpected)}")
    _grid_size(state)
    kept = [name for name in state if name != "pos_embed" and not (dropped and name.startswith(dropped))]
    return {name: state[name].float() for name in kept}


def _grid_size(state: Mapping[str, torch.Tensor]) -> int | None:
    """Number of tokens per side, from the stored position embedding (1, N, D); None if there is none.

    Raises ValueError if it is not the embedding that our network computes.
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
        f"pos_embed must be the fixed sine-cosine embedding (1, N, {hidden_size}), the only one that the network supports, "
        f"but has shape {tuple(stored.shape)} or other values"
    )


def _without_variance(value: torch.Tensor, channels: int, patch_size: int) -> torch.Tensor:
    """Keeps the first C of the 2C channels of each position: last layer (P * P * 2C, ...) -> (P * P * C, ...)."""
    if value.shape[:1] != (2 * channels * patch_size**2,):
        return value
    return value.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)


def reverse_time(weight: torch.Tensor) -> torch.Tensor:
    """Rewrites a time embedder's first layer (D, 256) so that input t gives the former output for 1 - t; float32.

    For each frequency w of the embedding,
    cos((1 - t) w) = cos w cos(t w) + sin w sin(t w), and sin((1 - t) w) = sin w cos(t w) - cos w sin(t w).
    """
    embedding_of_one = sinusoids(torch.ones(1, 1, dtype=torch.float64))[0]  # cos w of all frequencies, then sin w
    cos, sin = embedding_of_one.chunk(2)
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    return torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1).float()


def zero_step_size_embedder(hidden_size: int) -> dict[str, torch.Tensor]:
    """An h_embedder that outputs 0 for every t - r. It can be trained, because only its last layer is 0."""
    generator = torch.Generator().manual_seed(STEP_SIZE_SEED)
    first = STEP_SIZE_INIT * torch.randn(hidden_size, FREQUENCY_EMBEDDING_SIZE, generator=generator)
    return {
        "h_embedder.mlp.0.weight": first,
        "h_embedder.mlp.0.bias": torch.zeros(hidden_size),
        "h_embedder.mlp.2.weight": torch.zeros(hidden_size, hidden_size),
        "h_embedder.mlp.2.bias": torch.zeros(hidden_size),
    }


@torch.no_grad()
def ignore_step_size(network: MeanFlowDiT) -> None:
    """Makes a network's output independent of t - r, in place; at t = r it is unchanged.

    For networks trained with flow matching, whose step-size embedder was only trained at t - r = 0. The last layer's
    weight becomes 0 and its bias the embedder's output at 0. The embedder can still be trained, like that of
    `zero_step_size_embedder`.
    """
    embedder = network.h_embedder
    output_at_zero = embedder(Dual(torch.zeros(1, device=network.device))).value[0]
    last = {name: value for name, value in embedder.named_parameters() if name.startswith("mlp.2.")}
    last["mlp.2.weight"].zero_()
    last["mlp.2.bias"].copy_(output_at_zero)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of public checkpoints."""

    convert: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    """Converts its parameters to a state dict of ours."""
    is_improved: bool = False
    """Whether its networks are improved MeanFlow's."""
    is_flow_matching: bool = False
    """Whether its networks predict instantaneous velocities only."""


SOURCES = {
    "official-meanflow": Source(convert=from_official),
    "official-imf": Source(convert=from_official, is_improved=True),
    "imf-torch": Source(convert=from_imf_torch, is_improved=True),
    "sit": Source(convert=from_sit, is_flow_matching=True),
    "repa": Source(convert=from_repa, is_flow_matching=True),
    "zhuyu-cs": Source(convert=from_zhuyu_cs),
}


def find_source(name: str) -> Source:
    """Looks up a source by name. Raises ValueError, with the known names, for an unknown one."""
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; known: {', '.join(SOURCES)}")
    return SOURCES[name]


def published_training(hidden_size: int, depth: int, *, is_improved: bool) -> TrainingConfig | None:
    """The first preset with a network of this kind, width and depth, if any."""
    kind = ImprovedDiTConfig if is_improved else DiTConfig
    for preset in PRESETS.values():
        config = preset()
        network = config.network
        if isinstance(network, kind) and (network.hidden_size, network.depth) == (hidden_size, depth):
            return config
    return None


def convert_checkpoint(
    source_name: str, state: Mapping[str, torch.Tensor], *, sample_size: int | None = None, num_heads: int | None = None
) -> NetworkModel:
    """Builds a float32 network from the parameters of a source. The size of the network follows from their shapes.

    sample_size: side of the latents, if the file has no position embedding; default: 32. num_heads: required if the
    size is not a published one. An improved MeanFlow network has a v head if the file has one.
    Raises ValueError for an unknown source, a file of another source, or parameters that are missing, unknown or of
    the wrong shape; the error lists all of them.
    """
    source = find_source(source_name)
    converted = source.convert(state)
    grid_size = _grid_size(state)
    if grid_size is not None:
        stored_size = grid_size * _patch_sizes(converted)[2]
        if sample_size not in (None, stored_size):
            raise ValueError(
                f"sample_size must be {stored_size}, the size of the stored position embedding, but got {sample_size}"
            )
        sample_size = stored_size
    config = _read_network_config(converted, num_heads, is_improved=source.is_improved)
    network = build_network(
        config,
        sample_size=DEFAULT_SAMPLE_SIZE if sample_size is None else sample_size,
        in_channels=_patch_sizes(converted)[1],
        num_classes=len(_find(converted, "y_embedder.embedding_table.weight", 2)) - 1,
    )
    if not _num_blocks(converted, "v_heads"):
        network = network.for_sampling()
    try:
        network.load_state_dict(converted)
    except RuntimeError as error:  # its message lists every name
        raise ValueError(f"the file does not match a network of source {source_name}: {error}") from error
    return network


def _find(state: Mapping[str, torch.Tensor], name: str, num_axes: int) -> torch.Tensor:
    if name not in state or state[name].dim() != num_axes:
        some = ", ".join(list(state)[:5])
        raise ValueError(
            f"the file is from another source: it has no {name} with {num_axes} axes, but {len(state)} other names "
            f"({some}, ...)"
        )
    return state[name]


def _patch_sizes(state: Mapping[str, torch.Tensor]) -> tuple[int, int, int]:
    """D, C and P."""
    hidden_size, channels, patch_size, _ = _find(state, "x_embedder.proj.weight", 4).shape
    return hidden_size, channels, patch_size


def _num_blocks(state: Mapping[str, torch.Tensor], group: str) -> int:
    numbers = [int(match[1]) for name in state if (match := re.match(rf"{group}\.(\d+)\.", name))]
    return 1 + max(numbers, default=-1)


def _read_network_config(
    state: Mapping[str, torch.Tensor], num_heads: int | None, *, is_improved: bool
) -> DiTConfig | ImprovedDiTConfig:
    hidden_size, _, patch_size = _patch_sizes(state)
    head_depth = _num_blocks(state, "u_heads") if is_improved else 0
    depth = _num_blocks(state, "shared_blocks" if is_improved else "blocks") + head_depth
    if depth == 0:
        raise ValueError(f"the file is from another source: no transformer blocks among its {len(state)} names")
    base: DiTConfig | ImprovedDiTConfig
    if is_improved:
        base, mlp_first_layer = replace(imf_network("B"), depth=depth, aux_head_depth=head_depth), ".mlp.w1.weight"
    else:
        base, mlp_first_layer = replace(dit_network("B", 2), depth=depth), ".mlp.fc1.weight"
    published = published_training(hidden_size, depth, is_improved=is_improved)
    if num_heads is None:
        if published is None:
            raise ValueError(
                f"no published network has width {hidden_size} and depth {depth}, and the file does not contain the number "
                f"of attention heads; pass num_heads"
            )
        assert isinstance(published.network, DiTConfig | ImprovedDiTConfig), "published_training looks for these"
        num_heads = published.network.num_heads
    mlp_ratio = base.mlp_ratio
    mlp_widths = {len(value) for name, value in state.items() if name.endswith(mlp_first_layer)}
    if len(mlp_widths) == 1 and mlp_widths != {int(hidden_size * mlp_ratio)}:
        mlp_ratio = mlp_widths.pop() / hidden_size
    return replace(
        base,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
    )
