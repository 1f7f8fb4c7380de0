import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from deploy.replica.engine import BatchOptions, Engine, ImageSpec
from deploy.replica.loading import load_model
from deploy.settings import Arguments
from meanflow_core.generator import load_pipeline, save_generator
from meanflow_core.sampling import noise_between, noise_from_seeds

ONE_STEP = BatchOptions((1.0, 0.0))


def largest_difference(first, second):
    return int(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max())


@pytest.fixture
def engine(generator_folder):
    return Engine(load_pipeline(generator_folder))


def limit_memory(engine, monkeypatch, max_images):
    """Makes decoding run out of memory above a number of images. Returns the list of attempted sizes."""
    sizes = []
    decode = engine.pipeline.vae.decode

    def limited(z):
        sizes.append(len(z))
        if len(z) > max_images:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(z)

    monkeypatch.setattr(engine.pipeline.vae, "decode", limited)
    return sizes


def test_an_image_depends_only_on_class_seed_and_steps(engine, generator_folder):
    expected = load_pipeline(generator_folder).images_from_seeds([3], [7], 2)[0].numpy()
    two_steps = BatchOptions((1.0, 0.5, 0.0))
    alone = engine.run(two_steps, [ImageSpec(3, 7)]).images[0]
    batch = engine.run(two_steps, [ImageSpec(label % 10, label) for label in range(9)] + [ImageSpec(3, 7)]).images
    assert largest_difference(alone, expected) <= 1
    assert largest_difference(batch[9], expected) <= 1
    assert batch.shape == (10, 64, 64, 3)
    assert largest_difference(batch[3], batch[9]) > 1  # another seed


def test_batches_of_one_size_give_the_same_bytes(engine):
    specs = [ImageSpec(label, 100 + label) for label in range(4)]
    images = engine.run(ONE_STEP, specs).images
    assert np.array_equal(engine.run(ONE_STEP, specs).images, images)
    neighbours = [specs[0], ImageSpec(9, 1), ImageSpec(8, 2), ImageSpec(7, 3)]
    assert np.array_equal(engine.run(ONE_STEP, neighbours).images[0], images[0])


def test_every_image_has_its_own_guidance_scale_and_interval(guided_folder):
    engine, pipeline = Engine(load_pipeline(guided_folder)), load_pipeline(guided_folder)
    options = [
        {},
        {"guidance_scale": 6.0},
        {"guidance_scale": 6.0, "guidance_interval": (0.0, 0.2)},
    ]
    images = engine.run(ONE_STEP, [ImageSpec(1, 5, **option) for option in options]).images
    for option, image in zip(options, images, strict=True):
        interval = [option["guidance_interval"]] if "guidance_interval" in option else None
        alone = pipeline.images_from_seeds(
            [1], [5], guidance_scale=option.get("guidance_scale"), guidance_interval=interval
        )[0].numpy()  # fmt: skip
        assert largest_difference(image, alone) <= 1


def test_guidance_defaults_to_the_generators_own(guided_folder, monkeypatch):
    engine = Engine(load_pipeline(guided_folder))
    engine.pipeline.register_to_config(
        guidance_scale=7.0, guidance_interval_start=0.1, guidance_interval_end=0.2
    )  # fmt: skip
    calls, sample = [], engine.pipeline.sample_latents
    monkeypatch.setattr(
        engine.pipeline, "sample_latents", lambda *args, **options: calls.append(options) or sample(*args, **options)
    )
    specs = [ImageSpec(1, 5), ImageSpec(1, 5, guidance_scale=3.0), ImageSpec(1, 5, guidance_interval=(0.3, 0.4))]
    engine.run(ONE_STEP, specs)
    assert calls[0]["guidance_scale"] == [7.0, 3.0, 7.0]
    assert calls[0]["guidance_interval"] == [(0.1, 0.2), (0.1, 0.2), (0.3, 0.4)]


def test_noise_interpolates_between_two_seeds(engine, generator_folder):
    pipeline = load_pipeline(generator_folder)
    start, end = noise_from_seeds([4], (4, 8, 8)), noise_from_seeds([9], (4, 8, 8))
    weights = (0.0, 0.25, 1.0)
    images = engine.run(ONE_STEP, [ImageSpec(2, 4, 9, weight) for weight in weights] + [ImageSpec(2, 4)]).images
    for image, weight in zip(images[:3], weights, strict=True):
        expected = pipeline(class_labels=[2], latents=noise_between(start, end, [weight]), output_type="np").images[0]
        assert largest_difference(image, np.round(255 * expected)) <= 1
    assert largest_difference(images[0], images[3]) <= 1


