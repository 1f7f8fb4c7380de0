import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from meanflow_core.config import SamplingConfig
from meanflow_core.generator import build_pipeline, find_generator, for_sampling, load_pipeline, save_generator
from meanflow_core.pipeline import MeanFlowPipeline, noise_between, noise_from_seeds, time_grid
from meanflow_core.transformer import Conditioning
from pipelines.demo import images

# Sums of all levels of one image, some millions: another process rounds a few of them the other way.
SAME_IMAGE = 20


def largest_difference(first, second):
    return int((first.int() - second.int()).abs().max())


@pytest.fixture
def imf_pipeline(imf_network, vae):
    """A pipeline of improved MeanFlow: guidance is asked for."""
    sampling = SamplingConfig(guidance_scale=4.0, guidance_interval_start=0.2, guidance_interval_end=0.7)
    return build_pipeline(for_sampling(imf_network.eval()), vae, images.CLASS_NAMES, sampling=sampling)


@pytest.fixture
def flow_pipeline(network, vae):
    """A pipeline of flow matching: a velocity is integrated."""
    return build_pipeline(network.eval(), vae, images.CLASS_NAMES, is_flow_matching=True)


def test_one_step_is_noise_minus_average_velocity(pipeline):
    noise = noise_from_seeds([1, 2], (4, 8, 8))
    with torch.no_grad():
        conditioning = Conditioning(t=torch.ones(2), r=torch.zeros(2), labels=torch.tensor([3, 4]))
        expected = noise - pipeline.transformer(noise, conditioning).u
    latents = pipeline([3, 4], latents=noise, output_type="latent").images
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=1e-6)


def test_several_steps_follow_the_flow_map(pipeline):
    z = noise = noise_from_seeds([5], (4, 8, 8))
    labels = torch.tensor([2])
    with torch.no_grad():
        for t, r in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
            conditioning = Conditioning(t=torch.tensor([t]), r=torch.tensor([r]), labels=labels)
            z = z - (t - r) * pipeline.transformer(z, conditioning).u
    latents = pipeline([2], num_inference_steps=3, latents=noise, output_type="latent").images
    torch.testing.assert_close(latents, z, atol=1e-5, rtol=1e-5)


def test_steps_may_lie_on_any_grid(pipeline):
    z = noise = noise_from_seeds([5], (4, 8, 8))
    grid = (1.0, 0.9, 0.15, 0.0)
    with torch.no_grad():
        for t, r in itertools.pairwise(grid):
            conditioning = Conditioning(t=torch.tensor([t]), r=torch.tensor([r]), labels=torch.tensor([2]))
            z = z - (t - r) * pipeline.transformer(z, conditioning).u
    latents = pipeline([2], latents=noise, timesteps=grid, output_type="latent").images
    torch.testing.assert_close(latents, z, atol=1e-5, rtol=1e-5)
    equal = pipeline([2], latents=noise, timesteps=time_grid(4), output_type="latent").images
    torch.testing.assert_close(equal, pipeline([2], 4, latents=noise, output_type="latent").images, atol=1e-6, rtol=0.0)


def test_flow_matching_converges_to_the_solution_of_its_equation_heun_at_second_order(flow_pipeline):
    flow_pipeline.transformer.to(torch.float64)  # the autoencoder belongs to all tests
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


def test_flow_matching_is_guided_inside_the_interval_alone(flow_pipeline):
    noise = noise_from_seeds([5, 6], (4, 8, 8))
    labels = torch.tensor([2, 3])
    z = noise
    with torch.no_grad():
        for t, r in ((1.0, 0.5), (0.5, 0.0)):
            time = torch.full((2,), t)
            conditional = flow_pipeline.transformer(z, Conditioning(t=time, r=time, labels=labels)).u
            null = flow_pipeline.transformer(z, Conditioning(t=time, r=time, labels=torch.full((2,), 10))).u
            z = z - (t - r) * (conditional if t == 1.0 else null + 3.0 * (conditional - null))
    sampled = flow_pipeline(
        [2, 3], 2, latents=noise, guidance_scale=3.0, guidance_interval=(0.1, 0.9), output_type="latent"
    ).images
    torch.testing.assert_close(sampled, z, atol=1e-5, rtol=1e-5)


