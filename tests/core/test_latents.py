"""Latent normalisation, and sampling latents from moments."""

import pytest
import torch

from meanflow_core.latents import SD_SCALING_FACTOR, LatentNormalization, sample_latents


def test_normalisation_by_scale_follows_diffusers():
    normalization = LatentNormalization.from_vae_config(
        {"latent_channels": 4, "scaling_factor": SD_SCALING_FACTOR, "shift_factor": 0.1}
    )
    raw = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(normalization.normalize(raw), (raw - 0.1) * SD_SCALING_FACTOR)


def test_per_channel_statistics_take_precedence_over_the_scale_and_invert():
    config = {"latent_channels": 2, "scaling_factor": 9.0, "latents_mean": [1.0, -2.0], "latents_std": [2.0, 4.0]}
    normalization = LatentNormalization.from_vae_config(config)
    raw = torch.tensor([3.0, 2.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(normalization.normalize(raw).flatten(), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(normalization.denormalize(normalization.normalize(raw)), raw)


@pytest.mark.parametrize(
    "config",
    [
        {"latent_channels": 4},
        {"latent_channels": 4, "latents_mean": [0.0] * 4},
        {"latent_channels": 4, "latents_mean": [0.0] * 3, "latents_std": [1.0] * 3},
        {"latent_channels": 1, "latents_mean": [0.0], "latents_std": [0.0]},
    ],
)
def test_incomplete_normalisation_is_refused(config):
    with pytest.raises(ValueError, match="latent"):
        LatentNormalization.from_vae_config(config)


def test_latents_are_mean_plus_std_times_noise():
    moments = torch.cat([torch.full((1, 2, 2, 2), 3.0), torch.full((1, 2, 2, 2), 0.5)], dim=1).half()
    noise = torch.randn(1, 2, 2, 2)
    identity = LatentNormalization(mean=(0.0, 0.0), std=(1.0, 1.0))
    latents = sample_latents(moments, noise, identity)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, 3.0 + 0.5 * noise)
    with pytest.raises(ValueError, match="posterior noise of shape"):
        sample_latents(moments, noise[:, :1], identity)


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [((), (), "one value per channel, but got 0 and 0"), ((0.0, 0.0), (1.0,), "but got 2 and 1")],
)
def test_statistics_without_one_value_per_channel_are_refused(mean, std, words):
    with pytest.raises(ValueError, match=words):
        LatentNormalization(mean=mean, std=std)


def test_a_scale_does_not_replace_a_missing_list():
    with pytest.raises(ValueError, match="must have both latents_mean and latents_std or neither"):
        LatentNormalization.from_vae_config({"latent_channels": 1, "scaling_factor": 0.5, "latents_mean": [0.0]})


def test_latents_with_another_number_of_channels_are_refused():
    normalization = LatentNormalization(mean=(0.0,) * 4, std=(1.0,) * 4)
    with pytest.raises(ValueError, match=r"must have 4 channels, but got shape \(2, 1, 3, 3\)"):
        normalization.normalize(torch.zeros(2, 1, 3, 3))
