import argparse
import logging
import os
import sys

import pytest
import torch
from diffusers import AutoencoderKL

from meanflow_core.generator import load_pipeline
from meanflow_core.interop.conversion import convert_checkpoint
from meanflow_core.latents import SD_VAE_FT_MSE_MEAN, SD_VAE_FT_MSE_STD, LatentNormalization
from meanflow_core.networks.building import build_network, require_same_architecture
from meanflow_core.networks.dit import MeanFlowDiT
from meanflow_core.networks.improved_dit import ImprovedMeanFlowDiT
from meanflow_core.presets import PRESETS
from meanflow_core.presets.improved_meanflow import imf_network
from pipelines.command_line import run_command
from pipelines.convert import run as conversion
from pipelines.convert.__main__ import main
from pipelines.convert.run import published_sampling, read_class_names
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER

CLASSES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints and autoencoders. "vae" has Stable Diffusion's scale."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    small = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    AutoencoderKL(latent_channels=4, scaling_factor=0.18215, **small).save_pretrained(root / "vae")
    AutoencoderKL(latent_channels=4, scaling_factor=0.5, **small).save_pretrained(root / "other_vae")
    AutoencoderKL(latent_channels=3, scaling_factor=0.18215, **small).save_pretrained(root / "vae_of_3")
    sit, average = sit_state(), sit_state()
    # What SiT's training script saves.
    torch.save(
        {
            "model": sit,
            "ema": average,
            "opt": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
            "args": argparse.Namespace(model="SiT-XL/2", num_classes=1000, lr=1e-4, ckpt=None),
        },
        root / "sit.pt",
    )
    imf = PRESETS["debug_imf"]().network
    network = build_network(imf, sample_size=8, in_channels=4, num_classes=CLASSES)
    state = {published_name(name): torch.randn(value.shape) * 0.1 for name, value in network.state_dict().items()}
    torch.save(state, root / "imf_whole.pth")
    torch.save({name: value for name, value in state.items() if ".v_heads." not in name}, root / "imf.pth")
    (root / "names.txt").write_text("\n".join(f"name {label}" for label in range(CLASSES)) + "\n\n")
    (root / "few.txt").write_text("one\ntwo\n")
    (root / "gap.txt").write_text("one\n\nthree\nfour\nfive\n")
    return root


def sit_state():
    """Parameters in SiT's form: with its extra output channels and stored positions, in the debug preset's size."""
    network = MeanFlowDiT(sample_size=8, num_classes=CLASSES, patch_size=4, hidden_size=64, depth=2, num_heads=2)
    state = {name: torch.randn(value.shape) * 0.1 for name, value in network.state_dict().items()}
    state = {name: value for name, value in state.items() if not name.startswith("h_embedder.")}
    for part in ("weight", "bias"):
        state[f"final_layer.linear.{part}"] = state[f"final_layer.linear.{part}"].repeat_interleave(2, dim=0)
    return {"pos_embed": network.pos_embed, **state}


def sit_average(folder):
    return torch.load(folder / "sit.pt", weights_only=False)["ema"]


def published_name(name):
    """The name of a parameter in the authors' PyTorch files."""
    if "embedding_table" in name:
        return f"net.{name}".replace(".weight", "._flax_embedding.weight")
    if name.startswith("x_embedder") or "norm" in name or not name.endswith(("weight", "bias")):
        return f"net.{name}"
    return f"net.{name}".replace(".weight", "._flax_linear.weight").replace(".bias", "._flax_linear.bias")


def run(monkeypatch, folder, output, **options):
    """Runs the command in this process and returns the output folder."""
    values = {"source": "sit", "checkpoint": folder / "sit.pt", "output": output, "vae": folder / "vae", **options}
    arguments = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["convert", *[part for part in arguments if part != "True"]])
    run_command(main)
    return output