def test_batches_are_padded_to_the_next_warm_size(generator_folder, monkeypatch):
    engine = Engine(load_pipeline(generator_folder), batch_sizes=(4, 1), max_batch_size=4)
    sizes = limit_memory(engine, monkeypatch, max_images=100)
    engine.warm_up()
    assert sizes == [1, 4]
    images = engine.run(ONE_STEP, [ImageSpec(label, label) for label in range(3)]).images
    assert sizes[2:] == [4]
    assert images.shape[0] == 3
    expected = load_pipeline(generator_folder).images_from_seeds([2], [2])[0]
    assert largest_difference(images[2], expected) <= 1


def test_a_batch_that_runs_out_of_memory_is_halved_and_so_are_later_ones(engine, monkeypatch):
    specs = [ImageSpec(label, label) for label in range(10)]
    expected = engine.run(ONE_STEP, specs).images
    sizes = limit_memory(engine, monkeypatch, max_images=3)
    assert largest_difference(engine.run(ONE_STEP, specs).images, expected) <= 1
    assert sizes == [10, 5, 2, 2, 2, 2, 2]
    assert (engine.max_size_that_fits, engine.num_out_of_memory) == (2, 2)
    engine.run(ONE_STEP, specs[:4])
    assert sizes[7:] == [2, 2]


def test_halved_batches_keep_to_warm_sizes(generator_folder, monkeypatch):
    engine = Engine(load_pipeline(generator_folder), batch_sizes=(1, 4, 16))
    sizes = limit_memory(engine, monkeypatch, max_images=9)
    specs = [ImageSpec(label, label) for label in range(10)]
    assert len(engine.run(ONE_STEP, specs).images) == 10
    assert sizes == [16, 4, 4, 4]
    engine.run(ONE_STEP, specs[:3])
    assert sizes[4:] == [4]


def test_padding_is_dropped_if_only_padding_runs_out_of_memory(generator_folder, monkeypatch):
    engine = Engine(load_pipeline(generator_folder), batch_sizes=(4,), max_batch_size=4)
    sizes = limit_memory(engine, monkeypatch, max_images=2)
    assert len(engine.run(ONE_STEP, [ImageSpec(1, 1)]).images) == 1
    assert sizes == [4, 1]


def test_a_single_image_that_does_not_fit_is_an_error(engine, monkeypatch):
    limit_memory(engine, monkeypatch, max_images=0)
    with pytest.raises(torch.OutOfMemoryError):
        engine.run(ONE_STEP, [ImageSpec(0, 0), ImageSpec(1, 1)])


def test_previews_of_a_generator_in_pixels_are_refused(grey_pipeline, tmp_path):
    save_generator(grey_pipeline, tmp_path / "generator")
    AutoencoderTiny().save_pretrained(tmp_path / "tiny")
    arguments = Arguments(model=str(tmp_path / "generator"), preview_vae=str(tmp_path / "tiny"))
    with pytest.raises(ValueError, match="this one works on pixels; remove preview_vae"):
        load_model(arguments.model, arguments)


def test_previews_use_the_preview_decoder(generator_folder):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).eval()  # fmt: skip
    engine = Engine(load_pipeline(generator_folder), preview_decoder=tiny, max_batch_size=1)
    engine.warm_up()
    preview = engine.run(BatchOptions((1.0, 0.0), is_preview=True), [ImageSpec(0, 0)]).images
    assert preview.shape == (1, 64, 64, 3)
    assert largest_difference(preview, engine.run(ONE_STEP, [ImageSpec(0, 0)]).images) > 1


def test_bfloat16_images_are_close_to_float32(generator_folder):
    specs = [ImageSpec(label, label) for label in range(8)]
    exact = Engine(load_pipeline(generator_folder)).run(ONE_STEP, specs).images.astype(int)
    rough = Engine(load_pipeline(generator_folder), precision="bfloat16").run(ONE_STEP, specs).images.astype(int)
    # Measured maximum: 5 here, and 28 with the demo's trained generator, whose images have more contrast.
    assert 0 < np.abs(exact - rough).max() <= 12
    assert np.abs(exact - rough).mean() < 2.0


@pytest.mark.soak
def test_compiled_images_match_uncompiled_ones(generator_folder):
    specs = [ImageSpec(label, label) for label in range(3)]
    exact = Engine(load_pipeline(generator_folder)).run(ONE_STEP, specs).images
    compiled = Engine(load_pipeline(generator_folder), compiled=True, batch_sizes=(4,), max_batch_size=4)
    assert largest_difference(compiled.run(ONE_STEP, specs).images, exact) <= 1
