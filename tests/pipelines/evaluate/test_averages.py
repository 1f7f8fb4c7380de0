import json
from dataclasses import replace

import pytest
import ray
import torch

from meanflow_core.checkpoint import save_train_state
from meanflow_core.generator import build_pipeline, load_pipeline, save_generator
from meanflow_core.presets import debug
from meanflow_core.training import build_train_state
from pipelines.demo import images
from pipelines.errors import InputError
from pipelines.evaluate.averages import generator_of
from pipelines.train import checkpoints

CONFIG = replace(debug(), ema_decays=(0.9, 0.5))
NAMES = [f"checkpoint_2026-11-25_20-00-0{number}.123456" for number in range(2)]


def state_of(number):
    """A state whose averages are all `number` plus their decay."""
    state = build_train_state(CONFIG, sample_size=8, in_channels=4, num_classes=10, device=torch.device("cpu"))
    with torch.no_grad():
        for decay, network in state.ema_networks.items():
            for parameter in network.parameters():
                parameter.fill_(number + decay)
    return state


@pytest.fixture
def run(tmp_path, vae):
    """A run of two checkpoints, with the generator that it left."""
    folder = tmp_path / "run"
    for number, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        save_train_state(state_of(number), CONFIG, folder / name)
    results = [
        {"version": 0, "checkpoint_dir_name": name, "metrics": {"step": number}} for number, name in enumerate(NAMES)
    ]
    record = {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": [0, 1],
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": 2,
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    (folder / checkpoints.RECORD).write_text(json.dumps(record))
    save_generator(build_pipeline(state_of(7).network.eval(), vae, images.CLASS_NAMES), folder / "generator")
    return folder


@pytest.mark.parametrize("decay", CONFIG.ema_decays)
def test_network_is_the_last_checkpoints_average_and_all_else_the_generators(run, tmp_path, decay):
    folder = generator_of(str(run / "generator"), decay, tmp_path / "report")
    assert folder == tmp_path / "report" / f"generator-ema-{decay:g}"
    own, other = load_pipeline(run / "generator"), load_pipeline(folder)
    assert all(bool((parameter == 1 + decay).all()) for parameter in other.transformer.parameters())
    assert other.class_names == own.class_names
    for name, tensor in own.vae.state_dict().items():
        assert torch.equal(tensor, other.vae.state_dict()[name])
    assert not all(bool((parameter == 1 + decay).all()) for parameter in own.transformer.parameters())


def test_averages_that_are_not_there_are_refused(run, tmp_path):
    generator = str(run / "generator")
    with pytest.raises(InputError, match=r"has averages of decay 0.9, 0.5, but --ema-decay is 0.99; --ema-decays of"):
        generator_of(generator, 0.99, tmp_path / "report")
    with pytest.raises(InputError, match="models:/m@champion has none; name the folder"):
        generator_of("models:/m@champion", 0.9, tmp_path / "report")
    with pytest.raises(InputError, match="missing is no folder"):
        generator_of(str(tmp_path / "missing"), 0.9, tmp_path / "report")
    (run / checkpoints.RECORD).unlink()
    with pytest.raises(InputError, match="no checkpoints beside .*generator, which --ema-decay reads"):
        generator_of(generator, 0.9, tmp_path / "report")
    assert not (tmp_path / "report").exists()
