"""The autoencoder whose latents are the pixels."""

import pytest
import torch

from meanflow_core.autoencoder import downsampling_factor, encode_moments, load_autoencoder, reconstruct
from meanflow_core.pixels import PixelAutoencoder


def random_images(*, grey: bool) -> torch.Tensor:
    """Images uint8 (4, 12, 12, 3)."""
    channels = 1 if grey else 3
    images = torch.randint(0, 256, (4, 12, 12, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images.expand(-1, -1, -1, 3).contiguous()


@pytest.mark.parametrize(("grey", "factor", "channels"), [(True, 1, 1), (True, 4, 16), (False, 1, 3), (False, 2, 12)])
def test_round_trip_through_a_saved_copy_is_exact_in_any_dtype(grey, factor, channels, tmp_path):
    statistics = {"latents_mean": [-0.4] * channels, "latents_std": [0.7] * channels}
    PixelAutoencoder(channels, factor, **statistics).save_pretrained(tmp_path)
    vae, images = load_autoencoder(str(tmp_path)), random_images(grey=grey)
    assert (vae.is_grey, downsampling_factor(vae), vae.config.latents_std) == (grey, factor, [0.7] * channels)
    moments = encode_moments(vae, images)
    assert moments.shape == (4, 2 * channels, 12 // factor, 12 // factor)
    assert not moments[:, channels:].any()  # no spread
    levels, stored_levels = (values.mul(127.5).add(128.0).floor() for values in (moments, moments.half().float()))
    assert torch.equal(stored_levels, levels)  # datasets store float16
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(reconstruct(torch.nn.Module.to(vae, dtype), images), images)


def test_blocks_become_channels():
    vae, images = PixelAutoencoder(4, 2), random_images(grey=True)
    mean = encode_moments(vae, images)[:, :4]
    levels = images[..., 0].float().div(127.5).sub(1.0)
    torch.testing.assert_close(mean[:, 1], levels[:, 0::2, 1::2])  # channel 1: upper right pixel of each block
    torch.testing.assert_close(mean[:, 2], levels[:, 1::2, 0::2])


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(ValueError, match=r"must be 4 \(grey\) or 12 \(RGB\) for blocks of 2x2 pixels, but got 3"):
        PixelAutoencoder(3, 2)


def test_pipeline_returns_grey_images(grey_pipeline, pipeline):
    assert [image.mode for image in grey_pipeline([0, 1], seeds=[0, 1]).images] == ["L", "L"]
    assert grey_pipeline.image_size == 16
    assert pipeline([0], seeds=[0]).images[0].mode == "RGB"
