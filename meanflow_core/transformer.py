"""The network u(z_t, r, t, label): a DiT (Peebles and Xie 2023) conditioned on t, t - r and the class.

Parameter names are those of DiT and SiT, with `h_embedder` for h = t - r, so that public checkpoints map one to one.

    # B batch, C channels, H W latent size, P patch side, N tokens, D width
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

# Sinusoidal features of a time before its MLP, and their longest period (DiT's code; times enter raw, in [0, 1]).
FREQUENCY_EMBEDDING_SIZE = 256
MAX_PERIOD = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the network is told beside z_t."""

    t: torch.Tensor
    """(B,) float, in [0, 1]: the time of z_t."""
    r: torch.Tensor
    """(B,) float, in [0, t]: the time that a step of size t - r leads to."""
    labels: torch.Tensor
    """(B,) int64: class ids; num_classes is the null class."""


@dataclass(frozen=True, kw_only=True)
class NetworkOutput:
    """What the network says."""

    u: torch.Tensor
    """(B, C, H, W): the average velocity over [r, t]."""


class TimeEmbedder(nn.Module):
    """A scalar time (B,) -> (B, D): sinusoids, then an MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_EMBEDDING_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        half = FREQUENCY_EMBEDDING_SIZE // 2
        frequencies = torch.exp(-math.log(MAX_PERIOD) / half * torch.arange(half, device=time.device))
        angles = time[:, None] * frequencies  # (B, 128)
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))  # (B, D)


class LabelEmbedder(nn.Module):
    """Class ids (B,) -> (B, D); the last row of the table is the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(labels)


class PatchEmbedder(nn.Module):
    """Latents (B, C, H, W) -> tokens (B, N, D), row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.proj(z).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention; fused wherever the caller's context allows it."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class FeedForward(nn.Module):
    """Two linear layers with a tanh-approximated GELU between."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """A transformer block whose norms are shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = FeedForward(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(_modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(_modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> patches (B, N, P * P * C)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(_modulate(self.norm_final(x), shift, scale))


def sine_cosine_positions(hidden_size: int, grid_size: int) -> torch.Tensor:
    """Fixed 2-D position embedding, float32 (grid_size^2, D): a half for the column, then one for the row.

    Source: MAE and DiT (the column, "w", goes first).
    """
    frequencies = MAX_PERIOD ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # (G, D / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (G, D / 2)
    column = axis[None, :, :].expand(grid_size, grid_size, -1)
    row = axis[:, None, :].expand(grid_size, grid_size, -1)
    return torch.cat([column, row], dim=-1).reshape(grid_size**2, hidden_size).float()


class MeanFlowDiT(ModelMixin, ConfigMixin):
    """The average velocity u(z_t, r, t, label) of Geng et al. 2025 as a DiT on (t, t - r, label).

    Raises ValueError where sample_size is no multiple of patch_size.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        patch_size: int = 2,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(
                f"the latent size must be a multiple of the patch size, but got {sample_size} and {patch_size}"
            )
        self.patch_size = patch_size
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimeEmbedder(hidden_size)
        self.h_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        positions = sine_cosine_positions(hidden_size, sample_size // patch_size)
        self.register_buffer("pos_embed", positions[None], persistent=False)  # (1, N, D)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self._initialize()

    def _initialize(self) -> None:
        # DiT's initialisation: Xavier everywhere, small embedders, zeros where a block or the output begins as nothing.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]  # typed as optional; it is there
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "_embedder.mlp" in name and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)

    def forward(self, z: torch.Tensor, conditioning: Conditioning) -> NetworkOutput:
        """z: float (B, C, H, W), the noisy latent z_t. Raises ValueError for a latent of another shape."""
        config = self.config
        if z.shape[1:] != (config.in_channels, config.sample_size, config.sample_size):
            raise ValueError(
                f"latents must have shape (B, {config.in_channels}, {config.sample_size}, {config.sample_size}), "
                f"but got {tuple(z.shape)}"
            )
        condition = (
            self.t_embedder(conditioning.t)
            + self.h_embedder(conditioning.t - conditioning.r)
            + self.y_embedder(conditioning.labels)
        )  # (B, D)
        x = self.x_embedder(z) + self.pos_embed  # (B, N, D)
        for block in self.blocks:
            x = block(x, condition)
        return NetworkOutput(u=self._unpatchify(self.final_layer(x, condition)))

    def _unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        side, patch = math.isqrt(tokens), self.patch_size
        x = x.view(batch, side, side, patch, patch, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, side * patch, side * patch)  # (B, C, H, W)
