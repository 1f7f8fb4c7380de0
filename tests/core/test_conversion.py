"""Converted public checkpoints have the same outputs as the sources' networks; errors list every difference."""

import re

import pytest
import torch

from meanflow_core.interop import conversion
from meanflow_core.interop.conversion import SOURCES, convert_checkpoint, published_training, reverse_time
from meanflow_core.interop.readers import read_checkpoint
from meanflow_core.networks.interface import Conditioning
from tests.golden_check import GOLDEN_FOLDER, check_sampling, load, read_settings
from tests.support.objectives import relative
from tests.support.public_checkpoints import (
    AUX_DEPTH,
    CLASSES,
    DEPTH,
    HEADS,
    SIZE,
    C,
    D,
    P,
    checkpoint_of,
    imf_torch_state,
    positions_of_mae,
    reference_imf,
    reference_sit,
    sit_state,
)

TIMES = (0.0, 0.1, 0.37, 0.5, 0.93, 1.0)
BOUND = 3e-7  # relative error in float64; the conversion rounds parameters to float32


def batch():
    """A latent and a class for each of TIMES, and those times, in float64."""
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(len(TIMES), C, SIZE, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES + 1, (len(TIMES),), generator=generator)
    return z, labels, torch.tensor(TIMES, dtype=torch.float64)


def in_double(state):
    return {name: value.double() for name, value in state.items()}


@pytest.mark.parametrize("out_channels", [2 * C, C], ids=["with predicted variance", "without"])
@torch.no_grad()
def test_converted_sit_predicts_our_velocity_at_our_times(out_channels):
    state = sit_state(out_channels=out_channels)
    network = convert_checkpoint("sit", state).double()
    z, labels, t = batch()
    theirs = -reference_sit(in_double(state), z, labels, t_embedder=1 - t)[:, :C]
    # The comparison can fail: a wrong time changes the velocity by far more than the bound, as would a wrong sign or the
    # wrong half of the channels.
    assert relative(-reference_sit(in_double(state), z, labels, t_embedder=t)[:, :C], theirs) > 0.1
    ours = network(z, Conditioning(t=t, r=t, labels=labels)).u
    for row in range(len(TIMES)):
        assert relative(ours[row], theirs[row]) < BOUND


@torch.no_grad()
def test_converted_repa_predicts_the_same_velocity():
    state = sit_state(num_projectors=2)
    z, labels, t = batch()
    theirs = reference_sit(in_double(state), z, labels, t_embedder=t)
    ours = convert_checkpoint("repa", state).double()(z, Conditioning(t=t, r=t, labels=labels)).u
    assert relative(ours, theirs) < BOUND


@torch.no_grad()
def test_converted_zhuyu_cs_predicts_the_same_average_velocity():
    state = sit_state(embedders=("t_embedder", "r_embedder"))
    network = convert_checkpoint("zhuyu-cs", state).double()
    z, labels, t = batch()
    for r in (0.0 * t, 0.3 * t, t):
        theirs = reference_sit(in_double(state), z, labels, t_embedder=t, r_embedder=t - r)
        assert relative(network(z, Conditioning(t=t, r=r, labels=labels)).u, theirs) < BOUND


@pytest.mark.parametrize("has_velocity_head", [False, True], ids=["for sampling", "with v head"])
@torch.no_grad()
def test_converted_imf_torch_predicts_the_same_velocities(has_velocity_head):
    state = imf_torch_state(has_velocity_head)
    network = convert_checkpoint("imf-torch", state, sample_size=SIZE).double()
    z, labels, t = batch()
    guidance = {"omega": 1 + 3 * t, "guidance_interval_start": 0.4 * t, "guidance_interval_end": 0.5 + 0.4 * t}
    for r in (0.0 * t, 0.3 * t, t):
        u, v = reference_imf(in_double(state), z, labels, t - r, **guidance)
        ours = network(z, Conditioning(t=t, r=r, labels=labels, **guidance))
        assert relative(ours.u, u) < BOUND
        assert (ours.v is None) == (v is None) == (not has_velocity_head)
        assert v is None or relative(ours.v, v) < BOUND


