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


def test_per_channel_statistics_take_precedence_over_the_scale_and_can_be_undone():
    config = {"latent_channels": 2, "scaling_factor": 9.0, "latents_mean": [1.0, -2.0], "latents_std": [2.0, 4.0]}
    normalization = LatentNormalization.from_vae_config(config)
    raw = torch.tensor([3.0, 2.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(normalization.normalize(raw).flatten(), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(normalization.denormalize(normalization.normalize(raw)), raw)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "needs latents_mean and latents_std, or a scaling_factor other than 0, but has None"),
        ({"scaling_factor": 0.5, "latents_mean": [0.0]}, "must have both latents_mean and latents_std or neither"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "latents_mean must have 1 values, .* but has 3"),
        ({"latents_mean": [0.0], "latents_std": [0.0]}, "standard deviations above 0, but got"),
        ({"latents_mean": [0.0], "latents_std": [1.0, 1.0]}, "one value per channel, but got 1 and 2"),
    ],
)
def test_vae_config_without_a_valid_normalisation_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        LatentNormalization.from_vae_config({"latent_channels": 1, **config})


def test_latents_are_mean_plus_std_times_noise():
    moments = torch.cat([torch.full((1, 2, 2, 2), 3.0), torch.full((1, 2, 2, 2), 0.5)], dim=1).half()
    noise = torch.randn(1, 2, 2, 2)
    identity = LatentNormalization(mean=(0.0, 0.0), std=(1.0, 1.0))
    latents = sample_latents(moments, noise, identity)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, 3.0 + 0.5 * noise)
    with pytest.raises(ValueError, match="posterior noise of shape"):
        sample_latents(moments, noise[:, :1], identity)


def test_latents_with_another_number_of_channels_are_refused():
    normalization = LatentNormalization(mean=(0.0,) * 4, std=(1.0,) * 4)
    with pytest.raises(ValueError, match=r"must have 4 channels, but got shape \(2, 1, 3, 3\)"):
        normalization.normalize(torch.zeros(2, 1, 3, 3))
