"""MeanFlow's network u(z_t, r, t, label): a DiT (Peebles and Xie 2023) conditioned on t, t - r and the class.

Parameter names are those of DiT and SiT, with `h_embedder` for h = t - r, so that public checkpoints map one to one.
Layers operate on duals (see `dual`), so that one forward computes both u and du/dt.

    # B batch, b rows with a tangent, C channels, H W latent size, P patch side, N tokens, D width
"""

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from meanflow_core.networks.dual import Dual, Linear, add_constant, attention, lift, lift_linear
from meanflow_core.networks.interface import (
    Conditioning,
    NetworkModel,
    NetworkOutput,
    check_network_input,
    check_patch_size,
)
from meanflow_core.networks.layers import (
    MAX_PERIOD,
    NORM_EPS,
    LabelEmbedder,
    PatchEmbedder,
    TimeEmbedder,
    run_blocks,
    unpatchify,
)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Dual) -> Dual:
        qkv = self.qkv(x)
        q, k, v = (lift_linear(partial(self._heads, index=index), qkv) for index in range(3))
        return self.proj(lift_linear(lambda y: y.transpose(1, 2).flatten(2), attention(q, k, v)))

    def _heads(self, qkv: torch.Tensor, index: int) -> torch.Tensor:
        batch, tokens, width = qkv.shape
        split = qkv.view(batch, tokens, 3, self.num_heads, width // 3 // self.num_heads)
        return split[:, :, index].transpose(1, 2)  # (B, heads, N, D / heads)


class FeedForward(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, inner_size)
        self.fc2 = Linear(inner_size, hidden_size)

    def forward(self, x: Dual) -> Dual:
        return self.fc2(lift(_gelu, self.fc1(x), derivative=_gelu_derivative))


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_derivative(x: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
    # GELU is elementwise, so its backward formula gives the forward derivative.
    return torch.ops.aten.gelu_backward(dx, x, approximate="tanh")


def _normalize_and_modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift.unsqueeze(1), F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale.unsqueeze(1))


def _normalize_and_modulate_derivative(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    dx: torch.Tensor,
    dshift: torch.Tensor,
    dscale: torch.Tensor,
) -> torch.Tensor:
    # With y = (x - mean) / std: dy = (dx - mean(dx) - y mean(y dx)) / std.
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    inverse = (variance + NORM_EPS).rsqrt()
    y = (x - mean) * inverse
    dy = (dx - dx.mean(dim=-1, keepdim=True) - y * (y * dx).mean(dim=-1, keepdim=True)) * inverse
    return dy * (1 + scale.unsqueeze(1)) + y * dscale.unsqueeze(1) + dshift.unsqueeze(1)


def _add_gated(x: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    return x + gate.unsqueeze(1) * branch


def _add_gated_derivative(
    x: torch.Tensor,
    gate: torch.Tensor,
    branch: torch.Tensor,
    dx: torch.Tensor,
    dgate: torch.Tensor,
    dbranch: torch.Tensor,
) -> torch.Tensor:
    return dx + dgate.unsqueeze(1) * branch + gate.unsqueeze(1) * dbranch


def modulated_norm(x: Dual, shift: Dual, scale: Dual) -> Dual:
    """Layer norm of tokens (B, N, D), then scale and shift, each (B, D)."""
    return lift(_normalize_and_modulate, x, shift, scale, derivative=_normalize_and_modulate_derivative)


def add_gated(x: Dual, gate: Dual, branch: Dual) -> Dual:
    """x + gate branch, on tokens (B, N, D) with a gate (B, D)."""
    return lift(_add_gated, x, gate, branch, derivative=_add_gated_derivative)


def _chunks(x: Dual, count: int) -> list[Dual]:
    def chunk(y: torch.Tensor, index: int) -> torch.Tensor:
        return y.chunk(count, dim=1)[index]

    return [lift_linear(partial(chunk, index=index), x) for index in range(count)]


class Block(nn.Module):
    """A transformer block with adaptive layer norms and gates (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = FeedForward(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Dual, condition: Dual) -> Dual:
        modulation = self.adaLN_modulation[1](lift(F.silu, condition))  # (B, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = _chunks(modulation, 6)
        x = add_gated(x, gate1, self.attn(modulated_norm(x, shift1, scale1)))
        return add_gated(x, gate2, self.mlp(modulated_norm(x, shift2, scale2)))


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> patches (B, N, P * P * C)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Dual, condition: Dual) -> Dual:
        shift, scale = _chunks(self.adaLN_modulation[1](lift(F.silu, condition)), 2)
        return self.linear(modulated_norm(x, shift, scale))


def sine_cosine_positions(hidden_size: int, grid_size: int) -> torch.Tensor:
    """Fixed 2-D position embedding, float32 (grid_size^2, D): the first half for the column, the second for the row.

    Source: MAE and DiT, which put the column ("w") first.
    """
    frequencies = MAX_PERIOD ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # (G, D / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (G, D / 2)
    column = axis[None, :, :].expand(grid_size, grid_size, -1)
    row = axis[:, None, :].expand(grid_size, grid_size, -1)
    return torch.cat([column, row], dim=-1).reshape(grid_size**2, hidden_size).float()


class MeanFlowDiT(NetworkModel):
    """The average velocity u(z_t, r, t, label) of Geng et al. 2025: a DiT conditioned on (t, t - r, label).

    Raises ValueError for incompatible sizes.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks: ClassVar[list[str]] = ["Block"]

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
        check_patch_size(sample_size, patch_size)
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads and of 4 (sine-cosine positions), but got {hidden_size} and "
                f"{num_heads} heads"
            )
        self.patch_size = patch_size
        self.gradient_checkpointing = False
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
        # DiT's initialisation. With zero modulation weights, each block starts as the identity; with a zero final layer,
        # the network's output starts at zero.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.x_embedder.initialize()
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "_embedder.mlp" in name and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        z: torch.Tensor,
        conditioning: Conditioning,
        tangent: torch.Tensor | None = None,
        velocity_only: bool = False,
    ) -> NetworkOutput:
        """Computes u of noisy latents z_t, float (B, C, H, W).

        tangent: (b, C, H, W), b <= B: also compute du/dt of the first b rows along (dz, dt, dr) = (tangent, 1, 0).
        velocity_only: ignored; only networks with a v head use it.
        Raises ValueError for mismatched shapes.
        """
        check_network_input(z, conditioning, tangent, self.config.in_channels, self.config.sample_size)
        ones = None if tangent is None else torch.ones_like(conditioning.t[: len(tangent)])
        time = self.t_embedder(Dual(conditioning.t, ones))
        step_size = self.h_embedder(Dual(conditioning.t - conditioning.r, ones))
        condition = lift(torch.add, time, step_size)  # (B, D)
        condition = add_constant(condition, self.y_embedder(conditioning.labels))
        x = add_constant(self.x_embedder(Dual(z, tangent)), self.pos_embed)  # (B, N, D)
        x = run_blocks(self.blocks, x, condition, checkpointing=self.gradient_checkpointing)
        u = lift_linear(lambda y: unpatchify(y, self.patch_size), self.final_layer(x, condition))
        return NetworkOutput(u=u.value, dudt=u.tangent)
