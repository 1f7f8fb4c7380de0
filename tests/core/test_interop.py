import argparse
import math
import os
import pickle
import re

import msgpack
import numpy as np
import pytest
import safetensors.torch
import torch

from meanflow_core import interop
from meanflow_core.interop import (
    SOURCES,
    convert_checkpoint,
    published_training,
    read_checkpoint,
    reverse_time,
)
from meanflow_core.transformer import Conditioning
from tests.golden_check import GOLDEN_FOLDER, check_sampling, load, read_settings

# The width and depth of the debug presets, whose number of heads is known; patches of 2 on 4x8x8 latents, 7 classes.
D, DEPTH, HEADS, P, C, SIZE, CLASSES = 64, 2, 2, 2, 4, 8, 7
AUX_DEPTH, IMF_INNER = 1, int(D * 8 / 3)
TIMES = (0.0, 0.1, 0.37, 0.5, 0.93, 1.0)


# Files as the sources name them, with random values.


def positions_of_mae(width=D, side=SIZE // P, row_first=False):
    """MAE's two-dimensional sine-cosine embedding: half of the features for the column, half for the row."""
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
            state[name] = 4 * state[name]  # else the answer hardly depends on the time
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
    for head in ("u", "v"):  # the published files hold the v head's last layer, and no block of it
        shapes[f"{head}_final_layer.norm.weight"] = (D,)
        shapes[f"{head}_final_layer.linear._flax_linear.weight"] = (P * P * C, D)
        shapes[f"{head}_final_layer.linear._flax_linear.bias"] = (P * P * C,)
    return random_state({f"net.{name}": shape for name, shape in shapes.items()})


def as_flax(state):
    """Parameters of a converted DiT or iMF network under the authors' Flax paths, to be read back."""
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


def file_of(source):
    """A small file of every source."""
    if source == "sit":
        return sit_state(out_channels=2 * C)
    if source == "repa":
        return sit_state(num_projectors=2)
    if source == "zhuyu-cs":
        return sit_state(embedders=("t_embedder", "r_embedder"))
    if source == "imf-torch":
        return imf_torch_state()
    if source == "official-imf":
        return as_flax(interop.from_imf_torch(imf_torch_state(has_velocity_head=True)))
    converted = interop.from_zhuyu_cs(sit_state(embedders=("t_embedder", "r_embedder")))
    return as_flax(converted)


# The sources' networks, written down from the papers, on the sources' names.


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
    """SiT of Ma et al. 2024, told the sum of embedded times and the class; times by the embedder that takes each."""
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


def turned(x):
    """Rotary positions on (B, N, heads, d), pairs of neighbours as complex numbers."""
    angles = torch.arange(x.shape[1])[:, None] / 10000.0 ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.exp(1j * angles.to(x.dtype))[:, None]).flatten(-2)


def reference_imf(state, z, labels, h, omega, guidance_interval_start, guidance_interval_end):
    """(u, v) of improved MeanFlow (Geng et al. 2025); v None where the file has no blocks for it."""
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
        q, k = (turned(rms_normed(state, f"{block}.attn.{name}_norm", y)) for name, y in (("q", q), ("k", k)))
        mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + linear(state, f"{block}.attn.out_proj", mixed, wrap) * state[f"{block}.attn_scale"]
        normed = rms_normed(state, f"{block}.norm2", x)
        gated = silu(linear(state, f"{block}.mlp.w1", normed, wrap)) * linear(state, f"{block}.mlp.w3", normed, wrap)
        return x + linear(state, f"{block}.mlp.w2", gated, wrap) * state[f"{block}.mlp_scale"]

    for i in range(DEPTH):
        x = run(x, f"net.shared_blocks.{i}")
    answers = []
    for head in ("u", "v"):
        if f"net.{head}_heads.0.attn_scale" not in state:
            answers.append(None)
            continue
        y = x
        for i in range(AUX_DEPTH):
            y = run(y, f"net.{head}_heads.{i}")
        y = rms_normed(state, f"net.{head}_final_layer.norm", y[:, 20:])
        answers.append(image_of(linear(state, f"net.{head}_final_layer.linear", y, wrap)))
    return answers


