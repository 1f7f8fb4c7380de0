"""Saving, finding and loading generator folders."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from meanflow_core.generator import build_pipeline, load_pipeline, save_generator
from meanflow_core.generator_folder import find_generator
from meanflow_core.pipeline import MeanFlowPipeline
from tests.support.readme import REPOSITORY

# Allowed difference between the pixel sums of two images: another process may round a few pixels differently.
MAX_SUM_DIFFERENCE = 20


def largest_difference(first, second):
    return int((first.int() - second.int()).abs().max())


def set_value(file, name, value):
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))


def run_in_new_process(script, **environment):
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].split()


@pytest.mark.parametrize("kind", ["grey_pipeline", pytest.param("pipeline", marks=pytest.mark.soak)])
def test_diffusers_opens_a_saved_generator_in_a_new_process_with_the_same_images(request, kind, tmp_path):
    pipeline = request.getfixturevalue(kind)
    save_generator(pipeline, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    scale, total = run_in_new_process(
        "from meanflow_core.pipeline import MeanFlowPipeline\n"
        f"pipeline = MeanFlowPipeline.from_pretrained({str(tmp_path)!r})\n"
        "print(pipeline.config.guidance_scale, pipeline.images_from_seeds([3], [7]).sum().item())"
    )
    assert float(scale) == pipeline.config.guidance_scale
    assert int(total) == pytest.approx(int(pipeline.images_from_seeds([3], [7]).sum()), abs=MAX_SUM_DIFFERENCE)


@pytest.mark.parametrize("kind", ["grey_pipeline", pytest.param("pipeline", marks=pytest.mark.soak)])
def test_portable_generator_opens_without_this_package(request, kind, tmp_path):
    pipeline = request.getfixturevalue(kind)
    folder = tmp_path / "generator"
    save_generator(pipeline, folder, portable=True)
    expected = pipeline.images_from_seeds([3], [7], 2)
    assert largest_difference(load_pipeline(folder).images_from_seeds([3], [7], 2), expected) <= 1
    [total] = run_in_new_process(
        "import sys\n"
        "sys.modules.update(meanflow_core=None)\n"  # as if it were not installed
        "from diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "print(pipeline.images_from_seeds([3], [7], 2).sum().item())",
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    assert int(total) == pytest.approx(int(expected.sum()), abs=MAX_SUM_DIFFERENCE)


@pytest.mark.parametrize("kind", ["pipeline", "imf_pipeline", "flow_pipeline", "grey_pipeline"])
def test_loaded_generator_makes_the_same_images_and_is_frozen(request, kind, tmp_path):
    saved = request.getfixturevalue(kind)
    save_generator(saved, tmp_path / "generator")
    loaded = load_pipeline(find_generator(tmp_path))
    assert loaded.class_names == saved.class_names
    for name in ("id2label", "prediction", "guidance_scale", "guidance_interval_start", "guidance_interval_end"):
        assert loaded.config[name] == saved.config[name]
    assert largest_difference(loaded.images_from_seeds([3], [7]), saved.images_from_seeds([3], [7])) <= 1
    modules = (loaded.transformer, loaded.vae)
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert not any(module.training for module in modules)


def test_loading_runs_no_code_from_the_folder(pipeline, tmp_path):
    save_generator(pipeline, tmp_path, portable=True)
    for file in ("pipeline.py", "transformer/meanflow_network.py"):
        (tmp_path / file).write_text("raise SystemExit('ran')")
    assert load_pipeline(tmp_path).class_names == pipeline.class_names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diffusers:UNet2DModel", "network_class of .* must be a NetworkModel, but diffusers:UNet2DModel is not"),
        (
            "meanflow_core.pipeline:MeanFlowPipeline",
            "must be a subclass of torch.nn.Module, but 'meanflow_core.pipeline:",
        ),
        ("meanflow_core.networks.dit:DiT", "cannot find 'meanflow_core.networks.dit:DiT'"),
        ("not_installed:Network", "cannot find 'not_installed:Network': No module named 'not_installed'"),
        (None, r"model_index\.json in .* does not name the network_class"),
    ],
)
def test_generator_with_another_network_class_is_refused(pipeline, tmp_path, name, message):
    save_generator(pipeline, tmp_path)
    set_value(tmp_path / "model_index.json", "network_class", name)
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path)


def test_generator_of_a_plain_module_that_cannot_be_imported_is_refused(pipeline, tmp_path):
    save_generator(pipeline, tmp_path)
    set_value(tmp_path / "model_index.json", "network_class", "meanflow_core.networks.forward_mode:ForwardModeNetwork")
    set_value(tmp_path / "transformer" / "config.json", "module_class", "not_installed:Network")
    with pytest.raises(ValueError, match="cannot find 'not_installed:Network': No module named 'not_installed'"):
        load_pipeline(tmp_path)


def test_generator_loads_on_the_given_device_with_its_wordnet_ids(network, vae, tmp_path):
    save_generator(build_pipeline(network, vae, ["cat", "dog"], wnids=["n02121808", "n02084071"]), tmp_path)
    pipeline = load_pipeline(tmp_path, "meta")
    assert pipeline.device.type == "meta"
    assert pipeline.config.wnids == {"0": "n02121808", "1": "n02084071"}


def test_class_names_are_sorted_by_id(network, vae):
    names = ["zebra", "ant", *"cdefghi", "cat", "bee"]
    class_names = build_pipeline(network, vae, names).class_names
    assert list(class_names.items()) == list(enumerate(names))  # 10 comes after 9


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("model_index.json", "no model_index.json in"),
        ("transformer/config.json", "no transformer/config.json in"),
        ("vae", "no vae/ in .*; a generator is a complete folder"),
        ("scheduler", "no scheduler/ in .*; a generator is a complete folder"),
    ],
)
def test_error_for_an_incomplete_generator_names_the_missing_part(pipeline, tmp_path, part, message):
    save_generator(pipeline, tmp_path)
    path = tmp_path / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("version", [2, 4, None])
def test_generator_of_another_format_version_is_refused(pipeline, tmp_path, version):
    save_generator(pipeline, tmp_path)
    set_value(tmp_path / "model_index.json", "format_version", version)
    for load in (load_pipeline, find_generator, MeanFlowPipeline.from_pretrained):
        with pytest.raises(ValueError, match=f"has format version {version}, but this release reads version 3 only"):
            load(tmp_path)


def test_damaged_index_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json in .* is damaged"):
        find_generator(tmp_path)


def test_generator_is_found_in_the_folder_or_as_the_only_one_below_it(tmp_path):
    with pytest.raises(ValueError, match="but found none; `meanflow train` writes one"):
        find_generator(tmp_path)
    for name in ("first", "first/inner", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text('{"format_version": 3}')
    assert find_generator(tmp_path / "first") == tmp_path / "first"
    assert find_generator(tmp_path / "first" / "inner") == tmp_path / "first" / "inner"
    with pytest.raises(ValueError, match="but found first, first/inner, second;"):
        find_generator(tmp_path)


def test_the_gallerys_generator_opens_and_draws():
    pipeline = load_pipeline(REPOSITORY / "docs/gallery/clothes")
    assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {torch.float32}  # stored in float16
    [pants] = pipeline.get_label_ids("pants")
    images = pipeline.images_from_seeds([pants] * 20, range(20))
    assert images.shape == (20, 64, 64, 3)
    # Trousers are in the middle of the image, and the background is at its left edge.
    middle, edge = images[:, 16:48, 24:40].float(), images[:, 16:48, :4].float()
    assert float((middle.mean(dim=(1, 2)) - edge.mean(dim=(1, 2))).abs().mean()) > 20.0
