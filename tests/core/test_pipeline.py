"""Sampling: flow maps, guidance, seeds, outputs, and refused arguments."""

import itertools

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from meanflow_core.networks.interface import Conditioning
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.sampling import noise_between, noise_from_seeds


def flow_map_steps(pipeline, z, labels, grid):
    """The expected latents: z_r = z_t - (t - r) u(z_t, r, t) along a grid of times."""
    labels = torch.tensor(labels)
    with torch.no_grad():
        for t, r in itertools.pairwise(grid):
            conditioning = Conditioning(t=torch.full((len(z),), t), r=torch.full((len(z),), r), labels=labels)
            z = z - (t - r) * pipeline.transformer(z, conditioning).u
    return z


@pytest.mark.parametrize(
    ("steps", "grid"),
    [
        ({}, (1.0, 0.0)),
        ({"num_inference_steps": 3}, (1.0, 2 / 3, 1 / 3, 0.0)),
        ({"timesteps": (1.0, 0.9, 0.15, 0.0)}, (1.0, 0.9, 0.15, 0.0)),
    ],
)
def test_sampling_follows_the_flow_map(pipeline, steps, grid):
    noise = noise_from_seeds([1, 2], (4, 8, 8))
    latents = pipeline([3, 4], latents=noise, output_type="latent", **steps).images
    torch.testing.assert_close(latents, flow_map_steps(pipeline, noise, [3, 4], grid), atol=1e-5, rtol=1e-5)


def test_flow_matching_converges_to_the_exact_solution_and_heun_at_second_order(flow_pipeline):
    flow_pipeline.transformer.to(torch.float64)  # but not the autoencoder, which all tests share
    noise = noise_from_seeds([5], (4, 8, 8))

    def velocity(t, z):
        with torch.no_grad():
            time = torch.tensor([t], dtype=torch.float64)
            conditioning = Conditioning(t=time, r=time, labels=torch.tensor([2]))
            return flow_pipeline.transformer(torch.from_numpy(z).view(1, 4, 8, 8), conditioning).u.flatten().numpy()

    exact = solve_ivp(velocity, (1.0, 0.0), noise.double().flatten().numpy(), rtol=1e-9, atol=1e-9).y[:, -1]

    def error(steps, solver):
        z = flow_pipeline([2], steps, latents=noise, solver=solver, output_type="latent").images
        return float((z.flatten().double() - torch.from_numpy(exact)).norm())

    assert error(40, "euler") < 0.6 * error(20, "euler")
    assert error(40, "heun") < 0.3 * error(20, "heun")
    assert error(40, "heun") < 0.1 * error(40, "euler")


@pytest.mark.parametrize(("interval", "guided"), [((0.5, 1.0), (1.0, 0.5)), ((0.6, 1.0), (1.0,)), ((0.0, 0.5), (0.5,))])
def test_flow_matching_is_guided_inside_the_interval_including_its_bounds(flow_pipeline, interval, guided):
    noise, labels = noise_from_seeds([5, 6], (4, 8, 8)), torch.tensor([2, 3])
    z, scale = noise, torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    with torch.no_grad():
        for t, r in ((1.0, 0.5), (0.5, 0.0)):
            time = torch.full((2,), t)
            conditional = flow_pipeline.transformer(z, Conditioning(t=time, r=time, labels=labels)).u
            null = flow_pipeline.transformer(z, Conditioning(t=time, r=time, labels=torch.full((2,), 10))).u
            z = z - (t - r) * (null + scale * (conditional - null) if t in guided else conditional)
    sampled = flow_pipeline(
        [2, 3], 2, latents=noise, guidance_scale=[1.0, 3.0], guidance_interval=interval, output_type="latent"
    ).images
    torch.testing.assert_close(sampled, z, atol=1e-5, rtol=1e-5)


def test_flow_matching_evaluates_the_null_class_only_in_guided_steps(flow_pipeline):
    sizes = []
    flow_pipeline.transformer.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    noise = noise_from_seeds([1, 2], flow_pipeline.latent_shape)
    flow_pipeline.sample_latents([1, 2], noise, 2)
    flow_pipeline.sample_latents([1, 2], noise, 4, guidance_scale=3.0, guidance_interval=(0.4, 0.8))
    assert sizes == [2, 2, 2, 4, 4, 2]  # two unguided steps; then four, guided at t = 0.75 and 0.5


