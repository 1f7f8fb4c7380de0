import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meanflow_core.config import GuidanceConfig
from meanflow_core.generator import build_pipeline, save_generator
from meanflow_core.interop.conversion import ignore_step_size
from meanflow_core.networks.interface import Conditioning
from meanflow_core.presets.demo import debug, debug_imf
from pipelines.demo import images
from pipelines.errors import InputError
from pipelines.train.job import TrainJob
from pipelines.train.prepare import prepare
from pipelines.train.warm_start import delay_guidance, load_initial_network
from tests.conftest import perturbed
from tests.support.manifests import make_manifest

CONFIG = replace(debug().network, hidden_size=48, num_heads=3, patch_size=2)


def manifest():
    return replace(make_manifest([400], moments_shape=(8, 8, 8), image_size=64), class_names=list(images.CLASS_NAMES))


@pytest.fixture
def data(tmp_path, vae):
    """A dataset folder that contains only its autoencoder."""
    vae.save_pretrained(tmp_path / "latents/vae")
    return str(tmp_path / "latents")


def saved(network, vae, folder, *, is_flow_matching):
    prediction = "velocity" if is_flow_matching else "average_velocity"
    save_generator(build_pipeline(network, vae, images.CLASS_NAMES, prediction=prediction), folder)
    return str(folder)


def load(location, source, network, data):
    job = TrainJob(
        data=data, storage="s", run_name="r", init_from=location, init_source=source,
        config=replace(debug(), network=network),
    )  # fmt: skip
    return load_initial_network(job, manifest())


def u(network, t, r):
    generator = torch.Generator().manual_seed(3)
    z, labels = torch.randn(6, 4, 8, 8, generator=generator), torch.arange(6)
    with torch.no_grad():
        return network(z, Conditioning(t=torch.full((6,), t), r=torch.full((6,), r), labels=labels)).u


@pytest.mark.parametrize("is_flow_matching", [True, False])
def test_warm_start_loads_a_generators_network(network, vae, data, tmp_path, is_flow_matching):
    location = saved(network, vae, tmp_path / "generator", is_flow_matching=is_flow_matching)
    found = load(location, None, CONFIG, data)
    assert found.is_flow_matching == is_flow_matching
    torch.testing.assert_close(u(found.network, 0.7, 0.7), u(network, 0.7, 0.7))
    if is_flow_matching:  # predicts its velocity for every t - r
        torch.testing.assert_close(u(found.network, 0.7, 0.2), u(network, 0.7, 0.7))
    else:
        torch.testing.assert_close(u(found.network, 0.7, 0.2), u(network, 0.7, 0.2))


def test_network_that_ignores_step_size_predicts_its_velocity_for_any_r(network):
    ignoring = perturbed(type(network)(**{k: v for k, v in network.config.items() if not k.startswith("_")}))
    ignoring.load_state_dict(network.state_dict())
    ignore_step_size(ignoring)
    torch.testing.assert_close(u(ignoring, 0.7, 0.7), u(network, 0.7, 0.7))
    torch.testing.assert_close(u(ignoring, 0.7, 0.1), u(network, 0.7, 0.7))
    assert not torch.allclose(u(network, 0.7, 0.1), u(network, 0.7, 0.7))
    ignoring.zero_grad()
    z, labels = torch.randn(2, 4, 8, 8), torch.arange(2)
    times = torch.tensor([0.3, 0.9])
    ignoring.train()(z, Conditioning(t=times, r=times * 0, labels=labels)).u.square().sum().backward()
    assert ignoring.h_embedder.mlp[2].weight.grad.abs().max() > 0  # the embedder of t - r still receives gradients