def test_sit_becomes_a_generator_that_predicts_velocities(monkeypatch, folder, tmp_path, capsys):
    output = run(monkeypatch, folder, tmp_path / "new" / "sit", class_names=folder / "names.txt")
    pipeline = load_pipeline(output)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"generator: {output} ({pipeline.transformer.num_parameters():,} parameters)"
    assert os.listdir(output.parent) == ["sit"]
    assert pipeline.config.prediction == "velocity"
    assert pipeline.class_names == {label: f"name {label}" for label in range(CLASSES)}
    assert pipeline.images_from_seeds([1, 4], [0, 1], 3, guidance_scale=2.0, solver="heun").shape == (2, 8, 8, 3)
    assert LatentNormalization.from_vae_config(pipeline.vae.config).mean == (0.0,) * 4
    states = torch.load(folder / "sit.pt", weights_only=False)
    average = convert_checkpoint("sit", states["ema"]).state_dict()
    assert all(torch.equal(value, average[name]) for name, value in pipeline.transformer.state_dict().items())

    other = load_pipeline(run(monkeypatch, folder, tmp_path / "plain", no_use_ema=True))
    plain = convert_checkpoint("sit", states["model"]).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in other.transformer.state_dict().items())
    assert not torch.equal(plain["blocks.0.attn.qkv.weight"], average["blocks.0.attn.qkv.weight"])
    assert list(other.class_names.values()) == [f"class {label}" for label in range(CLASSES)]


def test_repa_becomes_a_generator_that_predicts_velocities(monkeypatch, folder, tmp_path):
    state = {**sit_average(folder), "projectors.0.0.weight": torch.zeros(3, 64)}
    for part in ("weight", "bias"):
        state[f"final_layer.linear.{part}"] = state[f"final_layer.linear.{part}"][::2]
    torch.save({"ema": state}, tmp_path / "repa.pt")
    output = run(monkeypatch, folder, tmp_path / "generator", source="repa", checkpoint=tmp_path / "repa.pt")
    assert load_pipeline(output).config.prediction == "velocity"


def test_improved_meanflow_gets_its_normalization_and_guidance(monkeypatch, folder, tmp_path):
    options = {"source": "imf-torch", "sample_size": 8}
    pipeline = load_pipeline(run(monkeypatch, folder, tmp_path / "imf", checkpoint=folder / "imf.pth", **options))
    assert isinstance(pipeline.transformer, ImprovedMeanFlowDiT)
    assert not pipeline.transformer.config.has_velocity_head
    assert pipeline.config.prediction == "average_velocity"
    expected = PRESETS["debug_imf"]().sampling
    sampling = [
        pipeline.config[name] for name in ("guidance_scale", "guidance_interval_start", "guidance_interval_end")
    ]
    assert sampling == [expected.guidance_scale, expected.guidance_interval_start, expected.guidance_interval_end]
    normalization = LatentNormalization.from_vae_config(pipeline.vae.config)
    assert (normalization.mean, normalization.std) == (SD_VAE_FT_MSE_MEAN, SD_VAE_FT_MSE_STD)
    assert pipeline.images_from_seeds([1], [0], 1).shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    ("preset", "options"),
    [("debug", {}), ("debug_imf", {"source": "imf-torch", "checkpoint": "imf_whole.pth", "sample_size": 8})],
)
def test_training_can_start_from_a_converted_network(monkeypatch, folder, tmp_path, preset, options):
    options = {name: folder / value if name == "checkpoint" else value for name, value in options.items()}
    converted = load_pipeline(run(monkeypatch, folder, tmp_path / "generator", **options)).transformer
    trained = build_network(PRESETS[preset]().network, sample_size=8, in_channels=4, num_classes=CLASSES)
    require_same_architecture(converted, trained)
    trained.load_state_dict(converted.state_dict())


def test_a_vae_keeps_its_own_normalization(monkeypatch, folder, tmp_path, caplog):
    options = {"source": "imf-torch", "checkpoint": folder / "imf.pth", "sample_size": 8}
    with caplog.at_level(logging.WARNING):
        own = load_pipeline(run(monkeypatch, folder, tmp_path / "own", vae=SHIPPED_AUTOENCODER, **options))
        assert not caplog.records
        other = load_pipeline(run(monkeypatch, folder, tmp_path / "other", vae=folder / "other_vae", **options))
        assert "this VAE has a single scale" in caplog.text
    assert own.vae.config.latents_mean[0] == -1.1905052661895752
    assert other.vae.config.latents_mean is None


