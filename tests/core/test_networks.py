"""The networks: published sizes, initialisation, positions, patches, derivatives, and the v head."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meanflow_core.config import DiTConfig, ImprovedDiTConfig
from meanflow_core.networks.building import build_network
from meanflow_core.networks.dit import MeanFlowDiT, sine_cosine_positions
from meanflow_core.networks.dual import Dual
from meanflow_core.networks.improved_dit import rotary_angles, rotate
from meanflow_core.networks.interface import Conditioning
from meanflow_core.networks.layers import unpatchify
from meanflow_core.presets import PRESETS
from meanflow_core.presets.improved_meanflow import imf_network
from meanflow_core.presets.meanflow import b2, dit_network, l2, m2, xl2
from tests.conftest import perturbed
from tests.support.objectives import relative


def on_meta(config, **shape):
    with torch.device("meta"):
        return build_network(config, **{"sample_size": 32, "in_channels": 4, "num_classes": 1000, **shape})


def num_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def conditioning(
    batch, t=0.8, r=0.3, label=1, omega=3.0, guidance_interval_start=0.2, guidance_interval_end=0.7, device="cpu"
):
    values = {
        "t": t,
        "r": r,
        "omega": omega,
        "guidance_interval_start": guidance_interval_start,
        "guidance_interval_end": guidance_interval_end,
    }
    vectors = {name: torch.full((batch,), value, device=device) for name, value in values.items()}
    return Conditioning(**vectors, labels=torch.full((batch,), label, device=device))


def giga_macs(network):
    z = torch.empty(1, 4, 32, 32, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(z, conditioning(1, device="meta"))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(
    ("preset", "millions", "published_giga_macs"),
    [(b2, 131, 23.1), (m2, 308, 54.0), (l2, 459, 80.9), (xl2, 676, 119.0)],
    ids=["b2", "m2", "l2", "xl2"],
)
def test_meanflow_networks_have_the_published_size_and_cost(preset, millions, published_giga_macs):
    network = on_meta(preset().network)
    assert num_parameters(network) == pytest.approx(millions * 1e6, rel=0.01)
    assert giga_macs(network) == pytest.approx(published_giga_macs, rel=0.03)


@pytest.mark.parametrize(
    ("size", "millions", "trained_millions", "published_giga_macs"),
    [
        ("B", 89, 146, 24.9),
        ("M", 174, 231, None),
        pytest.param("L", 409, 510, 116.4, marks=pytest.mark.soak),
        ("XL", 610, 711, 174.6),
    ],
)
def test_improved_meanflow_networks_have_the_published_size_and_cost(
    size, millions, trained_millions, published_giga_macs
):
    network = on_meta(imf_network(size))
    assert num_parameters(network) == pytest.approx(trained_millions * 1e6, rel=0.01)
    sampling = network.for_sampling()
    assert num_parameters(sampling) == pytest.approx(millions * 1e6, rel=0.01)
    if published_giga_macs is not None:
        assert giga_macs(sampling) == pytest.approx(published_giga_macs, rel=0.03)


def test_every_preset_supports_512_pixels_and_16_latent_channels():
    networks = [preset().network for preset in PRESETS.values()]
    for config in {network.with_block_counts((1,) * len(network.block_counts)) for network in networks}:
        network = on_meta(config, sample_size=64, in_channels=16)
        output = network(torch.empty(1, 16, 64, 64, device="meta"), conditioning(1, device="meta"))
        assert output.u.shape == (1, 16, 64, 64)


def test_error_for_an_unknown_size_lists_the_known_sizes():
    with pytest.raises(ValueError, match="S, B, M, L, XL, but got 'H'"):
        dit_network("H", 2)
    with pytest.raises(ValueError, match="B, M, L, XL, but got 'S'"):
        imf_network("S")


def test_new_improved_network_outputs_zero_and_has_the_papers_variances():
    torch.manual_seed(0)
    config = replace(imf_network("B"), depth=2, aux_head_depth=1)
    network = build_network(config, sample_size=8, in_channels=4, num_classes=1000)
    output = network(torch.randn(1, 4, 8, 8), conditioning(1))
    assert torch.equal(output.u, torch.zeros(1, 4, 8, 8))
    assert torch.equal(output.v, torch.zeros(1, 4, 8, 8))
    width = 768
    for parameter, deviation in (
        (network.u_heads[0].attn.q_proj.weight, 0.32 / width**0.5),
        (network.shared_blocks[0].mlp.w2.weight, 0.32 / 2048**0.5),
        (network.h_embedder.mlp[0].weight, 1.0 / 256**0.5),
        (network.omega_embedder.mlp[2].weight, 1.0 / width**0.5),
        (network.y_embedder.embedding_table.weight, 1.0 / width**0.5),
        (network.class_tokens, 1.0 / width**0.5),
        (network.x_embedder.proj.weight, (2 / (16 + width)) ** 0.5),  # Xavier over a patch's 16 values
    ):
        assert float(parameter.detach().std()) == pytest.approx(deviation, rel=0.05)
    for block in (network.shared_blocks[0], network.u_heads[0], network.v_heads[0]):
        assert not block.attn_scale.any()
        assert not block.mlp_scale.any()


def test_improved_network_depends_on_every_input_and_on_t_only_through_h(imf_network):
    z = torch.randn(1, 4, 8, 8)
    base = imf_network(z, conditioning(1))
    for other in (
        conditioning(1, r=0.2),
        conditioning(1, label=10),
        conditioning(1, omega=5.0),
        conditioning(1, guidance_interval_start=0.4),
        conditioning(1, guidance_interval_end=0.9),
    ):
        changed = imf_network(z, other)
        assert not torch.allclose(changed.u, base.u, atol=3e-6, rtol=0.0)
        assert not torch.allclose(changed.v, base.v, atol=3e-6, rtol=0.0)
    same_h = imf_network(z, conditioning(1, t=0.9, r=0.4))
    torch.testing.assert_close(same_h.u, base.u, atol=1e-6, rtol=0.0)


def test_velocity_only_skips_the_u_head(imf_network):
    z = torch.randn(2, 4, 8, 8)
    full, velocity_only = imf_network(z, conditioning(2)), imf_network(z, conditioning(2), velocity_only=True)
    assert torch.equal(velocity_only.velocity, full.v)
    assert velocity_only.u is None
    ran = []
    for block in [*imf_network.u_heads, imf_network.u_final_layer]:
        block.register_forward_hook(lambda *_: ran.append(1))
    imf_network(z, conditioning(2), velocity_only=True)
    assert ran == []


def test_network_without_velocity_head_has_the_same_u_and_mode(imf_network, network):
    sampling = imf_network.for_sampling()
    z = torch.randn(2, 4, 8, 8)
    assert torch.equal(sampling(z, conditioning(2)).u, imf_network(z, conditioning(2)).u)
    assert sampling(z, conditioning(2)).v is None
    assert imf_network.train().for_sampling().training
    assert not imf_network.eval().for_sampling().training
    assert network.for_sampling() is network  # has none
    assert not any(name.startswith("v_") for name in sampling.state_dict())
    with pytest.raises(ValueError, match="velocity_only needs a v head"):
        sampling(z, conditioning(2), velocity_only=True)


def test_rotary_dot_products_depend_only_on_relative_position():
    angles = rotary_angles(8, 12)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 12, 1, 8)  # the same vector at every position
    rotated_q, rotated_k = rotate(q, angles.cos(), angles.sin()), rotate(k, angles.cos(), angles.sin())
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1))
    products = rotated_q[0, :, 0] @ rotated_k[0, :, 0].T  # (N, N)
    torch.testing.assert_close(products[2, 5], products[6, 9], atol=1e-5, rtol=1e-5)
    assert not torch.isclose(products[2, 5], products[2, 6], atol=1e-3)


def test_gradients_of_rotation_match_finite_differences():
    angles = rotary_angles(4, 3).double()
    x = torch.randn(1, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles.cos(), angles.sin()), (x,))


@pytest.mark.parametrize("kind", ["dit", "imf_dit"])
def test_jvp_of_the_first_samples_equals_torch_func_jvp(network, imf_network, kind):
    network = (network if kind == "dit" else imf_network).double()
    z, tangent = torch.randn(5, 4, 8, 8).double(), torch.randn(3, 4, 8, 8).double()
    inputs, t = conditioning(5, label=2), torch.rand(5).double()
    inputs = replace(inputs, t=t, r=t * 0.4, omega=inputs.omega.double())
    output = network(z, inputs, tangent)

    first = inputs.rows(torch.arange(3))

    def u(z, t):
        return network(z, replace(first, t=t)).u

    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        expected_u, expected = torch.func.jvp(u, (z[:3], first.t), (tangent, torch.ones_like(first.t)))
    torch.testing.assert_close(output.u[:3], expected_u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.dudt, expected, rtol=1e-10, atol=1e-10)
    assert not output.dudt.requires_grad


@pytest.mark.parametrize("kind", ["dit", "imf_dit"])
def test_mismatched_shapes_are_refused(network, imf_network, kind):
    network = network if kind == "dit" else imf_network
    z = torch.randn(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"\(B, 4, 8, 8\), but got \(1, 4, 16, 16\)"):
        network(torch.randn(1, 4, 16, 16), conditioning(1))
    for shape in ((3, 4, 8, 8), (2, 4, 4, 4)):
        with pytest.raises(ValueError, match=r"tangent must have shape \(b, 4, 8, 8\) with b at most 2"):
            network(z, conditioning(2), torch.randn(shape))


def test_improved_network_requires_guidance_inputs(imf_network):
    for missing in ("omega", "guidance_interval_start", "guidance_interval_end"):
        with pytest.raises(ValueError, match="needs omega, guidance_interval_start and guidance_interval_end"):
            imf_network(torch.randn(1, 4, 8, 8), replace(conditioning(1), **{missing: None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": 9}, "multiple of the patch size"),
        ({"aux_head_depth": 5}, r"aux_head_depth must lie in \[0, depth = 3\]"),
        ({"aux_head_depth": -1}, r"aux_head_depth must lie in \[0, depth = 3\]"),
        ({"num_heads": 16}, "must be an even number"),
    ],
)
def test_invalid_sizes_of_improved_networks_are_refused(imf_network, changes, message):
    arguments = {name: value for name, value in imf_network.config.items() if not name.startswith("_")}
    with pytest.raises(ValueError, match=message):
        type(imf_network)(**{**arguments, **changes})


def test_improved_network_round_trips_through_a_folder(tmp_path):
    network = perturbed(build_network(PRESETS["debug_imf"]().network, sample_size=8, in_channels=4, num_classes=10))
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path, low_cpu_mem_usage=False)
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(again(z, conditioning(1)).u, network(z, conditioning(1)).u)


@pytest.mark.parametrize("architecture", ["dit", "imf_dit"])
def test_network_is_built_as_configured(architecture):
    sizes = {"patch_size": 4, "hidden_size": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 2.5}
    config = DiTConfig(**sizes) if architecture == "dit" else ImprovedDiTConfig(**sizes, aux_head_depth=1)
    built = build_network(config, sample_size=8, in_channels=5, num_classes=7)
    expected = {"patch_size": 4, "hidden_size": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 2.5, "in_channels": 5}
    assert {name: built.config[name] for name in expected} == expected
    inner = built.blocks[0].mlp.fc1 if architecture == "dit" else built.u_heads[0].mlp.w1
    assert inner.weight.shape == (120, 48)
    assert built.y_embedder.embedding_table.weight.shape == (8, 48)


def test_velocity_head_gets_no_tangent(imf_network):
    has_tangent = []
    for block in (*imf_network.v_heads, *imf_network.u_heads):
        block.register_forward_pre_hook(lambda _, arguments: has_tangent.append(arguments[0].tangent is not None))
    z = torch.randn(2, 4, 8, 8)
    imf_network(z, conditioning(2), z)
    assert has_tangent == [False, True]


def test_new_dit_outputs_zero():
    network = MeanFlowDiT(sample_size=8, hidden_size=48, depth=2, num_heads=3)
    assert torch.equal(network(torch.randn(2, 4, 8, 8), conditioning(2)).u, torch.zeros(2, 4, 8, 8))


def test_dit_depends_on_every_input(network):
    z = torch.randn(1, 4, 8, 8)
    base = network(z, conditioning(1)).u
    for other in (conditioning(1, t=0.7), conditioning(1, r=0.2), conditioning(1, label=10)):
        assert not torch.allclose(network(z, other).u, base, atol=1e-4)
    assert not torch.allclose(network(z + 0.1, conditioning(1)).u, base, atol=1e-4)


def test_unpatchify_restores_the_positions_of_patches():
    network = MeanFlowDiT(sample_size=4, in_channels=3, patch_size=2, hidden_size=12, depth=1, num_heads=1)
    with torch.no_grad():  # the embedder copies a patch's 12 values
        network.x_embedder.proj.weight.copy_(torch.eye(12).view(12, 3, 2, 2))
    z = torch.arange(48.0).view(1, 3, 4, 4)
    # Reorder each patch from (channel, row, column) to the final layer's (row, column, channel).
    tokens = network.x_embedder(Dual(z)).value
    patches = tokens.view(1, 4, 3, 2, 2).permute(0, 1, 3, 4, 2).reshape(1, 4, 12)
    assert torch.equal(unpatchify(patches, 2), z)


def test_position_embeddings_are_distinct_with_the_column_first():
    positions = sine_cosine_positions(16, 3)
    assert positions.shape == (9, 16)
    assert len({tuple(row.tolist()) for row in positions}) == 9
    assert torch.equal(positions[0, :8], positions[3, :8])  # same column
    assert torch.equal(positions[0, 8:], positions[1, 8:])  # same row


def test_new_dit_has_the_papers_variances_and_zero_gates():
    torch.manual_seed(0)
    network = MeanFlowDiT(hidden_size=384, depth=1, num_heads=6)
    for parameter, deviation in (
        (network.x_embedder.proj.weight, (2 / (16 + 384)) ** 0.5),  # Xavier over a patch's 16 values
        (network.blocks[0].attn.qkv.weight, (2 / (384 + 3 * 384)) ** 0.5),
        (network.blocks[0].mlp.fc1.weight, (2 / (384 + 4 * 384)) ** 0.5),
        (network.t_embedder.mlp[0].weight, 0.02),
        (network.h_embedder.mlp[2].weight, 0.02),
        (network.y_embedder.embedding_table.weight, 0.02),
    ):
        assert float(parameter.detach().std()) == pytest.approx(deviation, rel=0.03)
    zeros = [parameter for name, parameter in network.named_parameters() if name.endswith("bias")]
    zeros += [network.blocks[0].adaLN_modulation[1].weight, network.final_layer.adaLN_modulation[1].weight]
    assert not any(parameter.any() for parameter in zeros)


@pytest.mark.parametrize(
    "config",
    [
        DiTConfig(hidden_size=128, depth=28, num_heads=4),
        ImprovedDiTConfig(hidden_size=128, depth=28, num_heads=4, aux_head_depth=8),
    ],
    ids=["DiT", "improved"],
)
def test_dudt_under_bfloat16_is_about_as_accurate_as_u_at_full_depth(config):
    network = perturbed(build_network(config, sample_size=8, in_channels=4, num_classes=10))
    z, tangent = torch.randn(2, 8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = network(z, conditioning(8), tangent)
        with torch.autocast("cpu", torch.bfloat16):
            found = network(z, conditioning(8), tangent)
    error_u, error_dudt = relative(found.u, exact.u), relative(found.dudt, exact.dudt)
    assert 1e-3 < error_u < 0.01
    assert error_dudt < 2 * error_u
