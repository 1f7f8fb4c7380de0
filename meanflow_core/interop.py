"""Public checkpoints -> our parameters, one function per source."""

import re
from collections.abc import Mapping

import numpy as np
import torch

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


def _from_flax(parameters: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    state = {}
    for path, value in parameters.items():
        name = path
        for pattern, replacement in _OFFICIAL_RENAMES:
            name = re.sub(pattern, replacement, name)
        array = np.asarray(value)
        if path.endswith("/kernel"):  # linear (in, out), convolution HWIO; a norm's weight has one axis
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        state[name] = torch.from_numpy(np.ascontiguousarray(array))
    return state


def from_official_meanflow(parameters: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Flat Flax parameters of Gsunshine/meanflow ("net/blocks/layers_0/attn/qkv/_flax_linear/kernel": (in, out)).

    Returns a state dict for MeanFlowDiT: linear kernels transposed, the patch convolution from HWIO to OIHW; qkv is
    packed alike on both sides. Load it with strict=True, which lists missing and unknown names.
    """
    return _from_flax(parameters)


def from_official_imf(parameters: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Flat Flax parameters of Lyy-iiis/imeanflow ("net/shared_blocks_0/attn/q_proj/_flax_linear/kernel": (in, out)).

    Returns a state dict for ImprovedMeanFlowDiT, without a v head where the file has none.
    """
    return _from_flax(parameters)