def test_improved_meanflow_conditions_on_the_guidance(imf_pipeline):
    noise = noise_from_seeds([5, 6], (4, 8, 8))

    def sample(**options):
        return imf_pipeline([2, 3], latents=noise, output_type="latent", **options).images

    conditioning = Conditioning(
        t=torch.ones(2),
        r=torch.zeros(2),
        labels=torch.tensor([2, 3]),
        omega=torch.tensor([2.0, 6.0]),
        guidance_interval_start=torch.full((2,), 0.3),
        guidance_interval_end=torch.full((2,), 0.6),
    )
    with torch.no_grad():
        expected = noise - imf_pipeline.transformer(noise, conditioning).u
    sampled = sample(guidance_scale=[2.0, 6.0], guidance_interval=(0.3, 0.6))
    torch.testing.assert_close(sampled, expected, atol=1e-6, rtol=1e-6)
    default = sample(guidance_scale=4.0, guidance_interval=(0.2, 0.7))  # as the fixture configures it
    torch.testing.assert_close(sample(), default, atol=1e-6, rtol=0.0)
    assert not torch.allclose(sample(), sample(guidance_scale=1.0), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("kind", ["imf_pipeline", "flow_pipeline"])
def test_guidance_of_an_image_does_not_depend_on_its_batch(request, kind):
    pipeline = request.getfixturevalue(kind)
    guidance = [(3.0, (0.0, 1.0)), (3.0, (0.6, 1.0)), (1.0, (0.0, 1.0)), (5.0, (0.0, 0.4))]
    labels, noise = [2, 3, 4, 5], noise_from_seeds(range(4), (4, 8, 8))
    scales, intervals = zip(*guidance, strict=True)
    together = pipeline.sample_latents(labels, noise, 2, guidance_scale=scales, guidance_interval=list(intervals))
    for row, (scale, interval) in enumerate(guidance):
        alone = pipeline.sample_latents(
            labels[row : row + 1], noise[row : row + 1], 2, guidance_scale=scale, guidance_interval=interval
        )
        torch.testing.assert_close(together[row : row + 1], alone, atol=3e-6, rtol=1e-6)
    everywhere = pipeline.sample_latents(labels, noise, 2, guidance_scale=scales, guidance_interval=(0.0, 1.0))
    changed = (everywhere - together).flatten(1).abs().amax(dim=1) > 3e-5
    assert changed.tolist() == [False, True, False, True]


@pytest.mark.parametrize("kind", ["pipeline", "imf_pipeline", "flow_pipeline"])
def test_image_depends_on_class_seed_and_steps_but_not_on_its_batch(request, kind):
    pipeline = request.getfixturevalue(kind)
    alone = pipeline.images_from_seeds([3], [7], 3)[0].int()
    batch = pipeline.images_from_seeds([1, 3, 3, 9], [7, 8, 7, 0], 3).int()
    assert (alone - batch[2]).abs().max() <= 1
    assert not torch.equal(batch[1], batch[2])


def test_bfloat16_network_changes_the_image_by_rounding_only(pipeline):
    noise = noise_from_seeds([1], (4, 8, 8))
    exact = pipeline.images_from_seeds([3, 4], [7, 8], 2).int()
    pipeline.transformer.to(torch.bfloat16)
    rounded = pipeline.images_from_seeds([3, 4], [7, 8], 2).int()
    assert 0 < (rounded - exact).abs().float().mean() < 2.0
    with torch.no_grad():  # the noise stays in float32
        conditioning = Conditioning(t=torch.ones(1), r=torch.zeros(1), labels=torch.tensor([3]))
        expected = noise - pipeline.transformer(noise.bfloat16(), conditioning).u.float()
    latents = pipeline([3], latents=noise, output_type="latent").images
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=1e-6)


def test_every_output_type_contains_the_same_pixels(pipeline):
    expected = pipeline.images_from_seeds([0, 1], [5, 6])
    pil, array, tensor = (pipeline([0, 1], seeds=[5, 6], output_type=kind).images for kind in ("pil", "np", "pt"))
    assert [image.size for image in pil] == [(64, 64)] * 2
    assert pil[1].tobytes() == expected[1].numpy().tobytes()
    torch.testing.assert_close(torch.from_numpy(array), expected / 255.0)
    torch.testing.assert_close(tensor, expected.permute(0, 3, 1, 2) / 255.0)