@pytest.mark.parametrize(
    ("size", "scale", "interval"),
    [("B", 8.0, (0.40, 0.65)), ("L", 10.5, (0.40, 0.60))],
)
def test_published_sizes_get_the_published_sampling(size, scale, interval):
    with torch.device("meta"):
        network = build_network(imf_network(size), sample_size=32, in_channels=4, num_classes=1000)
    sampling = published_sampling(network, is_improved=True)
    assert (sampling.guidance_scale, (sampling.guidance_interval_start, sampling.guidance_interval_end)) == (
        scale,
        interval,
    )


def test_an_unpublished_size_gets_no_guidance(imf_network):
    assert published_sampling(imf_network, is_improved=True).guidance_scale == 1.0


def test_a_portable_generator_includes_its_code(monkeypatch, folder, tmp_path):
    assert (run(monkeypatch, folder, tmp_path / "portable", portable=True) / "pipeline.py").is_file()
    assert not (run(monkeypatch, folder, tmp_path / "plain") / "pipeline.py").exists()


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def refusal(monkeypatch, capsys, folder, output, **options):
    """The error line of a refused command."""
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, folder, output, **options)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    return line


def test_an_existing_output_is_refused_and_unchanged(monkeypatch, capsys, folder, tmp_path):
    (tmp_path / "here").mkdir()
    line = refusal(monkeypatch, capsys, folder, tmp_path / "here")
    assert line == f"error: --output {tmp_path / 'here'} exists already; choose another, or remove it"
    assert os.listdir(tmp_path / "here") == []
    (tmp_path / "file").touch()
    assert "is a file" in refusal(monkeypatch, capsys, folder, tmp_path / "file")
    assert "local disk" in refusal(monkeypatch, capsys, folder, "s3://bucket/generator")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "dit"}, "unknown source 'dit'; known: official-meanflow, official-imf"),
        ({"source": "repa"}, "size mismatch for final_layer.linear.weight"),
        ({"checkpoint": "absent.pt"}, "no checkpoint at absent.pt"),
        ({"class_names": "few.txt"}, "5 classes, but has 2 lines, 0 of them empty"),
        ({"class_names": "gap.txt"}, "5 classes, but has 5 lines, 1 of them empty"),
        ({"class_names": "absent.txt"}, "cannot read class names from"),
        ({"vae": "vae_of_3"}, "latents with 4 channels, but those of"),
        ({"vae": "."}, "no config.json in"),
        ({"sample_size": 16}, "sample_size must be 8, the size of the stored position embedding, but got 16"),
        ({"num_heads": 5}, "must be a multiple of num_heads"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(monkeypatch, capsys, folder, tmp_path, options, message):
    inputs = {name: folder / value for name, value in options.items() if name in ("class_names", "vae")}
    line = refusal(monkeypatch, capsys, folder, tmp_path / "output", **{**options, **inputs})
    assert message in line
    assert os.listdir(tmp_path) == []


def test_a_malicious_checkpoint_is_refused_and_not_executed(monkeypatch, capsys, folder, tmp_path):
    states = torch.load(folder / "sit.pt", weights_only=False)
    torch.save({**states, "args": Malicious(tmp_path / "trap")}, tmp_path / "evil.pt")
    line = refusal(monkeypatch, capsys, folder, tmp_path / "output", checkpoint=tmp_path / "evil.pt")
    assert line.startswith(f"error: {tmp_path / 'evil.pt'} contains posix.mkdir, which could run code when opened; ")
    assert os.listdir(tmp_path) == ["evil.pt"]


def test_a_failed_write_leaves_nothing(monkeypatch, capsys, folder, tmp_path):
    def half(pipeline, place, portable):
        place.mkdir()
        (place / "model_index.json").touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(conversion, "save_generator", half)
    assert "no space left on device" in refusal(monkeypatch, capsys, folder, tmp_path / "output")
    assert os.listdir(tmp_path) == []


def test_wordnet_ids_are_separated_from_class_names(tmp_path):
    (tmp_path / "mapping.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    assert read_class_names(tmp_path / "mapping.txt", 2) == (
        ["tench, Tinca tinca", "goldfish, Carassius auratus"],
        ["n01440764", "n01443537"],
    )
    (tmp_path / "names.txt").write_text("n01440764 tench\ngoldfish\n")
    assert read_class_names(tmp_path / "names.txt", 2) == (["n01440764 tench", "goldfish"], [])
