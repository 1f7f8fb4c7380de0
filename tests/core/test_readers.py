"""Reading checkpoint files: formats, moving averages, and files that could run code."""

import argparse
import os
import pickle
import re

import msgpack
import numpy as np
import pytest
import safetensors.torch
import torch

from meanflow_core.interop.readers import read_checkpoint


def packed(value):
    """A tree of arrays as Flax serialises it: each array is a msgpack extension of (shape, dtype name, bytes)."""
    if isinstance(value, dict):
        return {key: packed(item) for key, item in value.items()}
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    content = msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True)
    return msgpack.ExtType(1 if isinstance(value, np.ndarray) else 3, content)


def flax_bytes(tree):
    return msgpack.packb(packed(tree), strict_types=True)


def flax_training_state():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 2, "1": 3},
        "chunks": {"0": array.reshape(-1)[:4], "1": array.reshape(-1)[4:]},
    }
    halves = msgpack.ExtType(1, msgpack.packb(((2,), "bfloat16", b"\x80\x3f\x20\xc1"), use_bin_type=True))  # 1, -10
    averages = {"net": {"layers_0": {"kernel": array, "big": chunked}, "half": halves}}
    return {
        "step": np.int32(7),
        "params": {"net": {"layers_0": {"kernel": array + 1}}},
        "ema_params": averages,
        "opt_state": {"0": {"count": np.array(7), "mu": {"net": np.zeros(3)}}, "1": {}},
    }


def test_flax_training_state_gives_its_average_or_its_parameters(tmp_path):
    path = tmp_path / "checkpoint_7"
    path.write_bytes(flax_bytes(flax_training_state()))
    expected = torch.arange(6.0).view(2, 3)
    average = read_checkpoint(path)
    assert list(average) == ["net/layers_0/kernel", "net/layers_0/big", "net/half"]
    assert torch.equal(average["net/layers_0/kernel"], expected)
    assert torch.equal(average["net/layers_0/big"], expected)
    assert torch.equal(average["net/half"], torch.tensor([1.0, -10.0]))
    plain = read_checkpoint(path, use_ema=False)
    assert {name: value.tolist() for name, value in plain.items()} == {"net/layers_0/kernel": (expected + 1).tolist()}
    bare = tmp_path / "bare.msgpack"
    bare.write_bytes(flax_bytes({"net": {"bias": np.ones(2, dtype=np.float16)}}))
    assert {name: value.tolist() for name, value in read_checkpoint(bare).items()} == {"net/bias": [1.0, 1.0]}
    assert read_checkpoint(bare)["net/bias"].dtype == torch.float32


def training_file(path, legacy=False):
    """A checkpoint as SiT's training script saves it."""
    state = {
        "model": {"a": torch.zeros(2)},
        "ema": {"a": torch.ones(2, dtype=torch.bfloat16)},
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "args": argparse.Namespace(model="SiT-XL/2", lr=1e-4, betas=(0.9, 0.95), ckpt=None),
        "steps": 3,
    }
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
def test_torch_training_state_gives_its_average_or_its_parameters(tmp_path, legacy):
    path = training_file(tmp_path / "0003.pt", legacy)
    assert read_checkpoint(path)["a"].tolist() == [1.0, 1.0]
    assert read_checkpoint(path)["a"].dtype == torch.float32
    assert read_checkpoint(path, use_ema=False)["a"].tolist() == [0.0, 0.0]
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_every_format_gives_the_same_parameters(tmp_path):
    state = {"net/x": torch.randn(3, 2), "net/y": torch.randn(4)}
    arrays = {name: value.numpy() for name, value in state.items()}
    torch.save(state, tmp_path / "a.pth")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", config=np.array("text"), **{f"param:{name}": value for name, value in arrays.items()})
    (tmp_path / "a.msgpack").write_bytes(flax_bytes({"net": {name[4:]: value for name, value in arrays.items()}}))
    assert len(list(tmp_path.iterdir())) == 5
    for path in tmp_path.iterdir():
        read = read_checkpoint(path)
        assert list(read) == list(state), path
        assert all(torch.equal(read[name], value) for name, value in state.items()), path


class Malicious:
    """Creates a folder when unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "args", "bare pickle", "npz"])
def test_file_with_code_is_refused_without_running_the_code(tmp_path, kind):
    trap, path = tmp_path / "trap", tmp_path / "evil.pt"
    evil = {"ema": {"a": torch.zeros(1)}, "opt": Malicious(trap)}
    if kind == "args":
        evil = {"ema": {"a": torch.zeros(1)}, "args": argparse.Namespace(lr=Malicious(trap))}
    if kind == "npz":
        path = tmp_path / "evil.npz"
        np.savez(path, **{"net/x": np.array([Malicious(trap)], dtype=object)})
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps({"opt": Malicious(trap)}, protocol=2))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        read_checkpoint(path)
    assert not trap.exists()
    if kind != "npz":
        assert "mkdir, which could run code when opened" in str(error.value)
    # The test file really is dangerous.
    if kind == "bare pickle":
        pickle.loads(path.read_bytes())
        assert trap.exists()


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.pt", "checkpoint_1"])
@pytest.mark.parametrize("content", ["empty", "text", "truncated"])
def test_error_for_a_damaged_file_names_the_file(tmp_path, name, content):
    path = tmp_path / name
    state = {"net/x": torch.randn(30, 20)}
    if name.endswith("npz"):
        np.savez(path, **{"net/x": state["net/x"].numpy()})
    elif name.endswith("safetensors"):
        safetensors.torch.save_file(state, path)
    elif name.endswith("pt"):
        torch.save(state, path)
    else:
        path.write_bytes(flax_bytes({"net": {"x": state["net/x"].numpy()}}))
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no checkpoint at all", "truncated": whole[: len(whole) // 2]}[content])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "use_ema", "message"),
    [
        ({"model": {"a": torch.zeros(1)}}, True, "it has 'model' but no 'ema'"),
        ({"ema": {"a": torch.zeros(1)}}, False, "it has 'ema' but no 'model'"),
        ({"a": torch.zeros(1)}, False, "one set of parameters"),
        ({"a": "text"}, True, "a must be a tensor, but is a str"),
        ([torch.zeros(1)], True, "contains a list"),
    ],
)
def test_file_without_the_requested_parameters_is_refused(tmp_path, content, use_ema, message):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(path, use_ema=use_ema)
    assert str(path) in str(error.value)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at .*absent.pt"):
        read_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="is a folder or an archive"):
        read_checkpoint(tmp_path)
