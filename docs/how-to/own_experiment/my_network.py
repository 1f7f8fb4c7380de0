"""An MLP-Mixer in plain PyTorch: training gets du/dt from torch's forward-mode AD.

# B batch, C channels, H W latent size, P patch side, N tokens, D width
"""

import math

import torch
from torch import nn


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class Block(nn.Module):
    """Mixes tokens, then channels. Time and class scale and shift both."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation = nn.Linear(width, 4 * width)
        self.tokens = mlp(num_tokens, 4 * num_tokens, num_tokens)
        self.channels = mlp(width, 4 * width, width)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x: (B, N, D); condition: (B, D)."""
        scale1, shift1, scale2, shift2 = self.modulation(condition)[:, None].chunk(4, dim=2)
        y = self.norm(x) * (1 + scale1) + shift1
        x = x + self.tokens(y.transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm(x) * (1 + scale2) + shift2)


class PlainNet(nn.Module):
    """The network. The data give sample_size, in_channels and num_classes; `PlainNetConfig` gives the rest."""

    def __init__(
        self, *, sample_size: int, in_channels: int, num_classes: int, patch_size: int, width: int, depth: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.times = mlp(4 * 16, width, width)
        self.classes = nn.Embedding(num_classes + 1, width)  # the last one is the null class
        # FSDP2 shards, and Muon updates, the blocks of a ModuleList.
        self.blocks = nn.ModuleList(Block((sample_size // patch_size) ** 2, width) for _ in range(depth))
        self.pixels = nn.ConvTranspose2d(width, in_channels, patch_size, stride=patch_size)

    def forward(self, z: torch.Tensor, t: torch.Tensor, h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """z: (B, C, H, W); t and h = t - r, float (B,); labels: class ids, int64 (B,). Returns u (B, C, H, W)."""
        frequencies = 2.0 ** torch.arange(16, device=z.device).div(4) * math.pi / 2
        angles = torch.stack([t, h], dim=1)[:, :, None] * frequencies  # (B, 2, 16)
        condition = self.times(torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)) + self.classes(labels)
        x = self.patches(z)  # (B, D, H / P, W / P)
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, D)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.pixels(tokens.transpose(1, 2).reshape(x.shape))