def test_improved_meanflow_is_told_its_guidance(imf_pipeline):
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
    told = sample(guidance_scale=[2.0, 6.0], guidance_interval=(0.3, 0.6))
    torch.testing.assert_close(told, expected, atol=1e-6, rtol=1e-6)
    # Unless told, the generator's own.
    torch.testing.assert_close(sample(), sample(guidance_scale=4.0, guidance_interval=(0.2, 0.7)), atol=1e-6, rtol=0.0)
    assert not torch.allclose(sample(), sample(guidance_scale=1.0), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("kind", ["pipeline", "imf_pipeline", "flow_pipeline"])
@pytest.mark.parametrize("steps", [1, 3])
def test_image_depends_on_class_seed_and_steps_and_not_on_its_batch(request, kind, steps):
    pipeline = request.getfixturevalue(kind)
    alone = pipeline.images_from_seeds([3], [7], steps)[0]
    batch = pipeline.images_from_seeds([1, 3, 3, 9, 2, 5, 8], [7, 8, 7, 0, 4, 7, 1], steps)
    assert largest_difference(alone, batch[2]) <= 1
    assert not torch.equal(batch[1], batch[2])


def test_bfloat16_network_makes_the_same_image_but_for_rounding(pipeline):
    exact = pipeline.images_from_seeds([3, 4], [7, 8], 2).int()
    pipeline.transformer.to(torch.bfloat16)
    rounded = pipeline.images_from_seeds([3, 4], [7, 8], 2).int()
    assert 0 < (rounded - exact).abs().float().mean() < 2.0


def test_outputs_have_the_forms_of_diffusers(pipeline):
    images = pipeline([0, 1], seeds=[0, 1]).images
    assert [image.size for image in images] == [(64, 64)] * 2
    assert pipeline([0], seeds=[0], output_type="np").images.shape == (1, 64, 64, 3)
    assert pipeline([0], seeds=[0], output_type="pt").images.shape == (1, 3, 64, 64)
    generator = torch.Generator().manual_seed(0)
    first = pipeline([0], generator=generator, return_dict=False)[0]
    assert len(first) == 1
    again = pipeline([0], generator=torch.Generator().manual_seed(0)).images
    assert again[0].tobytes() == first[0].tobytes()


def test_saved_generator_opens_in_a_fresh_interpreter_and_makes_the_same_image(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "generator")
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    expected = pipeline.images_from_seeds([3], [7], 1)
    again = load_pipeline(find_generator(tmp_path))
    assert again.class_names == pipeline.class_names
    assert largest_difference(again.images_from_seeds([3], [7], 1), expected) <= 1
    script = (
        "from meanflow_core.pipeline import MeanFlowPipeline\n"
        f"pipeline = MeanFlowPipeline.from_pretrained({str(tmp_path / 'generator')!r})\n"
        "print(pipeline.images_from_seeds([3], [7], 1).sum().item())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(result.stdout.splitlines()[-1]) == pytest.approx(int(expected.sum()), abs=SAME_IMAGE)


@pytest.mark.parametrize("kind", ["pipeline", "imf_pipeline"])
def test_portable_generator_opens_without_this_package(request, kind, tmp_path):
    pipeline = request.getfixturevalue(kind)
    folder = tmp_path / "generator"
    save_generator(pipeline, folder, portable=True)
    expected = pipeline.images_from_seeds([3], [7], 2)
    again = load_pipeline(folder)  # by our own list of networks
    assert largest_difference(again.images_from_seeds([3], [7], 2), expected) <= 1
    script = (
        "import sys\n"
        "sys.modules.update(meanflow_core=None)\n"  # as if it were not installed
        "from diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "print(pipeline.images_from_seeds([3], [7], 2).sum().item())"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.splitlines()[-1]) == pytest.approx(int(expected.sum()), abs=SAME_IMAGE)


def test_saved_improved_generator_opens_in_a_fresh_interpreter_by_diffusers_own_way(imf_pipeline, tmp_path):
    save_generator(imf_pipeline, tmp_path)
    script = (
        "from meanflow_core.pipeline import MeanFlowPipeline\n"
        f"pipeline = MeanFlowPipeline.from_pretrained({str(tmp_path)!r})\n"
        "print(pipeline.config.guidance_scale, pipeline.images_from_seeds([3], [7]).sum().item())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    scale, total = result.stdout.splitlines()[-1].split()
    assert float(scale) == 4.0
    assert int(total) == pytest.approx(int(imf_pipeline.images_from_seeds([3], [7]).sum()), abs=SAME_IMAGE)


def test_code_in_a_folder_is_never_run_by_our_own_stages(pipeline, tmp_path):
    save_generator(pipeline, tmp_path, portable=True)
    for file in ("pipeline.py", "transformer/meanflow_network.py"):
        (tmp_path / file).write_text("raise SystemExit('ran')")
    assert load_pipeline(tmp_path).class_names == pipeline.class_names
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="is a 'UNet2DModel', but known are MeanFlowDiT, ImprovedMeanFlowDiT"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"class_labels": []}, "at least one class"),
        ({"class_labels": [10]}, r"\[0, 9\], but got 10"),
        ({"class_labels": [-1]}, r"\[0, 9\], but got -1"),
        ({"class_labels": [0], "num_inference_steps": 0}, "at least 1, but got 0"),
        ({"class_labels": [0], "seeds": [1, 2]}, "one per image"),
        ({"class_labels": [0], "seeds": [-1]}, "seeds must lie in"),
        ({"class_labels": [0], "seeds": [2**63]}, "seeds must lie in"),
        ({"class_labels": [0], "seeds": [1], "generator": torch.Generator()}, "at most one of"),
        ({"class_labels": [0], "latents": torch.zeros(2, 4, 8, 8)}, r"noise must have shape \(1, 4, 8, 8\)"),
        ({"class_labels": [0], "timesteps": (0.9, 0.0)}, "must fall from 1.0 to 0.0"),
        ({"class_labels": [0], "timesteps": (1.0, 0.5, 0.5, 0.0)}, "must fall from 1.0 to 0.0"),
        ({"class_labels": [0], "timesteps": ()}, "must fall from 1.0 to 0.0"),
        ({"class_labels": [0], "latents": torch.zeros(1, 4, 4, 4)}, r"noise must have shape \(1, 4, 8, 8\)"),
        ({"class_labels": [0], "seeds": [1], "latents": torch.zeros(1, 4, 8, 8)}, "at most one of"),
        ({"class_labels": [0], "latents": torch.full((1, 4, 8, 8), torch.nan)}, "noise must be finite"),
        ({"class_labels": [0], "output_type": "jpeg"}, "output_type must be one of"),
        ({"class_labels": [0], "timesteps": (1.0, 0.5)}, "must fall from 1.0 to 0.0"),
        ({"class_labels": [0], "timesteps": (1.0, 0.5, 0.6, 0.0)}, "must fall from 1.0 to 0.0"),
        ({"class_labels": [0], "solver": "heun"}, "integrates a velocity"),
        ({"class_labels": [0], "solver": "rk4"}, "solver must be one of euler, heun"),
        ({"class_labels": [0], "guidance_scale": 2.0}, "built into its weights"),
        ({"class_labels": [0], "guidance_interval": (0.1, 0.5)}, "built into its weights"),
    ],
)
def test_wrong_calls_are_refused_with_the_reason(pipeline, arguments, words):
    with pytest.raises(ValueError, match=words):
        pipeline(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"guidance_scale": 0.5}, "at least 1"),
        ({"guidance_scale": float("nan")}, "at least 1"),
        ({"guidance_scale": float("inf")}, "at least 1"),
        ({"guidance_scale": [[1.0, 2.0]]}, "one number, or one per image"),
        ({"guidance_interval": (-0.1, 0.5)}, "0 <= start <= end <= 1"),
        ({"guidance_interval": (0.5, 1.1)}, "0 <= start <= end <= 1"),
        ({"guidance_scale": [1.0, 2.0, 3.0]}, "one per image, 2"),
        ({"guidance_interval": (0.8, 0.2)}, "0 <= start <= end <= 1"),
        ({"guidance_interval": [(0.1, 0.2), (0.8, 0.2)]}, "0 <= start <= end <= 1"),
        ({"guidance_interval": [(0.1, 0.2)] * 3}, "or one per image, 2"),
    ],
)
def test_wrong_guidance_is_refused_with_the_reason(imf_pipeline, arguments, words):
    with pytest.raises(ValueError, match=words):
        imf_pipeline([0, 1], **arguments)