def batch(dtype):
    """A latent and a class for each of TIMES, and those times."""
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(len(TIMES), C, SIZE, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES + 1, (len(TIMES),), generator=generator)
    return z.to(dtype), labels, torch.tensor(TIMES, dtype=dtype)


def told(t, r, labels):
    return Conditioning(t=t, r=r, labels=labels)


def of_dtype(state, dtype):
    return {name: value.to(dtype) for name, value in state.items()}


BOUNDS = {torch.float32: 1e-5, torch.float64: 3e-7}  # converted parameters are float32 for either
each_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@each_dtype
@pytest.mark.parametrize("out_channels", [2 * C, C], ids=["variance learnt", "velocity alone"])
@torch.no_grad()
def test_sit_gives_our_velocity_at_our_time(dtype, out_channels):
    state = sit_state(out_channels=out_channels)
    network = convert_checkpoint("sit", state).to(dtype)
    z, labels, t = batch(dtype)
    theirs = -reference_sit(of_dtype(state, dtype), z, labels, t_embedder=1 - t)[:, :C]
    # The comparison sees a wrong time, a wrong sign and the other channels.
    assert relative(-reference_sit(of_dtype(state, dtype), z, labels, t_embedder=t)[:, :C], theirs) > 0.1
    for row in range(len(TIMES)):  # each time by itself
        ours = network(z[row : row + 1], told(t[row : row + 1], t[row : row + 1], labels[row : row + 1])).u
        assert relative(ours, theirs[row : row + 1]) < BOUNDS[dtype]


@each_dtype
@torch.no_grad()
def test_repa_gives_its_velocity(dtype):
    state = sit_state(num_projectors=2)
    network = convert_checkpoint("repa", state).to(dtype)
    z, labels, t = batch(dtype)
    theirs = reference_sit(of_dtype(state, dtype), z, labels, t_embedder=t)
    assert relative(network(z, told(t, t, labels)).u, theirs) < BOUNDS[dtype]


@each_dtype
@torch.no_grad()
def test_zhuyu_cs_gives_its_average_velocity(dtype):
    state = sit_state(embedders=("t_embedder", "r_embedder"))
    network = convert_checkpoint("zhuyu-cs", state).to(dtype)
    z, labels, t = batch(dtype)
    for r in (0.0 * t, 0.3 * t, t):
        theirs = reference_sit(of_dtype(state, dtype), z, labels, t_embedder=t, r_embedder=t - r)
        assert relative(network(z, told(t, r, labels)).u, theirs) < BOUNDS[dtype]


@each_dtype
@pytest.mark.parametrize("has_velocity_head", [False, True], ids=["for sampling", "whole"])
@torch.no_grad()
def test_imf_torch_gives_its_velocities(dtype, has_velocity_head):
    state = imf_torch_state(has_velocity_head)
    network = convert_checkpoint("imf-torch", state, sample_size=SIZE).to(dtype)
    z, labels, t = batch(dtype)
    guidance = {"omega": 1 + 3 * t, "guidance_interval_start": 0.4 * t, "guidance_interval_end": 0.5 + 0.4 * t}
    for r in (0.0 * t, 0.3 * t, t):
        u, v = reference_imf(of_dtype(state, dtype), z, labels, t - r, **guidance)
        ours = network(z, Conditioning(t=t, r=r, labels=labels, **guidance))
        assert relative(ours.u, u) < BOUNDS[dtype]
        assert (ours.v is None) == (v is None) == (not has_velocity_head)
        assert v is None or relative(ours.v, v) < BOUNDS[dtype]


