import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meanflow_core.config import GuidanceConfig
from meanflow_core.generator import build_pipeline, save_generator
from meanflow_core.interop.names import silence_step_size
from meanflow_core.presets import debug, debug_imf
from meanflow_core.transformer import Conditioning
from pipelines.demo import images
from pipelines.errors import InputError
from pipelines.train import run as train_run
from pipelines.train.job import TrainJob
from pipelines.train.warm_start import initial_network, staged
from tests.conftest import perturbed
from tests.support.manifests import make_manifest

CONFIG = replace(debug().network, hidden_size=48, num_heads=3, patch_size=2)


def manifest():
    return replace(make_manifest([400], moments_shape=(8, 8, 8), image_size=64), class_names=list(images.CLASS_NAMES))


@pytest.fixture
def data(tmp_path, vae):
    """A dataset's folder, as far as it is asked for here."""
    vae.save_pretrained(tmp_path / "latents/vae")
    return str(tmp_path / "latents")


def saved(network, vae, folder, *, is_flow_matching):
    save_generator(build_pipeline(network, vae, images.CLASS_NAMES, is_flow_matching=is_flow_matching), folder)
    return str(folder)


def u(network, t, r):
    generator = torch.Generator().manual_seed(3)
    z, labels = torch.randn(6, 4, 8, 8, generator=generator), torch.arange(6)
    with torch.no_grad():
        return network(z, Conditioning(t=torch.full((6,), t), r=torch.full((6,), r), labels=labels)).u


@pytest.mark.parametrize("is_flow_matching", [True, False])
def test_training_begins_with_a_generators_network(network, vae, data, tmp_path, is_flow_matching):
    location = saved(network, vae, tmp_path / "generator", is_flow_matching=is_flow_matching)
    found = initial_network(location, None, CONFIG, data, manifest())
    assert found.is_flow_matching == is_flow_matching
    torch.testing.assert_close(u(found.network, 0.7, 0.7), u(network, 0.7, 0.7))
    if is_flow_matching:  # its velocity at every t - r
        torch.testing.assert_close(u(found.network, 0.7, 0.2), u(network, 0.7, 0.7))
    else:
        torch.testing.assert_close(u(found.network, 0.7, 0.2), u(network, 0.7, 0.2))


def test_network_that_learnt_flow_matching_says_its_velocity_at_every_step_size(network):
    silent = perturbed(type(network)(**{k: v for k, v in network.config.items() if not k.startswith("_")}))
    silent.load_state_dict(network.state_dict())
    silence_step_size(silent)
    torch.testing.assert_close(u(silent, 0.7, 0.7), u(network, 0.7, 0.7))
    torch.testing.assert_close(u(silent, 0.7, 0.1), u(network, 0.7, 0.7))
    assert not torch.allclose(u(network, 0.7, 0.1), u(network, 0.7, 0.7))
    silent.zero_grad()
    z, labels = torch.randn(2, 4, 8, 8), torch.arange(2)
    times = torch.tensor([0.3, 0.9])
    silent.train()(z, Conditioning(t=times, r=times * 0, labels=labels)).u.square().sum().backward()
    assert silent.h_embedder.mlp[2].weight.grad.abs().max() > 0  # and can learn to say more


def test_training_begins_with_a_public_checkpoint(network, data, tmp_path):
    # zhuyu-cs' names are ours but for the step size's embedder.
    state = {name.replace("h_embedder", "r_embedder"): value for name, value in network.state_dict().items()}
    torch.save({"ema": state}, tmp_path / "checkpoint.pt")
    found = initial_network(str(tmp_path / "checkpoint.pt"), "zhuyu-cs", CONFIG, data, manifest())
    assert not found.is_flow_matching
    torch.testing.assert_close(u(found.network, 0.7, 0.2), u(network, 0.7, 0.2))
    with pytest.raises(InputError, match="--init-from .*depth is 2, wanted 7"):
        initial_network(str(tmp_path / "checkpoint.pt"), "zhuyu-cs", replace(CONFIG, depth=7), data, manifest())
    without = {name: value for name, value in state.items() if not name.startswith("r_embedder")}
    torch.save({"ema": without}, tmp_path / "sit.pt")
    assert initial_network(str(tmp_path / "sit.pt"), "sit", CONFIG, data, manifest()).is_flow_matching
    with pytest.raises(InputError, match="is a file; say with --init-source where the checkpoint comes from"):
        initial_network(str(tmp_path / "checkpoint.pt"), None, CONFIG, data, manifest())
    with pytest.raises(InputError, match=r"--init-from .*unknown source 'x'; known: .*zhuyu-cs"):
        initial_network(str(tmp_path / "checkpoint.pt"), "x", CONFIG, data, manifest())


def test_network_that_does_not_fit_is_refused_with_the_difference(network, vae, data, tmp_path):
    location = saved(network, vae, tmp_path / "generator", is_flow_matching=False)
    with pytest.raises(InputError, match="--init-from .*depth is 2, wanted 7"):
        initial_network(location, None, replace(CONFIG, depth=7), data, manifest())
    config = json.loads((tmp_path / "generator/vae/config.json").read_text())
    ours, theirs = config["latents_std"][0], 2.0 * config["latents_std"][0]
    config["latents_std"] = [2.0 * value for value in config["latents_std"]]
    (tmp_path / "generator/vae/config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=rf"knows latents normalised by .*std=\({theirs}, .* but the data's are by .*std=\({ours}, "
    ):
        initial_network(location, None, CONFIG, data, manifest())
    with pytest.raises(InputError, match="--init-from .*nowhere is no folder"):
        initial_network(str(tmp_path / "nowhere"), None, CONFIG, data, manifest())


def test_guidance_waits_twenty_epochs_after_flow_matching_unless_said_otherwise():
    config = replace(debug(), num_steps=10_000)
    assert staged(config, manifest(), is_flow_matching=True).guidance_after_steps == 20 * 400 // 16
    assert staged(replace(config, num_steps=300), manifest(), is_flow_matching=True).guidance_after_steps == 150
    assert staged(config, manifest(), is_flow_matching=False) == config
    for own in (0, 7):
        chosen = replace(config, guidance_after_steps=own)
        assert staged(chosen, manifest(), is_flow_matching=True) == chosen
    unguided = replace(config, loss=replace(config.loss, guidance=GuidanceConfig()))
    assert staged(unguided, manifest(), is_flow_matching=True) == unguided
    assert staged(debug_imf(), manifest(), is_flow_matching=True) == debug_imf()


def test_training_after_flow_matching_is_staged(network, vae, data, tmp_path):
    location = saved(network, vae, tmp_path / "generator", is_flow_matching=True)
    job = TrainJob(data=data, storage="s", run_name="r", config=replace(debug(), network=CONFIG))
    assert train_run.warmed(job, manifest()) == (job, None)
    found, initial = train_run.warmed(replace(job, init_from=location), manifest())
    assert found.config.guidance_after_steps == 15
    torch.testing.assert_close(u(initial, 0.7, 0.7), u(network, 0.7, 0.7))
    (Path(data) / "manifest.json").write_text(manifest().to_json())
    assert "15    (debug has None)" in train_run.dry_run("debug", replace(job, init_from=location))
