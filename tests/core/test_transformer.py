"""MeanFlow's DiT: initialisation, positions, patches."""

import pytest
import torch

from meanflow_core.dual import Dual
from meanflow_core.transformer import Conditioning, MeanFlowDiT, sine_cosine_positions, unpatchify


def conditioning(batch, t=0.8, r=0.3, label=1):
    return Conditioning(t=torch.full((batch,), t), r=torch.full((batch,), r), labels=torch.full((batch,), label))


def test_fresh_network_outputs_zero():
    network = MeanFlowDiT(sample_size=8, hidden_size=48, depth=2, num_heads=3)
    assert torch.equal(network(torch.randn(2, 4, 8, 8), conditioning(2)).u, torch.zeros(2, 4, 8, 8))


def test_output_depends_on_every_input(network):
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
    # Values ordered (channel, row, column); the final layer's order is (row, column, channel).
    tokens = network.x_embedder(Dual(z)).value
    rows = tokens.view(1, 4, 3, 2, 2).permute(0, 1, 3, 4, 2).reshape(1, 4, 12)
    assert torch.equal(unpatchify(rows, 2), z)


def test_position_embeddings_are_distinct_with_the_column_first():
    positions = sine_cosine_positions(16, 3)
    assert positions.shape == (9, 16)
    assert len({tuple(row.tolist()) for row in positions}) == 9
    assert torch.equal(positions[0, :8], positions[3, :8])  # same column
    assert torch.equal(positions[0, 8:], positions[1, 8:])  # same row


def test_patch_size_that_does_not_divide_the_latent_is_refused():
    with pytest.raises(ValueError, match="multiple of the patch size"):
        MeanFlowDiT(sample_size=9, patch_size=2)


def test_fresh_network_has_dits_variances_and_zero_gates():
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
