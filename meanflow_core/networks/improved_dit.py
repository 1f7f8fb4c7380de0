"""Improved MeanFlow's network (Geng et al. 2025, arXiv 2512.02012): u and v from a shared trunk with two heads.

Instead of adaLN, conditioning tokens precede the image tokens: the class, the guidance scale omega, the start and the
end of its interval, and h = t - r. The time t is not an input. The v head is used in training only. Parameter names are
the authors', without their wrapper modules (t_min and t_max are the interval's start and end).

    # B batch, b rows with a tangent, C channels, H W latent size, N tokens, D width
"""

import math
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from meanflow_core.networks.dual import Dual, Linear, attention, lift, lift_linear
from meanflow_core.networks.interface import (
    Conditioning,
    NetworkModel,
    NetworkOutput,
    check_network_input,
    check_patch_size,
)
from meanflow_core.networks.layers import NORM_EPS, LabelEmbedder, PatchEmbedder, TimeEmbedder, run_blocks, unpatchify

# Number of tokens per conditioning input, in the order of the sequence (the authors' code).
NUM_CLASS_TOKENS, NUM_OMEGA_TOKENS, NUM_INTERVAL_TOKENS, NUM_TIME_TOKENS = 8, 4, 2, 4
NUM_CONDITION_TOKENS = NUM_CLASS_TOKENS + NUM_OMEGA_TOKENS + 2 * NUM_INTERVAL_TOKENS + NUM_TIME_TOKENS
ROPE_THETA = 10_000.0
BLOCK_INIT = 0.32  # linear layers of blocks: normal with standard deviation BLOCK_INIT / sqrt(fan in)


