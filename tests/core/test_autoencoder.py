"""The autoencoder: moments, decoding, rounding, hashes."""

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

from meanflow_core.autoencoder import (
    decode_latents,
    decode_preview,
    encode_moments,
    load_autoencoder,
    load_preview_decoder,
    reconstruct,
    to_float_images,
    to_uint8_images,
    weight_hash,
)
from meanflow_core.latents import LatentNormalization
from meanflow_core.metrics import peak_signal_to_noise
from pipelines.demo import images
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER


def test_uint8_images_are_127_5_x_plus_128_truncated():
    levels = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0, 3.0]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_uint8_images(levels)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 255, 255, 255]


def test_every_uint8_level_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_uint8_images(to_float_images(pixels)), pixels)


def test_images_with_another_layout_are_refused():
    with pytest.raises(ValueError, match=r"\(B, H, W, 3\)"):
        to_float_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        to_float_images(torch.zeros(1, 8, 8, 3))


def test_shipped_autoencoder_reaches_30_db_and_is_below_4_mb(vae):
    pixels = torch.from_numpy(images.draw_many("val", 0, 20)[0])
    assert peak_signal_to_noise(reconstruct(vae, pixels), pixels) >= 30.0
    assert sum(path.stat().st_size for path in SHIPPED_AUTOENCODER.iterdir()) <= 4_000_000


def test_moments_are_downsampled_by_8_and_normalise_to_unit_variance(vae):
    pixels = torch.from_numpy(images.draw_many("val", 0, 40)[0])
    moments = encode_moments(vae, pixels)
    assert moments.shape == (40, 8, 8, 8)
    mean, std = moments.chunk(2, dim=1)
    assert (std > 0).all()
    latents = LatentNormalization.from_vae_config(vae.config).normalize(mean)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=0.15, rtol=0)
    decoded = decode_latents(vae, latents)
    assert decoded.dtype == torch.uint8
    assert (decoded.float() - pixels.float()).abs().mean() < 4.0


def test_weight_hash_changes_with_one_weight(vae):
    same = load_autoencoder(str(SHIPPED_AUTOENCODER))
    assert weight_hash(same) == weight_hash(vae)
    with torch.no_grad():
        next(same.parameters()).view(-1)[0] += 1e-3
    assert weight_hash(same) != weight_hash(vae)


def test_error_for_a_missing_autoencoder_names_its_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json in"):
        load_autoencoder(str(tmp_path))


def test_moments_are_mean_and_standard_deviation(vae):
    pixels = torch.from_numpy(images.draw_many("val", 0, 2)[0])
    with torch.no_grad():
        posterior = vae.encode(to_float_images(pixels)).latent_dist
    assert torch.equal(encode_moments(vae, pixels), torch.cat([posterior.mean, posterior.std], dim=1))


def test_weight_hash_depends_on_names_dtypes_and_shapes():
    def module_with_buffer(name, values):
        module = torch.nn.Module()
        module.register_buffer(name, values)
        return module

    values = torch.zeros(2, 2)
    others = (
        module_with_buffer("b", values),
        module_with_buffer("a", values.int()),
        module_with_buffer("a", values.flatten()),
    )
    assert len({weight_hash(module) for module in (module_with_buffer("a", values), *others)}) == 4


def test_loaded_autoencoder_is_frozen_and_in_eval_mode(vae):
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_autoencoder_without_weights_is_refused(vae, tmp_path):
    vae.save_config(tmp_path)
    with pytest.raises(ValueError, match="cannot load an autoencoder from"):
        load_autoencoder(str(tmp_path))


def test_half_precision_latents_are_scaled_in_float32(vae):
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(decode_latents(vae, latents), decode_latents(vae, latents.float()))


def test_preview_decoder_gets_the_vaes_shift_and_scale_for_any_normalisation(tmp_path):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    tiny.save_pretrained(tmp_path / "tiny")
    opened = load_preview_decoder(str(tmp_path / "tiny"))
    plain = AutoencoderKL(block_out_channels=(32,), scaling_factor=0.2, shift_factor=0.5)
    per_channel = AutoencoderKL(
        block_out_channels=(32,), scaling_factor=0.2, shift_factor=0.5, latents_mean=[0.0, 1.0, 2.0, 3.0],
        latents_std=[1.0, 2.0, 3.0, 4.0],
    )  # fmt: skip
    raw = torch.randn(2, 4, 8, 8)
    expected = to_uint8_images(tiny.decode((raw - 0.5) * 0.2).sample)
    for vae in (plain, per_channel):
        latents = LatentNormalization.from_vae_config(vae.config).normalize(raw)
        images = decode_preview(opened, vae, latents)
        assert images.shape == (2, 16, 16, 3)
        assert (images.int() - expected.int()).abs().max() <= 1
    dc = AutoencoderDC(  # has no shift_factor
        latent_channels=4, scaling_factor=0.2,
        encoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_block_out_channels=(8, 8), decoder_layers_per_block=(1, 1), decoder_qkv_multiscales=((), ()),
    )  # fmt: skip
    images = decode_preview(opened, dc, raw * 0.2)
    assert (images.int() - to_uint8_images(tiny.decode(raw * 0.2).sample).int()).abs().max() <= 1
    with pytest.raises(ValueError, match="cannot load an AutoencoderTiny from"):
        load_preview_decoder(str(tmp_path / "none"))
