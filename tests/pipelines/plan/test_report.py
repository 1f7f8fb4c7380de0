"""The text of a training's plan, compared with arithmetic by hand."""

from dataclasses import replace

import pytest

from meanflow_core.presets.demo import debug, debug_imf
from pipelines.plan.cost import memory_estimate, step_flops
from pipelines.plan.job import Workload
from pipelines.plan.report import describe

SIZES = {"sample_size": 8, "in_channels": 4, "num_classes": 10}


def dry_run(preset="debug", config=None, *, num_workers=1, min_workers=None, **changes) -> str:
    defaults = {"images": 40, "latent_shape": (4, 8, 8), "classes": 10}
    workload = Workload(config=config or debug(), **{**defaults, **changes})
    return describe(preset, workload, num_workers, min_workers)


def lines_of(text: str, title: str) -> dict[str, str]:
    """{name: text} of the section with this title."""
    [lines] = [part.splitlines()[1:] for part in text.split("\n\n") if part.startswith(title)]
    pairs = [line.strip().split("  ", 1) for line in lines]
    return {name: rest.strip() for name, rest in pairs}


def test_work_counts_samples_tokens_and_steps():
    config = replace(debug(), global_batch_size=10, num_steps=31)
    text = dry_run(config=config, num_workers=3, min_workers=2, samples_per_pass=2)
    assert lines_of(text, "work") == {
        # Patches 4,160; times 41,216; labels 704; two blocks of 18 D^2 + 15 D with D = 64; last layer 12,480.
        "parameters": "207.9 k",
        "data": "40 images, 10 classes, latents 4x8x8",
        "an image": "4 tokens",
        "a step": "10 images, 40 tokens",
        "workers": "3: 3 to 4 samples each, in 2 passes of 1 to 2",
        "at least": "2: 5 samples each, in 3 passes of 1 to 2",
        "an epoch": "4.0 steps",
        "the training": "31 steps, 7.8 epochs",
    }
    # After steps 15 and 30, and after the last.
    assert lines_of(text, "checkpoints")["number"] == "3, one every 15 steps"


def test_flops_and_checkpoint_size_are_those_of_the_network():
    text = dry_run()
    # Per token: 64^2 in and out; two blocks of 12 D^2, and attention's 2 N^2 D. Per image: two times of 256 D + D^2 each,
    # and modulation of 6 D^2 per block and 2 D^2 at the end. Twice 528,384.
    step = step_flops(debug(), **SIZES)
    assert lines_of(text, "FLOPs") == {
        "to sample an image": "1.06 MFLOP per function evaluation",
        "a step": f"{step / 1e6:.2f} MFLOP",
        "the training": f"{30 * step / 1e9:.2f} GFLOP",
    }
    # Parameters, one average and two moments of 4 bytes each; at steps 15 and 30.
    assert lines_of(text, "checkpoints")["size"] == "3.33 MB: parameters, moving averages, Adam's moments"


def test_long_training_states_its_duration_at_a_round_rate():
    config = replace(debug(), num_steps=100_000_000_000)
    hours = step_flops(config, **SIZES) * 1e11 / 4e14 / 3600
    flops = lines_of(dry_run(config=config, num_workers=4), "FLOPs")
    assert flops["time"] == f"{hours:.2f} hours if each of 4 workers sustains 100 TFLOP/s"


def test_memory_lists_the_estimate_of_the_largest_pass():
    # 16 samples on 3 workers are 5 or 6, in 2 passes of at most 3; on 2 workers 8, in 2 passes of 4.
    memory = memory_estimate(debug(), **SIZES, samples_per_pass=4, num_shards=2)
    shown = lines_of(dry_run(num_workers=3, min_workers=2, samples_per_pass=4, parallelism="fsdp2"), "memory")
    expected = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "Adam's moments": memory.optimizer,
        "moving averages": memory.averages,
        "activations": memory.activations,
        "temporaries": memory.temporaries,
        "total": memory.total,
    }
    megabytes = {name: text.split(" MB  ")[0].strip() for name, text in shown.items()}
    assert megabytes == {name: f"{size / 1e6:.2f}" for name, size in expected.items()}
    assert shown["parameters"].endswith("float32, one of 2 shards")
    assert shown["activations"].endswith("of 4 samples in float32")


def test_configuration_lists_every_field_and_marks_overrides():
    config = replace(debug(), global_batch_size=8, ema_decays=(0.9, 0.99))
    shown = lines_of(dry_run(config=config), "configuration")
    assert list(shown) == ["preset", *config.flat()]
    assert shown["network.patch_size"] == "4"
    assert shown["optimizer.learning_rate_factors"] == "none"
    assert shown["global_batch_size"] == "8    (preset: 16)"
    assert shown["ema_decays"] == "0.9 0.99    (preset: 0.9)"


def test_conditioning_tokens_of_improved_meanflow_are_counted():
    work = lines_of(dry_run("debug_imf", debug_imf()), "work")
    assert work["an image"] == "24 tokens: 4 patches and 20 of conditioning"
    assert work["a step"] == "16 images, 384 tokens"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_shape": (4, 8, 16)}, "latents must be square, but got 8x16"),
        ({"num_workers": 17}, "global_batch_size = 16 must hold, but got min_workers 17 and num_workers 17"),
        ({"num_workers": 2, "min_workers": 3}, "but got min_workers 3 and num_workers 2"),
        ({"samples_per_pass": 0}, "samples_per_pass must be at least 1, but got 0"),
        ({"latent_shape": (4, 6, 6)}, "the latent size must be a multiple of the patch size, but got 6 and 4"),
    ],
)
def test_invalid_input_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dry_run(**changes)
