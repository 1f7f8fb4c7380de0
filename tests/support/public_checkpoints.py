"""Small checkpoints in the format of every public source, with random values, and reference networks from the papers."""

import math
import re

import numpy as np
import torch

from meanflow_core.interop import conversion

# Width and depth of the debug presets, so that the number of heads is known; patches of 2 on 4x8x8 latents, 7 classes.
D, DEPTH, HEADS, P, C, SIZE, CLASSES = 64, 2, 2, 2, 4, 8, 7
AUX_DEPTH, IMF_INNER = 1, int(D * 8 / 3)


def positions_of_mae(width=D, side=SIZE // P, row_first=False):
    """MAE's two-dimensional sine-cosine embedding: one half of the features for the column, one for the row."""
    features = []
    row, column = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    for position in (row, column) if row_first else (column, row):
        angles = position.reshape(-1, 1) / 10000.0 ** (np.arange(width // 4) / (width / 4))
        features += [np.sin(angles), np.cos(angles)]
    return torch.tensor(np.concatenate(features, axis=1), dtype=torch.float32)[None]


def random_state(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        is_norm = name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
        state[name] = 1 + 0.1 * values if is_norm else values * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
    return state


def mlp_shapes(name, width=D, wrapper=""):
    return {
        f"{name}.mlp.0.{wrapper}weight": (width, 256),
        f"{name}.mlp.0.{wrapper}bias": (width,),
        f"{name}.mlp.2.{wrapper}weight": (width, width),
        f"{name}.mlp.2.{wrapper}bias": (width,),
    }


def sit_state(*, out_channels=C, embedders=("t_embedder",), num_projectors=0, inner=4 * D, seed=0):
    shapes = {"x_embedder.proj.weight": (D, C, P, P), "x_embedder.proj.bias": (D,)}
    for embedder in embedders:
        shapes |= mlp_shapes(embedder)
    shapes["y_embedder.embedding_table.weight"] = (CLASSES + 1, D)
    layers = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (inner, D), "mlp.fc2": (D, inner)}
    layers = {f"blocks.{i}.{n}": shape for i in range(DEPTH) for n, shape in layers.items()}
    layers |= {f"blocks.{i}.adaLN_modulation.1": (6 * D, D) for i in range(DEPTH)}
    layers |= {"final_layer.linear": (P * P * out_channels, D), "final_layer.adaLN_modulation.1": (2 * D, D)}
    layers |= {f"projectors.{i}.{n}": (D, D) for i in range(num_projectors) for n in (0, 2, 4)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    state = random_state(shapes, seed)
    for name in state:
        if name.endswith("_embedder.mlp.0.weight"):
            state[name] = 4 * state[name]  # so that the output depends on the time
    return {"pos_embed": positions_of_mae(), **state}


def imf_torch_state(has_velocity_head=False):
    shapes = {"x_embedder.proj.weight": (D, C, P, P), "x_embedder.proj.bias": (D,)}
    for embedder in ("h_embedder", "omega_embedder", "cfg_t_start_embedder", "cfg_t_end_embedder"):
        shapes |= mlp_shapes(embedder, wrapper="_flax_linear.")
    shapes["y_embedder.embedding_table._flax_embedding.weight"] = (CLASSES + 1, D)
    counts = {"time": 4, "class": 8, "omega": 4, "t_min": 2, "t_max": 2}
    shapes |= {f"{name}_tokens": (count, D) for name, count in counts.items()}
    blocks = [f"shared_blocks.{i}" for i in range(DEPTH)] + [f"u_heads.{i}" for i in range(AUX_DEPTH)]
    blocks += [f"v_heads.{i}" for i in range(AUX_DEPTH if has_velocity_head else 0)]
    for block in blocks:
        shapes |= {f"{block}.{name}": (D,) for name in ("norm1.weight", "norm2.weight", "attn_scale", "mlp_scale")}
        shapes |= {f"{block}.attn.{name}_norm.weight": (D // HEADS,) for name in ("q", "k")}
        shapes |= {f"{block}.attn.{name}_proj._flax_linear.weight": (D, D) for name in ("q", "k", "v", "out")}
        shapes |= {f"{block}.mlp.{name}._flax_linear.weight": (IMF_INNER, D) for name in ("w1", "w3")}
        shapes[f"{block}.mlp.w2._flax_linear.weight"] = (D, IMF_INNER)
    for head in ("u", "v"):  # the published files contain the last layer of the v head, but none of its blocks
        shapes[f"{head}_final_layer.norm.weight"] = (D,)
        shapes[f"{head}_final_layer.linear._flax_linear.weight"] = (P * P * C, D)
        shapes[f"{head}_final_layer.linear._flax_linear.bias"] = (P * P * C,)
    return random_state({f"net.{name}": shape for name, shape in shapes.items()})


def as_flax(state):
    """Parameters of a converted network under the authors' Flax paths."""
    flat = {}
    for name, value in state.items():
        array, path = value.numpy(), "net/" + name.replace(".", "/")
        path = re.sub(r"^net/blocks/(\d+)", r"net/blocks/layers_\1", path)
        path = re.sub(r"(shared_blocks|u_heads|v_heads)/(\d+)", r"\1_\2", path)
        path = re.sub(r"/(mlp|adaLN_modulation)/(\d)/", r"/\1/layers_\2/", path)
        if path.endswith("embedding_table/weight"):
            path = path.replace("/weight", "/_flax_embedding/embedding")
        elif path.endswith("/weight"):
            path = path.replace("/weight", "/kernel" if array.ndim in (1, 4) else "/_flax_linear/kernel")
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        elif path.endswith("/bias") and "x_embedder" not in path:
            path = path.replace("/bias", "/_flax_linear/bias")
        flat[path] = torch.from_numpy(np.ascontiguousarray(array))
    return flat


def checkpoint_of(source):
    """A small checkpoint in the format of a public source."""
    if source == "sit":
        return sit_state(out_channels=2 * C)
    if source == "repa":
        return sit_state(num_projectors=2)
    if source == "zhuyu-cs":
        return sit_state(embedders=("t_embedder", "r_embedder"))
    if source == "imf-torch":
        return imf_torch_state()
    if source == "official-imf":
        return as_flax(conversion.from_imf_torch(imf_torch_state(has_velocity_head=True)))
    converted = conversion.from_zhuyu_cs(sit_state(embedders=("t_embedder", "r_embedder")))
    return as_flax(converted)


def linear(state, name, x, wrapper=""):
    y = x @ state[f"{name}.{wrapper}weight"].T
    return y + state[f"{name}.{wrapper}bias"] if f"{name}.{wrapper}bias" in state else y


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def time_features(state, name, time, wrapper=""):
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = time[:, None] * frequencies
    features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1).to(time.dtype)
    return linear(state, f"{name}.mlp.2", silu(linear(state, f"{name}.mlp.0", features, wrapper)), wrapper)


def patch_tokens(state, z, prefix=""):
    grid = z.shape[-1] // P
    patches = z.view(len(z), C, grid, P, grid, P).permute(0, 2, 4, 1, 3, 5).reshape(len(z), grid**2, C * P * P)
    return patches @ state[f"{prefix}x_embedder.proj.weight"].flatten(1).T + state[f"{prefix}x_embedder.proj.bias"]


def image_of(tokens):
    grid, channels = math.isqrt(tokens.shape[1]), tokens.shape[2] // P**2
    patches = tokens.view(len(tokens), grid, grid, P, P, channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), channels, grid * P, grid * P)


def modulated(x, shift, scale):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None]


def attend(q, k, v):
    """(B, heads, N, d) each -> (B, N, D)."""
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def reference_sit(state, z, labels, **times):
    """SiT of Ma et al. 2024, conditioned on the class and on times, {name of the embedder: time}."""
    condition = state["y_embedder.embedding_table.weight"][labels]
    condition = condition + sum(time_features(state, name, time) for name, time in times.items())
    x = patch_tokens(state, z) + state["pos_embed"]
    for i in range(DEPTH):
        block = f"blocks.{i}"
        parts = linear(state, f"{block}.adaLN_modulation.1", silu(condition)).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        qkv = linear(state, f"{block}.attn.qkv", modulated(x, shift1, scale1))
        q, k, v = qkv.view(len(z), -1, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        x = x + gate1[:, None] * linear(state, f"{block}.attn.proj", attend(q, k, v))
        hidden = gelu(linear(state, f"{block}.mlp.fc1", modulated(x, shift2, scale2)))
        x = x + gate2[:, None] * linear(state, f"{block}.mlp.fc2", hidden)
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", silu(condition)).chunk(2, dim=1)
    return image_of(linear(state, "final_layer.linear", modulated(x, shift, scale)))


def rms_normed(state, name, x):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * state[f"{name}.weight"]


def rotated(x):
    """Applies rotary position embeddings to (B, N, heads, d); adjacent features form complex numbers."""
    angles = torch.arange(x.shape[1])[:, None] / 10000.0 ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.exp(1j * angles.to(x.dtype))[:, None]).flatten(-2)


def reference_imf(state, z, labels, h, omega, guidance_interval_start, guidance_interval_end):
    """(u, v) of improved MeanFlow (Geng et al. 2025); v is None if the checkpoint has no blocks for it."""
    wrap = "_flax_linear."
    table = state["net.y_embedder.embedding_table._flax_embedding.weight"]
    groups = [
        ("class", table[labels]),
        ("omega", time_features(state, "net.omega_embedder", 1 - 1 / omega, wrap)),
        ("t_min", time_features(state, "net.cfg_t_start_embedder", guidance_interval_start, wrap)),
        ("t_max", time_features(state, "net.cfg_t_end_embedder", guidance_interval_end, wrap)),
        ("time", time_features(state, "net.h_embedder", h, wrap)),
    ]
    tokens = [state[f"net.{name}_tokens"] + embedding[:, None] for name, embedding in groups]
    x = torch.cat([*tokens, patch_tokens(state, z, "net.")], dim=1)

    def run(x, block):
        normed = rms_normed(state, f"{block}.norm1", x)
        q, k, v = (
            linear(state, f"{block}.attn.{name}_proj", normed, wrap).unflatten(-1, (HEADS, -1)) for name in "qkv"
        )
        q, k = (rotated(rms_normed(state, f"{block}.attn.{name}_norm", y)) for name, y in (("q", q), ("k", k)))
        mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + linear(state, f"{block}.attn.out_proj", mixed, wrap) * state[f"{block}.attn_scale"]
        normed = rms_normed(state, f"{block}.norm2", x)
        gated = silu(linear(state, f"{block}.mlp.w1", normed, wrap)) * linear(state, f"{block}.mlp.w3", normed, wrap)
        return x + linear(state, f"{block}.mlp.w2", gated, wrap) * state[f"{block}.mlp_scale"]

    for i in range(DEPTH):
        x = run(x, f"net.shared_blocks.{i}")
    outputs = []
    for head in ("u", "v"):
        if f"net.{head}_heads.0.attn_scale" not in state:
            outputs.append(None)
            continue
        y = x
        for i in range(AUX_DEPTH):
            y = run(y, f"net.{head}_heads.{i}")
        y = rms_normed(state, f"net.{head}_final_layer.norm", y[:, 20:])
        outputs.append(image_of(linear(state, f"net.{head}_final_layer.linear", y, wrap)))
    return outputs