@pytest.mark.parametrize("path", sorted(GOLDEN_FOLDER.glob("*.npz")), ids=lambda path: path.stem)
def test_authors_parameters_give_the_authors_samples(path):
    golden = load(path)
    is_improved = read_settings(golden)[2].needs_velocity_head
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
def test_converted_flow_matching_network_is_independent_of_r_but_can_learn_it(source):
    network = convert_checkpoint(source, checkpoint_of(source)).double()
    z, labels, t = batch()
    with torch.no_grad():
        outputs = [network(z, Conditioning(t=t, r=share * t, labels=labels)).u for share in (0.0, 0.4, 1.0)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[2])
    network(z, Conditioning(t=t, r=0.4 * t, labels=labels)).u.square().sum().backward()
    assert network.h_embedder.mlp[2].weight.grad.norm() > 1e-3
    assert 0.019 < network.h_embedder.mlp[0].weight.std() < 0.021
    again = convert_checkpoint(source, checkpoint_of(source)).double()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())


def test_reversing_time_twice_restores_the_layer():
    weight = sit_state()["t_embedder.mlp.0.weight"]
    torch.testing.assert_close(reverse_time(reverse_time(weight)), weight, rtol=0.0, atol=3e-7)
    assert relative(reverse_time(weight), weight) > 0.1


@pytest.mark.parametrize("source", SOURCES)
def test_every_parameter_of_a_file_becomes_one_parameter_of_the_network(source):
    state = checkpoint_of(source)
    network = convert_checkpoint(source, state, sample_size=SIZE)
    assert network.config.num_heads == HEADS  # as in the debug preset of this width and depth
    assert (network.config.hidden_size, network.config.patch_size) == (D, P)
    assert (network.config.in_channels, network.config.num_classes, network.config.sample_size) == (C, CLASSES, SIZE)
    assert network.config.depth == DEPTH + (AUX_DEPTH if "imf" in source else 0)
    convert = SOURCES[source].convert
    before = convert(state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert {value.dtype for value in before.values()} == {torch.float32}
    for name, value in state.items():
        if name.startswith(("pos_embed", "projectors.", "net.v_final_layer.")):
            continue  # dropped by the conversion
        after = convert({**state, name: value + 1.0})
        assert len([key for key in before if not torch.equal(before[key], after[key])]) == 1, name


@pytest.mark.parametrize("source", SOURCES)
def test_error_lists_every_parameter_that_does_not_match(source):
    state = checkpoint_of(source)
    converted = SOURCES[source].convert(state)
    names = list(convert_checkpoint(source, state, sample_size=SIZE).state_dict())
    biases = [name for name in state if name.endswith("bias") and "x_embedder" not in name and "v_final" not in name]
    lost, cut = biases[:2], biases[2]
    broken = {name: value for name, value in state.items() if name not in lost}
    broken |= {cut: state[cut][:-1], "surplus": torch.zeros(2), "other.surplus": torch.zeros(3)}
    with pytest.raises(ValueError, match="does not match") as error:
        convert_checkpoint(source, broken, sample_size=SIZE)
    message = str(error.value)
    converted_broken = SOURCES[source].convert(broken)
    missing = [f'"{name}"' for name in names if name not in converted_broken]
    assert len(missing) == 2
    assert f"Missing key(s) in state_dict: {', '.join(missing)}." in message
    assert 'Unexpected key(s) in state_dict: "surplus", "other.surplus".' in message
    shared = [name for name in converted_broken if name in converted]
    [shortened] = [name for name in shared if converted_broken[name].shape != converted[name].shape]
    assert message.count("size mismatch") == 1
    assert f"size mismatch for {shortened}: " in message


@pytest.mark.parametrize("name", ["t_embedder.mlp.0.weight", "final_layer.linear.weight", "final_layer.linear.bias"])
def test_errors_also_list_parameters_that_the_sit_converter_rewrites(name):
    state = sit_state(out_channels=2 * C)
    with pytest.raises(ValueError, match=re.escape(f"size mismatch for {name}:")):
        convert_checkpoint("sit", {**state, name: state[name][..., :-1]})
    del state[name]
    with pytest.raises(ValueError, match=rf'Missing key\(s\) in state_dict: "{name}"\.'):
        convert_checkpoint("sit", state)


@pytest.mark.parametrize(
    ("source", "file", "message"),
    [
        ("sit", "repa", "Unexpected .*projectors.0.0.weight"),
        ("repa", "sit", "size mismatch for final_layer.linear.weight: .*32, 64.*16, 64"),
        ("sit", "zhuyu-cs", "Unexpected .*r_embedder"),
        ("zhuyu-cs", "sit", "Missing .*h_embedder"),
        ("sit", "imf-torch", "from another source: it has no x_embedder.proj.weight"),
        ("official-meanflow", "official-imf", "no transformer blocks"),
        ("official-imf", "official-meanflow", "no transformer blocks"),
        ("imf-torch", "official-imf", "from another source: it has no x_embedder.proj.weight"),
    ],
)
def test_file_of_another_source_is_refused(source, file, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, checkpoint_of(file), sample_size=SIZE)


@pytest.mark.parametrize("source", ["sit", "repa", "zhuyu-cs"])
def test_step_size_embedder_is_refused_for_sources_that_have_none(source):
    state = checkpoint_of(source)
    state["h_embedder.mlp.0.bias"] = torch.zeros(D)
    with pytest.raises(ValueError, match=re.escape("it has h_embedder.mlp.0.bias")):
        convert_checkpoint(source, state)


def test_two_names_that_map_to_the_same_parameter_are_refused():
    state = imf_torch_state()
    state["x_embedder.proj.bias"] = torch.zeros(D)
    with pytest.raises(ValueError, match=re.escape("map to x_embedder.proj.bias")):
        convert_checkpoint("imf-torch", state, sample_size=SIZE)


def test_error_for_an_unknown_source_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown source 'dit'; known: official-meanflow, official-imf, imf-torch, sit"
    ):
        convert_checkpoint("dit", sit_state())