def test_unknown_prediction_is_refused(network, vae, pipeline):
    with pytest.raises(ValueError, match="average_velocity, velocity, but got 'epsilon'"):
        MeanFlowPipeline(network, vae, pipeline.scheduler, prediction="epsilon")


def test_class_names_find_their_ids(pipeline):
    assert pipeline.get_label_ids(["star", "Arrow"]) == [8, 0]
    assert pipeline.get_label_ids("ring") == [6]
    with pytest.raises(ValueError, match="unknown class name 'unicorn'"):
        pipeline.get_label_ids(["unicorn"])
    pipeline.register_to_config(id2label={"0": "crane, wader", "1": "crane"})
    assert pipeline.get_label_ids(["wader"]) == [0]
    with pytest.raises(ValueError, match=r"shared by the ids \[0, 1\]"):
        pipeline.get_label_ids(["crane"])


def test_folder_without_a_generator_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model_index\.json"):
        find_generator(tmp_path)


def test_every_form_of_output_holds_the_same_pixels(pipeline):
    expected = pipeline.images_from_seeds([0, 1], [5, 6])
    pil, array, tensor = (pipeline([0, 1], seeds=[5, 6], output_type=kind).images for kind in ("pil", "np", "pt"))
    assert pil[1].tobytes() == expected[1].numpy().tobytes()
    torch.testing.assert_close(torch.from_numpy(array), expected / 255.0)
    torch.testing.assert_close(tensor, expected.permute(0, 3, 1, 2) / 255.0)


