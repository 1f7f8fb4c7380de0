import subprocess
import sys

import pytest
import torch

from meanflow_core.generator import find_generator, load_pipeline
from meanflow_core.pipeline import noise_from_seeds
from meanflow_core.transformer import Conditioning


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


def test_image_depends_on_class_and_seed_and_not_on_its_batch(pipeline):
    alone = pipeline.images_from_seeds([3], [7], 1)[0]
    batch = pipeline.images_from_seeds([1, 3, 3, 9], [7, 8, 7, 0], 1)
    assert (alone.int() - batch[2].int()).abs().max() <= 1
    assert not torch.equal(batch[1], batch[2])


def test_outputs_have_the_forms_of_diffusers(pipeline):
    images = pipeline([0, 1], seeds=[0, 1]).images
    assert [image.size for image in images] == [(64, 64)] * 2
    assert pipeline([0], seeds=[0], output_type="np").images.shape == (1, 64, 64, 3)
    assert pipeline([0], seeds=[0], output_type="pt").images.shape == (1, 3, 64, 64)
    generator = torch.Generator().manual_seed(0)
    assert len(pipeline([0], generator=generator, return_dict=False)[0]) == 1


def test_saved_generator_opens_in_a_fresh_interpreter_and_makes_the_same_image(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "generator")
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    expected = pipeline.images_from_seeds([3], [7], 1)
    again = load_pipeline(find_generator(tmp_path))
    assert again.class_names == pipeline.class_names
    assert torch.equal(again.images_from_seeds([3], [7], 1), expected)
    script = (
        "from meanflow_core.pipeline import MeanFlowPipeline\n"
        f"pipeline = MeanFlowPipeline.from_pretrained({str(tmp_path / 'generator')!r})\n"
        "print(pipeline.images_from_seeds([3], [7], 1).sum().item())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(result.stdout.splitlines()[-1]) == int(expected.sum())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"class_labels": []}, "at least one class"),
        ({"class_labels": [10]}, r"\[0, 9\], but got 10"),
        ({"class_labels": [-1]}, r"\[0, 9\], but got -1"),
        ({"class_labels": [0], "num_inference_steps": 0}, "at least 1, but got 0"),
        ({"class_labels": [0], "seeds": [1, 2]}, "one per image"),
        ({"class_labels": [0], "seeds": [-1]}, "seeds must lie in"),
        ({"class_labels": [0], "latents": torch.zeros(1, 4, 4, 4)}, r"noise must have shape \(1, 4, 8, 8\)"),
        ({"class_labels": [0], "seeds": [1], "latents": torch.zeros(1, 4, 8, 8)}, "at most one of"),
        ({"class_labels": [0], "output_type": "jpeg"}, "output_type must be one of"),
    ],
)
def test_wrong_calls_are_refused_with_the_reason(pipeline, arguments, words):
    with pytest.raises(ValueError, match=words):
        pipeline(**arguments)


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
