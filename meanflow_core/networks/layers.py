"""What several networks share: embedders, a loop over blocks, and `unpatchify`.

# B batch, C channels, H W latent size, P patch side, N tokens, D width
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from meanflow_core.networks.dual import Dual, Linear, lift, lift_linear

FREQUENCY_EMBEDDING_SIZE = 256  # number of sinusoidal features of a time (DiT's code)
# The sinusoids' frequencies fall from 1 to about 1 / MAX_PERIOD, for times, which are in [0, 1], and for positions.
MAX_PERIOD = 10_000.0
NORM_EPS = 1e-6


class TimeEmbedder(nn.Module):
    """Embeds a scalar (B,) as (B, D): sinusoids, then an MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(FREQUENCY_EMBEDDING_SIZE, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size)
        )

    def forward(self, time: Dual) -> Dual:
        # Compute the sinusoids in float32, because bfloat16 rounds nearby times to the same value.
        first: Linear = self.mlp[0]  # type: ignore[assignment]
        column = lift_linear(lambda time: time[:, None], time)
        hidden = first(lift(lambda time: sinusoids(time).to(first.weight.dtype), column))
        return self.mlp[2](lift(F.silu, hidden))  # (B, D)


def sinusoids(time: torch.Tensor) -> torch.Tensor:
    """Times (B, 1) -> features (B, 256): cosines, then sines."""
    half = FREQUENCY_EMBEDDING_SIZE // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) / half * torch.arange(half, device=time.device))
    angles = time * frequencies  # (B, 128)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class LabelEmbedder(nn.Module):
    """Embeds class ids (B,) as (B, D); the last row of the table is the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(labels)


class PatchEmbedder(nn.Module):
    """Latents (B, C, H, W) -> tokens (B, N, D), in row-major order."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def initialize(self) -> None:
        """Xavier initialisation as for a linear layer on a patch's values (DiT, and the authors' networks)."""
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]  # typed as optional

    def forward(self, z: Dual) -> Dual:
        tokens = self.proj(z.value).flatten(2).transpose(1, 2).contiguous()
        if z.tangent is None:
            return Dual(tokens)
        with torch.no_grad():
            tangent = F.conv2d(z.tangent, self.proj.weight, stride=self.proj.stride)
        return Dual(tokens, tangent.flatten(2).transpose(1, 2).contiguous())


def run_blocks(blocks: nn.ModuleList, x: Dual, *others: object, checkpointing: bool) -> Dual:
    """Applies blocks in sequence. checkpointing: if gradients are enabled, store only block inputs for backward."""
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, *others, use_reentrant=False)
        else:
            x = block(x, *others)
    return x


def unpatchify(x: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Patches (B, N, P * P * C), each in the order (row, column, channel), -> (B, C, H, W)."""
    batch, tokens, _ = x.shape
    side, patch = math.isqrt(tokens), patch_size
    x = x.view(batch, side, side, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, side * patch, side * patch)