@pytest.mark.parametrize("path", sorted(GOLDEN_FOLDER.glob("*.npz")), ids=lambda path: path.stem)
def test_authors_parameters_sample_what_the_authors_sampled(path):
    golden = load(path)
    is_improved = read_settings(golden)[2].objective == "improved_meanflow"
    source = "official-imf" if is_improved else "official-meanflow"
    network = convert_checkpoint(source, read_checkpoint(path), sample_size=8, num_heads=3)
    errors = check_sampling(network, golden)
    assert len(errors) == 2
    assert max(errors.values()) < 1e-5


def test_authors_flax_file_for_sampling_has_no_velocity_head():
    parameters = read_checkpoint(GOLDEN_FOLDER / "imf.npz")
    whole = convert_checkpoint("official-imf", parameters, sample_size=8, num_heads=3)
    without = {path: value for path, value in parameters.items() if "/v_heads_" not in path}
    small = convert_checkpoint("official-imf", without, sample_size=8, num_heads=3)
    assert whole.config.has_velocity_head
    assert not small.config.has_velocity_head
    assert set(whole.state_dict()) - set(small.state_dict()) == {
        name for name in whole.state_dict() if name.startswith("v_")
    }


@pytest.mark.parametrize("source", ["sit", "repa"])
def test_flow_matching_networks_do_not_depend_on_r_and_can_learn_to(source):
    network = convert_checkpoint(source, file_of(source))
    z, labels, t = batch(torch.float32)
    with torch.no_grad():
        answers = [network(z, told(t, share * t, labels)).u for share in (0.0, 0.4, 1.0)]
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[1], answers[2])
    network(z, told(t, 0.4 * t, labels)).u.square().sum().backward()
    assert network.h_embedder.mlp[2].weight.grad.norm() > 1e-3
    assert 0.019 < network.h_embedder.mlp[0].weight.std() < 0.021
    again = convert_checkpoint(source, file_of(source))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())


def test_time_reversed_twice_is_itself():
    weight = sit_state()["t_embedder.mlp.0.weight"]
    torch.testing.assert_close(reverse_time(reverse_time(weight)), weight, rtol=0.0, atol=3e-7)
    assert relative(reverse_time(weight), weight) > 0.1


@pytest.mark.parametrize("source", SOURCES)
def test_every_file_converts_and_every_value_arrives(source):
    state = file_of(source)
    network = convert_checkpoint(source, state, sample_size=SIZE)
    assert network.config.num_heads == HEADS  # that of the debug preset of this width and depth
    assert (network.config.hidden_size, network.config.patch_size) == (D, P)
    assert (network.config.in_channels, network.config.num_classes, network.config.sample_size) == (C, CLASSES, SIZE)
    assert network.config.depth == DEPTH + (AUX_DEPTH if "imf" in source else 0)
    before = network.state_dict()
    dropped = ("pos_embed", "projectors.", "net.v_final_layer.")
    for name, value in state.items():
        if name.startswith(dropped) or value.dim() == 4:  # the patch convolution is moved with the other biases
            continue
        after = convert_checkpoint(source, {**state, name: value + 1.0}, sample_size=SIZE).state_dict()
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        assert len(changed) == 1, name
        assert before[changed[0]].dtype == torch.float32


@pytest.mark.parametrize("source", SOURCES)
def test_refusal_lists_everything_that_does_not_fit(source):
    state = file_of(source)
    converted = SOURCES[source].convert(state)
    network = convert_checkpoint(source, state, sample_size=SIZE)
    biases = [name for name in state if name.endswith("bias") and "x_embedder" not in name and "v_final" not in name]
    lost, cut = biases[:2], biases[2]
    broken = {name: value for name, value in state.items() if name not in lost}
    broken |= {cut: state[cut][:-1], "surplus": torch.zeros(2), "other.surplus": torch.zeros(3)}
    with pytest.raises(ValueError, match="does not fit") as refusal:
        convert_checkpoint(source, broken, sample_size=SIZE)
    message = str(refusal.value)
    still = SOURCES[source].convert(broken)
    missing = [name for name in network.state_dict() if name not in still]
    assert len(missing) == 2
    assert f"2 missing: {', '.join(missing)}; " in message
    assert "2 unknown: surplus, other.surplus; " in message
    [shortened] = [name for name in still if name in converted and still[name].shape != converted[name].shape]
    length = len(converted[shortened])
    assert message.endswith(f"1 of another shape: {shortened} ({length - 1},) instead of ({length},)")