def rotary_angles(head_size: int, num_tokens: int) -> torch.Tensor:
    """Rotary position embedding: the rotation angle of each pair of features, float32 (N, head_size / 2)."""
    frequencies = ROPE_THETA ** -(torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    return torch.arange(num_tokens, dtype=torch.float32)[:, None] * frequencies


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs of features of x (B, N, heads, d); cos and sin of the angles are (N, d / 2)."""
    # Real arithmetic, because complex views of a converted dtype silently drop the gradient and the tangent.
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis with a learned weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Dual) -> Dual:
        return lift(self._normalize, x, derivative=self._derivative)

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, eps=NORM_EPS)

    def _derivative(self, x: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
        # With y = x / rms: dy = (dx - y mean(y dx)) / rms.
        inverse = (x.square().mean(dim=-1, keepdim=True) + NORM_EPS).rsqrt()
        y = x * inverse
        return (dx - y * (y * dx).mean(dim=-1, keepdim=True)) * inverse * self.weight


class RotaryAttention(nn.Module):
    """Multi-head self-attention with RMS-normalised queries and keys and rotary position embedding."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = Linear(hidden_size, hidden_size, bias=False)
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)

    def forward(self, x: Dual, cos: torch.Tensor, sin: torch.Tensor) -> Dual:
        q, k, v = (lift_linear(self._heads, layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (lift_linear(lambda y: rotate(y, cos, sin), y) for y in (self.q_norm(q), self.k_norm(k)))
        q, k, v = (lift_linear(lambda y: y.transpose(1, 2), y) for y in (q, k, v))  # (B, heads, N, D / heads)
        return self.out_proj(lift_linear(lambda y: y.transpose(1, 2).flatten(2), attention(q, k, v)))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # (B, N, heads, D / heads)


def _gate(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * x


def _gate_derivative(gate: torch.Tensor, x: torch.Tensor, dgate: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
    # SiLU is elementwise, so its backward formula gives the forward derivative.
    return torch.ops.aten.silu_backward(dgate, gate) * x + F.silu(gate) * dx


class SwiGLU(nn.Module):
    """A gated feed-forward layer: w2(silu(w1 x) * w3 x)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.w1 = Linear(hidden_size, inner_size, bias=False)
        self.w2 = Linear(inner_size, hidden_size, bias=False)
        self.w3 = Linear(hidden_size, inner_size, bias=False)

    def forward(self, x: Dual) -> Dual:
        return self.w2(lift(_gate, self.w1(x), self.w3(x), derivative=_gate_derivative))


def _add_scaled(x: Dual, scale: torch.Tensor, branch: Dual) -> Dual:
    value = x.value + branch.value * scale
    if x.tangent is None or branch.tangent is None:
        assert x.tangent is branch.tangent, "either both summands must have a tangent, or none"
        return Dual(value)
    with torch.no_grad():
        return Dual(value, x.tangent + branch.tangent * scale)


class InContextBlock(nn.Module):
    """A transformer block that scales the output of each branch by a learned vector, initially zero."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attn = RotaryAttention(hidden_size, num_heads)
        self.attn_scale = nn.Parameter(torch.zeros(hidden_size))
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size, int(hidden_size * mlp_ratio))
        self.mlp_scale = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Dual, cos: torch.Tensor, sin: torch.Tensor) -> Dual:
        x = _add_scaled(x, self.attn_scale, self.attn(self.norm1(x), cos, sin))
        return _add_scaled(x, self.mlp_scale, self.mlp(self.norm2(x)))


class LinearHead(nn.Module):
    """Tokens (B, N, D) -> patches (B, N, P * P * C)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size)
        self.linear = Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x: Dual) -> Dual:
        return self.linear(self.norm(x))


class ImprovedMeanFlowDiT(NetworkModel):
    """The average velocity u(z_t, r, t | label, omega, interval), and the instantaneous velocity v for training.

    aux_head_depth: number of blocks in each head; the trunk has depth - aux_head_depth blocks. has_velocity_head: False
    for a network that is used for sampling only. Raises ValueError for incompatible sizes.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks: ClassVar[list[str]] = ["InContextBlock"]
    supports_guidance: ClassVar[bool] = True

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
        mlp_ratio: float = 8 / 3,
        aux_head_depth: int = 8,
        has_velocity_head: bool = True,
    ) -> None:
        super().__init__()
        check_patch_size(sample_size, patch_size)
        if not 0 <= aux_head_depth <= depth:
            raise ValueError(f"aux_head_depth must lie in [0, depth = {depth}], but got {aux_head_depth}")
        if hidden_size % (2 * num_heads):
            raise ValueError(
                f"hidden_size / num_heads must be an even number (rotary positions), but got {hidden_size} and {num_heads}"
            )
        self.patch_size = patch_size
        self.gradient_checkpointing = False
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.h_embedder = TimeEmbedder(hidden_size)
        self.omega_embedder = TimeEmbedder(hidden_size)
        self.cfg_t_start_embedder = TimeEmbedder(hidden_size)
        self.cfg_t_end_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.class_tokens = nn.Parameter(torch.empty(NUM_CLASS_TOKENS, hidden_size))
        self.omega_tokens = nn.Parameter(torch.empty(NUM_OMEGA_TOKENS, hidden_size))
        self.t_min_tokens = nn.Parameter(torch.empty(NUM_INTERVAL_TOKENS, hidden_size))
        self.t_max_tokens = nn.Parameter(torch.empty(NUM_INTERVAL_TOKENS, hidden_size))
        self.time_tokens = nn.Parameter(torch.empty(NUM_TIME_TOKENS, hidden_size))
        num_tokens = NUM_CONDITION_TOKENS + (sample_size // patch_size) ** 2
        angles = rotary_angles(hidden_size // num_heads, num_tokens)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(InContextBlock(hidden_size, num_heads, mlp_ratio) for _ in range(count))

        self.shared_blocks = blocks(depth - aux_head_depth)
        self.u_heads = blocks(aux_head_depth)
        self.u_final_layer = LinearHead(hidden_size, patch_size, in_channels)
        if has_velocity_head:
            self.v_heads = blocks(aux_head_depth)
            self.v_final_layer = LinearHead(hidden_size, patch_size, in_channels)
        self._initialize()

    def for_sampling(self) -> Self:
        """A copy without the v head, which only training uses. The copy shares the parameters."""
        config = {name: value for name, value in self.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            copy = type(self)(**{**config, "has_velocity_head": False})
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("v_")}
        copy.load_state_dict(state, assign=True)
        # The state dict lacks non-persistent buffers, so these are still on the meta device.
        for name, buffer in self.named_buffers():
            setattr(copy, name, buffer.clone())
        return copy.train(self.training)

    def _initialize(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                gain = 1.0 if "_embedder" in name else BLOCK_INIT
                nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, LinearHead):
                nn.init.zeros_(module.linear.weight)
        self.x_embedder.initialize()
        tables = [parameter for name, parameter in self.named_parameters() if name.endswith("_tokens")]
        for table in [*tables, self.y_embedder.embedding_table.weight]:
            nn.init.normal_(table, std=1.0 / math.sqrt(table.shape[1]))

    def forward(
        self,
        z: torch.Tensor,
        conditioning: Conditioning,
        tangent: torch.Tensor | None = None,
        velocity_only: bool = False,
    ) -> NetworkOutput:
        """Computes u and v of noisy latents z_t, float (B, C, H, W). The conditioning requires omega and its interval.

        tangent: (b, C, H, W), b <= B: also compute du/dt of the first b rows along (dz, dt, dr) = (tangent, 1, 0).
        velocity_only: compute v only.
        Raises ValueError for mismatched shapes, for missing guidance, or for velocity_only without a v head.
        """
        check_network_input(z, conditioning, tangent, self.config.in_channels, self.config.sample_size)
        if velocity_only and not self.config.has_velocity_head:
            raise ValueError("velocity_only needs a v head, but this network has none (it is for sampling only)")
        x = self._embed(Dual(z, None if velocity_only else tangent), conditioning)
        x = self._run_blocks(self.shared_blocks, x)
        v = None
        if self.config.has_velocity_head:
            v = self._apply_final_layer(self.v_final_layer, self._run_blocks(self.v_heads, Dual(x.value))).value
        if velocity_only:
            return NetworkOutput(v=v)
        u = self._apply_final_layer(self.u_final_layer, self._run_blocks(self.u_heads, x))
        return NetworkOutput(u=u.value, v=v, dudt=u.tangent)

    def _embed(self, z: Dual, conditioning: Conditioning) -> Dual:
        omega = conditioning.omega
        start, end = conditioning.guidance_interval_start, conditioning.guidance_interval_end
        if omega is None or start is None or end is None:
            raise ValueError(
                "this network needs omega, guidance_interval_start and guidance_interval_end in its conditioning"
            )
        ones = None if z.tangent is None else torch.ones_like(conditioning.t[: len(z.tangent)])
        h = self.h_embedder(Dual(conditioning.t - conditioning.r, ones))  # (B, D)
        patches = self.x_embedder(z)
        groups = [
            (self.class_tokens, self.y_embedder(conditioning.labels)),
            (self.omega_tokens, self.omega_embedder(Dual(1.0 - 1.0 / omega)).value),
            (self.t_min_tokens, self.cfg_t_start_embedder(Dual(start)).value),
            (self.t_max_tokens, self.cfg_t_end_embedder(Dual(end)).value),
            (self.time_tokens, h.value),
        ]
        tokens = [table + embedding.unsqueeze(1) for table, embedding in groups]
        sequence = torch.cat([*tokens, patches.value], dim=1)  # (B, N, D)
        if h.tangent is None or patches.tangent is None:
            return Dual(sequence)
        with torch.no_grad():
            time = h.tangent.unsqueeze(1).expand(-1, NUM_TIME_TOKENS, -1)
            others = torch.zeros_like(time[:, :1]).expand(-1, NUM_CONDITION_TOKENS - NUM_TIME_TOKENS, -1)
            return Dual(sequence, torch.cat([others, time, patches.tangent], dim=1))

    def _run_blocks(self, blocks: nn.ModuleList, x: Dual) -> Dual:
        return run_blocks(blocks, x, self.rope_cos, self.rope_sin, checkpointing=self.gradient_checkpointing)

    def _apply_final_layer(self, layer: LinearHead, x: Dual) -> Dual:
        patches = layer(lift_linear(lambda y: y[:, NUM_CONDITION_TOKENS:], x))
        return lift_linear(lambda y: unpatchify(y, self.patch_size), patches)