def test_stored_position_embedding_is_checked_and_determines_the_latent_size():
    state = sit_state(out_channels=2 * C)
    large = convert_checkpoint("sit", {**state, "pos_embed": positions_of_mae(side=6)})
    assert large.config.sample_size == 6 * P
    moved = state["pos_embed"] + 2e-4  # about the rounding error of a constant in a moving average
    assert convert_checkpoint("sit", {**state, "pos_embed": moved}).config.sample_size == SIZE
    for wrong in (positions_of_mae(row_first=True), state["pos_embed"][:, 1:], state["pos_embed"][0], torch.zeros(())):
        for convert in (conversion.from_sit, conversion.from_repa, conversion.from_zhuyu_cs):
            with pytest.raises(ValueError, match="must be the fixed sine-cosine embedding"):
                convert({**state, "pos_embed": wrong})
    with pytest.raises(
        ValueError, match="sample_size must be 8, the size of the stored position embedding, but got 16"
    ):
        convert_checkpoint("sit", state, sample_size=16)
    del state["pos_embed"]
    assert convert_checkpoint("sit", state).config.sample_size == 32
    assert convert_checkpoint("sit", state, sample_size=16).config.sample_size == 16


def test_sizes_are_inferred_from_shapes_except_the_number_of_heads():
    state = sit_state(out_channels=2 * C, inner=100)
    network = convert_checkpoint("sit", state, num_heads=4)
    assert network.config.num_heads == 4
    assert network.blocks[0].mlp.fc1.weight.shape == (100, D)
    deeper = {name.replace("blocks.1.", "blocks.2."): value for name, value in state.items()}
    with pytest.raises(ValueError, match="no published network has width 64 and depth 3.*; pass num_heads"):
        convert_checkpoint("sit", {**deeper, **state})
    assert convert_checkpoint("sit", {**deeper, **state}, num_heads=2).config.depth == 3


@pytest.mark.parametrize(
    ("is_improved", "width", "depth", "num_heads"),
    [(False, 384, 12, 6), (False, 768, 12, 12), (True, 768, 12, 12), (True, 1024, 48, 16)],
)
def test_published_networks_are_found_by_kind_width_and_depth(is_improved, width, depth, num_heads):
    found = published_training(width, depth, is_improved=is_improved)
    assert found.network.num_heads == num_heads
    assert found.network.has_velocity_head == is_improved
    assert published_training(width + 1, depth, is_improved=is_improved) is None