@pytest.mark.parametrize("name", ["t_embedder.mlp.0.weight", "final_layer.linear.weight", "final_layer.linear.bias"])
def test_parameters_that_sit_rewrites_may_be_missing_or_misshapen_too(name):
    state = sit_state(out_channels=2 * C)
    with pytest.raises(ValueError, match=re.escape(f"1 of another shape: {name}")):
        convert_checkpoint("sit", {**state, name: state[name][..., :-1]})
    del state[name]
    with pytest.raises(ValueError, match=re.escape(f"1 missing: {name}")):
        convert_checkpoint("sit", state)


@pytest.mark.parametrize(
    ("source", "file", "words"),
    [
        ("sit", "repa", "12 unknown: projectors.0.0.weight"),
        ("repa", "sit", r"final_layer.linear.weight \(32, 64\) instead of \(16, 64\)"),
        ("sit", "zhuyu-cs", "4 unknown: r_embedder"),
        ("zhuyu-cs", "sit", "4 missing: h_embedder"),
        ("sit", "imf-torch", "of another kind: no x_embedder.proj.weight"),
        ("official-meanflow", "official-imf", "no transformer blocks"),
        ("official-imf", "official-meanflow", "no transformer blocks"),
        ("imf-torch", "official-imf", "of another kind: no x_embedder.proj.weight"),
    ],
)
def test_file_of_another_source_is_refused(source, file, words):
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(source, file_of(file), sample_size=SIZE)


@pytest.mark.parametrize("source", ["sit", "repa", "zhuyu-cs"])
def test_step_size_embedder_of_our_own_name_is_unknown_there(source):
    state = file_of(source)
    state["h_embedder.mlp.0.bias"] = torch.zeros(D)
    with pytest.raises(ValueError, match=re.escape("1 unknown: h_embedder.mlp.0.bias")):
        convert_checkpoint(source, state)


def test_names_that_become_one_are_refused():
    state = imf_torch_state()
    state["x_embedder.proj.bias"] = torch.zeros(D)
    with pytest.raises(ValueError, match=re.escape("would both be x_embedder.proj.bias")):
        convert_checkpoint("imf-torch", state, sample_size=SIZE)


def test_unknown_source_is_refused_with_the_known():
    with pytest.raises(
        ValueError, match="unknown source 'dit'; known: official-meanflow, official-imf, imf-torch, sit"
    ):
        convert_checkpoint("dit", sit_state())


def test_stored_positions_are_checked_and_tell_the_latents_size():
    state = sit_state(out_channels=2 * C)
    large = convert_checkpoint("sit", {**state, "pos_embed": positions_of_mae(side=6)})
    assert large.config.sample_size == 6 * P
    moved = state["pos_embed"] + 2e-4  # as far as a moving average's rounding carries it
    assert convert_checkpoint("sit", {**state, "pos_embed": moved}).config.sample_size == SIZE
    for wrong in (positions_of_mae(row_first=True), state["pos_embed"][:, 1:], state["pos_embed"][0], torch.zeros(())):
        for convert in (interop.from_sit, interop.from_repa, interop.from_zhuyu_cs):
            with pytest.raises(ValueError, match="is not the fixed sine-cosine embedding"):
                convert({**state, "pos_embed": wrong})
    with pytest.raises(ValueError, match="latents of side 8, but asked was 16"):
        convert_checkpoint("sit", state, sample_size=16)
    del state["pos_embed"]
    assert convert_checkpoint("sit", state).config.sample_size == 32
    assert convert_checkpoint("sit", state, sample_size=16).config.sample_size == 16