def test_warm_start_loads_a_public_checkpoint(network, data, tmp_path):
    # zhuyu-cs uses our names, except for the step size's embedder.
    state = {name.replace("h_embedder", "r_embedder"): value for name, value in network.state_dict().items()}
    torch.save({"ema": state}, tmp_path / "checkpoint.pt")
    found = load(str(tmp_path / "checkpoint.pt"), "zhuyu-cs", CONFIG, data)
    assert not found.is_flow_matching
    torch.testing.assert_close(u(found.network, 0.7, 0.2), u(network, 0.7, 0.2))
    with pytest.raises(InputError, match="--init-from .*depth is 2, expected 7"):
        load(str(tmp_path / "checkpoint.pt"), "zhuyu-cs", replace(CONFIG, depth=7), data)
    without = {name: value for name, value in state.items() if not name.startswith("r_embedder")}
    torch.save({"ema": without}, tmp_path / "sit.pt")
    assert load(str(tmp_path / "sit.pt"), "sit", CONFIG, data).is_flow_matching
    with pytest.raises(InputError, match="is a file; name its source with --init-source"):
        load(str(tmp_path / "checkpoint.pt"), None, CONFIG, data)
    with pytest.raises(InputError, match=r"--init-from .*unknown source 'x'; known: .*zhuyu-cs"):
        load(str(tmp_path / "checkpoint.pt"), "x", CONFIG, data)


def test_incompatible_network_is_refused_with_the_differences(network, vae, data, tmp_path):
    location = saved(network, vae, tmp_path / "generator", is_flow_matching=False)
    with pytest.raises(InputError, match="--init-from .*depth is 2, expected 7"):
        load(location, None, replace(CONFIG, depth=7), data)
    config = json.loads((tmp_path / "generator/vae/config.json").read_text())
    ours, theirs = config["latents_std"][0], 2.0 * config["latents_std"][0]
    config["latents_std"] = [2.0 * value for value in config["latents_std"]]
    (tmp_path / "generator/vae/config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=rf"latents normalized with .*std=\({theirs}, .* but --data has .*std=\({ours}, "
    ):
        load(location, None, CONFIG, data)
    with pytest.raises(InputError, match="--init-from .*nowhere does not exist"):
        load(str(tmp_path / "nowhere"), None, CONFIG, data)


def test_guidance_starts_twenty_epochs_after_flow_matching_by_default():
    config = replace(debug(), num_steps=10_000)
    assert delay_guidance(config, manifest()).guidance_after_steps == 20 * 400 // 16
    assert delay_guidance(replace(config, num_steps=300), manifest()).guidance_after_steps == 150
    chosen = replace(config, guidance_after_steps=7)
    assert delay_guidance(chosen, manifest()) == chosen
    unguided = replace(config, loss=replace(config.loss, guidance=GuidanceConfig()))
    assert delay_guidance(unguided, manifest()) == unguided
    assert delay_guidance(debug_imf(), manifest()) == debug_imf()


@pytest.mark.parametrize("is_flow_matching", [True, False])
def test_new_run_delays_guidance_after_flow_matching_only(network, vae, data, tmp_path, is_flow_matching):
    (Path(data) / "manifest.json").write_text(manifest().to_json())
    location = saved(network, vae, tmp_path / "generator", is_flow_matching=is_flow_matching)
    job = TrainJob(data=data, storage=str(tmp_path), run_name="r", config=replace(debug(), network=CONFIG))
    assert load_initial_network(job, manifest()) is None
    ready = prepare(replace(job, init_from=location))
    assert ready.job.config.guidance_after_steps == (15 if is_flow_matching else None)
    torch.testing.assert_close(u(ready.initial.network, 0.7, 0.7), u(network, 0.7, 0.7))


def test_warm_start_across_diffusion_and_flows_is_refused(network, vae, data, tmp_path):
    save_generator(build_pipeline(network, vae, images.CLASS_NAMES, prediction="epsilon"), tmp_path / "generator")
    with pytest.raises(InputError, match="predicts epsilon, but this training's average_velocity"):
        load(str(tmp_path / "generator"), None, CONFIG, data)
