"""Checkpoints: exact resume, files, damage and format versions."""

import json
import resource
import signal
from dataclasses import replace

import pytest
import torch

from meanflow_core import checkpoint
from meanflow_core.checkpoint import load_average, load_train_state, save_train_state
from meanflow_core.presets.demo import debug, debug_imf
from meanflow_core.training import train_step
from tests.support.training_steps import IDENTITY, broken_batch, fresh_state, parameters, take_steps


def assert_same_networks(first, second):
    assert torch.equal(parameters(first.network), parameters(second.network))
    for decay, network in first.ema_networks.items():
        assert torch.equal(parameters(second.ema_networks[decay]), parameters(network))


@pytest.mark.parametrize("config", [replace(debug(), ema_decays=(0.9, 0.99)), debug_imf()], ids=["dit", "imf_dit"])
def test_resumed_run_matches_an_uninterrupted_one_bit_for_bit(tmp_path, config):
    state = fresh_state(config)
    take_steps(state, config, 2)
    save_train_state(state, config, tmp_path, {"note": [1, 2]})
    assert json.loads((tmp_path / "state.json").read_text())["config"]["optimizer"]["learning_rate"] == 1e-3
    assert not list(tmp_path.glob("*.p*"))  # no pickles
    resumed = fresh_state(replace(config, seed=5))
    assert load_train_state(resumed, tmp_path) == {"note": [1, 2]}
    assert resumed.step == 2
    for each in (state, resumed):
        take_steps(each, config, 2)
    assert_same_networks(state, resumed)


@pytest.mark.parametrize("steps", [0, 2])
def test_resume_restores_the_number_of_skipped_steps(tmp_path, steps):
    config, state = debug(), fresh_state()
    train_step(state, state.network, [broken_batch(config)], IDENTITY, config, may_skip=True)
    if steps:
        take_steps(state, config, steps)
    save_train_state(state, config, tmp_path)
    resumed = fresh_state(replace(config, seed=3))
    load_train_state(resumed, tmp_path)
    assert (resumed.step, resumed.num_skipped) == (1 + steps, 1)
    for each in (state, resumed):
        take_steps(each, config, 1)
    assert_same_networks(state, resumed)


def test_state_saved_before_the_first_step_is_restored(tmp_path):
    state, restored = fresh_state(), fresh_state(replace(debug(), seed=1))
    save_train_state(state, debug(), tmp_path)
    load_train_state(restored, tmp_path)
    assert restored.step == 0
    assert_same_networks(state, restored)


def test_one_average_is_loaded_from_a_checkpoint(tmp_path):
    state = fresh_state(replace(debug(), ema_decays=(0.9, 0.5)))
    take_steps(state, debug(), 2)
    save_train_state(state, debug(), tmp_path)
    network = fresh_state(replace(debug(), seed=4)).network
    load_average(network, 0.5, tmp_path)
    assert torch.equal(parameters(network), parameters(state.ema_networks[0.5]))


def test_large_state_is_saved_in_several_files(tmp_path, monkeypatch):
    state = fresh_state()
    take_steps(state, debug(), 1)
    monkeypatch.setattr(checkpoint, "BYTES_PER_FILE", 100_000)
    save_train_state(state, debug(), tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert json.loads((tmp_path / "state.json").read_text())["files"].keys() == {path.name for path in files}
    restored = fresh_state(replace(debug(), seed=3))
    load_train_state(restored, tmp_path)
    assert_same_networks(state, restored)
    (tmp_path / "shard-00009-model-00001-of-00001.safetensors").write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match="contains files of another checkpoint: shard-00009-model-00001-of-00001"):
        load_train_state(restored, tmp_path)


def test_incomplete_checkpoint_is_refused_with_the_file(tmp_path):
    state = fresh_state()
    save_train_state(state, debug(), tmp_path)
    [tensors] = tmp_path.glob("*.safetensors")
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is incomplete"):
        load_average(state.network, 0.9, tmp_path)
    with pytest.raises(ValueError, match=rf"{tensors.name} has {len(content) - 1} bytes instead of {len(content)}"):
        load_train_state(state, tmp_path)
    tensors.unlink()
    with pytest.raises(ValueError, match=f"{tensors.name} is missing"):
        load_train_state(state, tmp_path)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        load_train_state(state, tmp_path / "nothing")
    (tmp_path / "state.json").write_text((tmp_path / "state.json").read_text()[:40])
    with pytest.raises(ValueError, match="is not a checkpoint"):
        load_train_state(state, tmp_path)


@pytest.mark.parametrize("version", [3, 5, None])
def test_checkpoint_of_another_format_version_is_refused(tmp_path, version):
    save_train_state(fresh_state(), debug(), tmp_path)
    content = json.loads((tmp_path / "state.json").read_text())
    # Another version may list its files differently; the message must not call that damage.
    (tmp_path / "state.json").write_text(json.dumps({"format_version": version, "pieces": content["files"]}))
    with pytest.raises(ValueError, match=f"has format version {version}, but this release reads version 4 only"):
        load_train_state(fresh_state(), tmp_path)


def test_full_disk_raises_an_os_error(tmp_path):
    state = fresh_state()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_train_state(state, debug(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        load_train_state(state, tmp_path)