def test_sizes_are_read_or_asked_for():
    state = sit_state(out_channels=2 * C, inner=100)
    network = convert_checkpoint("sit", state, num_heads=4)
    assert network.config.num_heads == 4
    assert network.blocks[0].mlp.fc1.weight.shape == (100, D)
    deeper = {name.replace("blocks.1.", "blocks.2."): value for name, value in state.items()}
    with pytest.raises(ValueError, match="width 64 and depth 3 is none of the published.*; give num_heads"):
        convert_checkpoint("sit", {**deeper, **state})
    assert convert_checkpoint("sit", {**deeper, **state}, num_heads=2).config.depth == 3


@pytest.mark.parametrize(
    ("kind", "width", "depth", "num_heads"),
    [
        ("dit", 384, 12, 6),
        ("dit", 768, 12, 12),
        ("dit", 1024, 16, 16),
        ("dit", 1024, 24, 16),
        ("dit", 1152, 28, 16),
        ("imf_dit", 768, 12, 12),
        ("imf_dit", 768, 24, 12),
        ("imf_dit", 1024, 32, 16),
        ("imf_dit", 1024, 48, 16),
    ],
)
def test_published_sizes_have_their_heads(kind, width, depth, num_heads):
    assert published_training(kind, width, depth).network.num_heads == num_heads


# Reading files.


def packed(value):
    """Flax's serialisation of a tree of arrays: msgpack, an array as an extension of (shape, dtype's name, bytes)."""
    if isinstance(value, dict):
        return {key: packed(item) for key, item in value.items()}
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    content = msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True)
    return msgpack.ExtType(1 if isinstance(value, np.ndarray) else 3, content)


def flax_bytes(tree):
    return msgpack.packb(packed(tree), strict_types=True)


def flax_training_state():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 2, "1": 3},
        "chunks": {"0": array.reshape(-1)[:4], "1": array.reshape(-1)[4:]},
    }
    halves = msgpack.ExtType(1, msgpack.packb(((2,), "bfloat16", b"\x80\x3f\x20\xc1"), use_bin_type=True))  # 1, -10
    averages = {"net": {"layers_0": {"kernel": array, "big": chunked}, "half": halves}}
    return {
        "step": np.int32(7),
        "params": {"net": {"layers_0": {"kernel": array + 1}}},
        "ema_params": averages,
        "opt_state": {"0": {"count": np.array(7), "mu": {"net": np.zeros(3)}}, "1": {}},
    }


def test_flax_training_state_gives_its_average_or_its_parameters(tmp_path):
    path = tmp_path / "checkpoint_7"
    path.write_bytes(flax_bytes(flax_training_state()))
    expected = torch.arange(6.0).view(2, 3)
    average = read_checkpoint(path)
    assert list(average) == ["net/layers_0/kernel", "net/layers_0/big", "net/half"]
    assert torch.equal(average["net/layers_0/kernel"], expected)
    assert torch.equal(average["net/layers_0/big"], expected)
    assert torch.equal(average["net/half"], torch.tensor([1.0, -10.0]))
    plain = read_checkpoint(path, use_ema=False)
    assert {name: value.tolist() for name, value in plain.items()} == {"net/layers_0/kernel": (expected + 1).tolist()}
    bare = tmp_path / "bare.msgpack"
    bare.write_bytes(flax_bytes({"net": {"bias": np.ones(2, dtype=np.float16)}}))
    assert {name: value.tolist() for name, value in read_checkpoint(bare).items()} == {"net/bias": [1.0, 1.0]}
    assert read_checkpoint(bare)["net/bias"].dtype == torch.float32