def test_noise_stays_in_float32_beside_a_bfloat16_network(pipeline):
    pipeline.transformer.to(torch.bfloat16)
    noise = noise_from_seeds([1], (4, 8, 8))
    with torch.no_grad():
        conditioning = Conditioning(t=torch.ones(1), r=torch.zeros(1), labels=torch.tensor([3]))
        expected = noise - pipeline.transformer(noise.bfloat16(), conditioning).u.float()
    torch.testing.assert_close(
        pipeline([3], latents=noise, output_type="latent").images, expected, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(("interval", "guided"), [((0.5, 1.0), (1.0, 0.5)), ((0.6, 1.0), (1.0,)), ((0.0, 0.5), (0.5,))])
def test_bounds_of_the_interval_belong_to_it_and_each_image_has_its_scale(flow_pipeline, interval, guided):
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


def test_unguided_flow_matching_asks_for_one_velocity_an_image(flow_pipeline):
    rows = []
    flow_pipeline.transformer.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    flow_pipeline([2, 3], 2, seeds=[0, 1], output_type="latent")
    assert rows == [2, 2]


def test_seeds_are_one_per_image(pipeline):
    with pytest.raises(ValueError, match="seeds must be one per image, 2, but got 1"):
        pipeline.images_from_seeds([0, 1], [1])


def test_no_guidance_may_be_asked_of_any_generator(pipeline):
    noise = noise_from_seeds([1], (4, 8, 8))
    asked = pipeline([3], latents=noise, guidance_scale=1.0, output_type="latent").images
    assert torch.equal(asked, pipeline([3], latents=noise, output_type="latent").images)


def test_class_names_stand_in_the_order_of_their_ids(network, vae):
    names = ["zebra", "ant", *"cdefghi", "cat", "bee"]
    class_names = build_pipeline(network, vae, names).class_names
    assert list(class_names.items()) == list(enumerate(names))  # 10 comes after 9, and no name moves


def test_network_for_sampling_has_no_velocity_head(imf_network, network):
    assert not for_sampling(imf_network).config.has_velocity_head
    assert for_sampling(network) is network


@pytest.mark.parametrize("kind", ["imf_pipeline", "flow_pipeline"])
def test_opened_generator_samples_as_it_was_saved_with_gradients_off(request, kind, tmp_path):
    saved = request.getfixturevalue(kind)
    save_generator(saved, tmp_path)
    opened = load_pipeline(tmp_path)
    for name in ("id2label", "prediction", "guidance_scale", "guidance_interval_start", "guidance_interval_end"):
        assert opened.config[name] == saved.config[name]
    modules = (opened.transformer, opened.vae)
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert not any(module.training for module in modules)


def test_folders_that_are_no_generators_are_refused_with_what_is_missing(pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"no model_index\.json in"):
        load_pipeline(tmp_path)
    save_generator(pipeline, tmp_path / "first")
    (tmp_path / "first" / "transformer" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json in"):
        load_pipeline(tmp_path / "first")


def test_generator_is_the_folder_itself_or_the_only_one_below(tmp_path):
    for name in ("first", "first/inner", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
    assert find_generator(tmp_path / "first") == tmp_path / "first"
    with pytest.raises(ValueError, match="but found 3"):
        find_generator(tmp_path)


def test_generator_opens_on_the_device_asked_for(pipeline, tmp_path):
    save_generator(pipeline, tmp_path)
    assert load_pipeline(tmp_path, "meta").device.type == "meta"


def test_call_gives_offloaded_modules_back(pipeline, monkeypatch):
    freed = []
    monkeypatch.setattr(pipeline, "maybe_free_model_hooks", lambda: freed.append(1))
    pipeline([0], seeds=[0])
    assert freed == [1]


def test_flow_matching_asks_for_the_null_class_inside_the_interval_alone(flow_pipeline):
    sizes = []
    flow_pipeline.transformer.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    noise = noise_from_seeds([1, 2], flow_pipeline.latent_shape)
    flow_pipeline.sample_latents([1, 2], noise, 4, guidance_scale=3.0, guidance_interval=(0.4, 0.8))
    assert sizes == [2, 4, 4, 2]  # at t = 1, 0.75, 0.5, 0.25


@pytest.mark.parametrize("labels", [[2.7], ["2"], torch.tensor([1.5])])
def test_class_ids_are_whole_numbers(pipeline, labels):
    with pytest.raises(ValueError, match="class ids must be whole numbers"):
        pipeline(labels, seeds=[1])


def test_class_ids_may_be_a_tensor_or_an_array(pipeline):
    wanted = pipeline([3, 4], seeds=[1, 2], output_type="np").images
    for labels in (torch.tensor([3, 4]), np.array([3, 4])):
        np.testing.assert_array_equal(pipeline(labels, seeds=[1, 2], output_type="np").images, wanted)
        np.testing.assert_array_equal(pipeline.images_from_seeds(labels, [1, 2]).numpy() / np.float32(255.0), wanted)


def test_no_images_at_all_are_refused(pipeline):
    with pytest.raises(ValueError, match="at least one class, but got none"):
        pipeline([], seeds=[])
    with pytest.raises(ValueError, match="at least one image, but got none"):
        pipeline.images_from_seeds([], [])


@pytest.mark.parametrize("part", ["vae", "scheduler"])
def test_generator_without_a_part_is_refused_and_not_looked_for_elsewhere(pipeline, tmp_path, part):
    save_generator(pipeline, tmp_path)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(ValueError, match=f"no {part}/ in .*; a generator is a folder that save_pretrained wrote whole"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("kind", ["imf_pipeline", "flow_pipeline"])
def test_each_image_has_its_guidance_and_interval_whatever_shares_its_batch(request, kind):
    pipeline = request.getfixturevalue(kind)
    rows = [(3.0, (0.0, 1.0)), (3.0, (0.6, 1.0)), (1.0, (0.0, 1.0)), (5.0, (0.0, 0.4))]
    labels, noise = [2, 3, 4, 5], noise_from_seeds(range(4), (4, 8, 8))
    scales, intervals = zip(*rows, strict=True)
    together = pipeline.sample_latents(labels, noise, 2, guidance_scale=scales, guidance_interval=list(intervals))
    for row, (scale, interval) in enumerate(rows):
        alone = pipeline.sample_latents(
            labels[row : row + 1], noise[row : row + 1], 2, guidance_scale=scale, guidance_interval=interval
        )
        torch.testing.assert_close(together[row : row + 1], alone, atol=3e-6, rtol=1e-6)
    everywhere = pipeline.sample_latents(labels, noise, 2, guidance_scale=scales, guidance_interval=(0.0, 1.0))
    moved = (everywhere - together).flatten(1).abs().amax(dim=1) > 3e-5
    assert moved.tolist() == [False, True, False, True]


def test_noise_between_two_seeds_begins_and_ends_with_them_and_keeps_its_variance():
    start, end = noise_from_seeds([1] * 3, (4, 64, 64)), noise_from_seeds([2] * 3, (4, 64, 64))
    way = noise_between(start, end, [0.0, 0.5, 1.0])
    assert torch.equal(way[0], start[0])
    torch.testing.assert_close(way[2], end[2], atol=1e-6, rtol=0.0)
    assert way.flatten(1).std(dim=1) == pytest.approx(torch.ones(3), abs=0.03)
    with pytest.raises(ValueError, match=r"weights must lie in \[0, 1\], but got \[0.0, 1.5, 1.0\]"):
        noise_between(start, end, [0.0, 1.5, 1.0])
    with pytest.raises(ValueError, match="a weight per image"):
        noise_between(start, end, [0.5])


def test_wordnet_ids_are_kept(network, vae, tmp_path):
    save_generator(build_pipeline(network, vae, ["cat", "dog"], wnids=["n02121808", "n02084071"]), tmp_path / "g")
    assert load_pipeline(tmp_path / "g").config.wnids == {"0": "n02121808", "1": "n02084071"}