def test_generator_is_a_source_of_noise_as_in_diffusers(pipeline, monkeypatch):
    freed = []
    monkeypatch.setattr(pipeline, "maybe_free_model_hooks", lambda: freed.append(1))
    [first] = pipeline([0], generator=torch.Generator().manual_seed(0), return_dict=False)
    again = pipeline([0], generator=torch.Generator().manual_seed(0)).images
    assert again[0].tobytes() == first[0].tobytes()
    assert freed == [1, 1]  # returns offloaded modules to the CPU


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"class_labels": []}, "at least one class, but got none"),
        ({"class_labels": [10]}, r"\[0, 9\], but got 10"),
        ({"class_labels": [-1]}, r"\[0, 9\], but got -1"),
        ({"class_labels": [2.7]}, "class ids must be whole numbers"),
        ({"class_labels": ["2"]}, "class ids must be whole numbers"),
        ({"num_inference_steps": 0}, "at least 1, but got 0"),
        ({"seeds": [1, 2]}, "seeds must be one per image, 1, but got 2"),
        ({"seeds": [-1]}, "seeds must lie in"),
        ({"seeds": [2**63]}, "seeds must lie in"),
        ({"seeds": [1], "generator": torch.Generator()}, "at most one of"),
        ({"seeds": [1], "latents": torch.zeros(1, 4, 8, 8)}, "at most one of"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"noise must have shape \(1, 4, 8, 8\)"),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, "noise must be finite"),
        ({"timesteps": ()}, "must decrease from 1.0 to 0.0"),
        ({"timesteps": (0.9, 0.0)}, "must decrease from 1.0 to 0.0"),
        ({"timesteps": (1.0, 0.5)}, "must decrease from 1.0 to 0.0"),
        ({"timesteps": (1.0, 0.5, 0.5, 0.0)}, "must decrease from 1.0 to 0.0"),
        ({"output_type": "jpeg"}, "output_type must be one of"),
        ({"solver": "heun"}, "requires a generator that predicts velocity, but this predicts average_velocity"),
        ({"solver": "rk4"}, "solver must be one of euler, heun"),
        ({"guidance_scale": 2.0}, "built into its weights"),
        ({"guidance_interval": (0.1, 0.5)}, "built into its weights"),
    ],
)
def test_invalid_arguments_are_refused_with_the_reason(pipeline, arguments, words):
    with pytest.raises(ValueError, match=words):
        pipeline(**{"class_labels": [0], **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"guidance_scale": 0.5}, "at least 1"),
        ({"guidance_scale": float("inf")}, "at least 1"),
        ({"guidance_scale": [[1.0, 2.0]]}, "one number or 2, one per image"),
        ({"guidance_scale": [1.0, 2.0, 3.0]}, "one number or 2, one per image"),
        ({"guidance_interval": (-0.1, 0.5)}, "0 <= start <= end <= 1"),
        ({"guidance_interval": (0.5, 1.1)}, "0 <= start <= end <= 1"),
        ({"guidance_interval": [(0.1, 0.2), (0.8, 0.2)]}, "0 <= start <= end <= 1"),
        ({"guidance_interval": [(0.1, 0.2)] * 3}, "or 2, one per image"),
    ],
)
def test_invalid_guidance_is_refused_with_the_reason(imf_pipeline, arguments, words):
    with pytest.raises(ValueError, match=words):
        imf_pipeline([0, 1], **arguments)


def test_unknown_prediction_is_refused(network, vae, pipeline):
    with pytest.raises(ValueError, match="average_velocity, velocity, consistency, epsilon, but got 'image'"):
        MeanFlowPipeline(network, vae, pipeline.scheduler, prediction="image")


def test_guidance_scale_of_one_is_allowed_for_every_generator(pipeline):
    noise = noise_from_seeds([1], (4, 8, 8))
    unguided = pipeline([3], latents=noise, guidance_scale=1.0, output_type="latent").images
    assert torch.equal(unguided, pipeline([3], latents=noise, output_type="latent").images)


def test_class_ids_may_be_a_tensor_or_an_array(pipeline):
    expected = pipeline.images_from_seeds([3, 4], [1, 2])
    for labels in (torch.tensor([3, 4]), np.array([3, 4])):
        assert torch.equal(pipeline.images_from_seeds(labels, [1, 2]), expected)


def test_class_names_are_looked_up_by_any_synonym(pipeline):
    assert pipeline.get_label_ids(["star", "Arrow"]) == [8, 0]
    assert pipeline.get_label_ids("ring") == [6]
    with pytest.raises(ValueError, match="unknown class name 'unicorn'"):
        pipeline.get_label_ids(["unicorn"])
    pipeline.register_to_config(id2label={"0": "crane, wader", "1": "crane"})
    assert pipeline.get_label_ids(["wader"]) == [0]
    with pytest.raises(ValueError, match=r"shared by the ids \[0, 1\]"):
        pipeline.get_label_ids(["crane"])


def test_interpolated_noise_starts_and_ends_at_the_given_noises_and_keeps_its_variance():
    start, end = noise_from_seeds([1] * 3, (4, 64, 64)), noise_from_seeds([2] * 3, (4, 64, 64))
    noise = noise_between(start, end, [0.0, 0.5, 1.0])
    assert torch.equal(noise[0], start[0])
    torch.testing.assert_close(noise[2], end[2], atol=1e-6, rtol=0.0)
    assert noise.flatten(1).std(dim=1) == pytest.approx(torch.ones(3), abs=0.03)
    with pytest.raises(ValueError, match=r"weights must lie in \[0, 1\], but got \[0.0, 1.5, 1.0\]"):
        noise_between(start, end, [0.0, 1.5, 1.0])
    with pytest.raises(ValueError, match="one weight per image"):
        noise_between(start, end, [0.5])
    with pytest.raises(ValueError, match="at least one seed, but got none"):
        noise_from_seeds([], (4, 8, 8))