def training_file(path, legacy=False):
    """What a training script of SiT's kind saves."""
    state = {
        "model": {"a": torch.zeros(2)},
        "ema": {"a": torch.ones(2, dtype=torch.bfloat16)},
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "args": argparse.Namespace(model="SiT-XL/2", lr=1e-4, betas=(0.9, 0.95), ckpt=None),
        "steps": 3,
    }
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
def test_torch_training_state_gives_its_average_or_its_parameters(tmp_path, legacy):
    path = training_file(tmp_path / "0003.pt", legacy)
    assert read_checkpoint(path)["a"].tolist() == [1.0, 1.0]
    assert read_checkpoint(path)["a"].dtype == torch.float32
    assert read_checkpoint(path, use_ema=False)["a"].tolist() == [0.0, 0.0]
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_the_same_parameters_are_read_from_every_format(tmp_path):
    state = {"net/x": torch.randn(3, 2), "net/y": torch.randn(4)}
    arrays = {name: value.numpy() for name, value in state.items()}
    torch.save(state, tmp_path / "a.pth")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", config=np.array("text"), **{f"param:{name}": value for name, value in arrays.items()})
    (tmp_path / "a.msgpack").write_bytes(flax_bytes({"net": {name[4:]: value for name, value in arrays.items()}}))
    assert len(list(tmp_path.iterdir())) == 5
    for path in tmp_path.iterdir():
        read = read_checkpoint(path)
        assert list(read) == list(state), path
        assert all(torch.equal(read[name], value) for name, value in state.items()), path


class Malicious:
    """Would make a folder when unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "args", "bare pickle", "npz"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, kind):
    trap, path = tmp_path / "trap", tmp_path / "evil.pt"
    evil = {"ema": {"a": torch.zeros(1)}, "opt": Malicious(trap)}
    if kind == "args":
        evil = {"ema": {"a": torch.zeros(1)}, "args": argparse.Namespace(lr=Malicious(trap))}
    if kind == "npz":
        path = tmp_path / "evil.npz"
        np.savez(path, **{"net/x": np.array([Malicious(trap)], dtype=object)})
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps({"opt": Malicious(trap)}, protocol=2))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(ValueError, match=re.escape(str(path))) as refusal:
        read_checkpoint(path)
    assert not trap.exists()
    if kind != "npz":
        assert "mkdir, which could run code when opened; it was not opened" in str(refusal.value)
    # The file is what it seems: read without care, it does its harm.
    if kind == "bare pickle":
        pickle.loads(path.read_bytes())
        assert trap.exists()


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.pt", "checkpoint_1"])
@pytest.mark.parametrize("content", ["empty", "text", "cut"])
def test_damaged_file_is_refused_by_name(tmp_path, name, content):
    path = tmp_path / name
    state = {"net/x": torch.randn(30, 20)}
    if name.endswith("npz"):
        np.savez(path, **{"net/x": state["net/x"].numpy()})
    elif name.endswith("safetensors"):
        safetensors.torch.save_file(state, path)
    elif name.endswith("pt"):
        torch.save(state, path)
    else:
        path.write_bytes(flax_bytes({"net": {"x": state["net/x"].numpy()}}))
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no checkpoint at all", "cut": whole[: len(whole) // 2]}[content])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "use_ema", "words"),
    [
        ({"model": {"a": torch.zeros(1)}}, True, "it has 'model' and no 'ema'"),
        ({"ema": {"a": torch.zeros(1)}}, False, "it has 'ema' and no 'model'"),
        ({"a": torch.zeros(1)}, False, "one set of parameters"),
        ({"a": "text"}, True, "a is a str, but a tensor is wanted"),
        ([torch.zeros(1)], True, "it holds a list"),
    ],
)
def test_file_without_what_was_asked_for_is_refused(tmp_path, content, use_ema, words):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=words) as refusal:
        read_checkpoint(path, use_ema=use_ema)
    assert str(path) in str(refusal.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at .*absent.pt"):
        read_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="is a folder or an archive"):
        read_checkpoint(tmp_path)
