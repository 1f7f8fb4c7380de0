"""The text of a training's plan, against arithmetic by hand."""

from dataclasses import replace

import pytest

from meanflow_core.presets import debug, debug_imf
from meanflow_core.training import num_passes
from pipelines.plan.cost import memory_estimate, step_flops
from pipelines.plan.description import describe

SIZES = {"sample_size": 8, "in_channels": 4, "num_classes": 10}


def plan(preset="debug", config=None, **changes) -> str:
    usual = {
        "num_samples": 40,
        "latent_shape": (4, 8, 8),
        "num_classes": 10,
        "num_workers": 1,
        "min_workers": None,
        "rows_per_pass": 16,
        "num_shards": 1,
    }
    return describe(preset, config or debug(), **{**usual, **changes})


def lines_of(text: str, section: str) -> dict[str, str]:
    """{name: what stands behind it} of the section whose title begins so."""
    [lines] = [part.splitlines()[1:] for part in text.split("\n\n") if part.startswith(section)]
    pairs = [line.strip().split("  ", 1) for line in lines]
    return {name: rest.strip() for name, rest in pairs}


def test_work_is_the_arithmetic_of_rows_tokens_and_steps():
    config = replace(debug(), global_batch_size=10, num_steps=31)
    text = plan(config=config, num_workers=3, min_workers=2, rows_per_pass=2)
    assert lines_of(text, "work") == {
        # Patches 4,160; times 41,216; labels 704; two blocks of 18 D^2 + 15 D, D = 64; the last layer 12,480.
        "parameters": "207.9 k",
        "data": "40 images as latents 4x8x8, 10 classes",
        "an image": "4 tokens",
        "a step": "10 images, 40 tokens",
        "workers": "3: 3 or 4 rows each, in 2 passes of 1 or 2",
        "at fewest": "2: 5 rows each, in 3 passes of 1 or 2",
        "an epoch": "4.0 steps",
        "the training": "31 steps, 7.8 epochs",
    }
    # After steps 15 and 30, and after the last.
    assert lines_of(text, "checkpoints")["written"] == "3, one every 15 steps"


def test_operations_and_checkpoints_are_those_of_the_network():
    text = plan()
    # By token: 64^2 in, 64^2 out; two blocks of 12 D^2, and attention's 2 N^2 D. By image: two times, each 256 D + D^2,
    # and modulation, 6 D^2 by block and 2 D^2 at the end. Twice 528,384.
    step = step_flops(debug(), **SIZES)
    assert lines_of(text, "operations") == {
        "to sample an image": "1.06 MFLOP per network call",
        "a step": f"{step / 1e6:.2f} MFLOP",
        "the training": f"{30 * step / 1e9:.2f} GFLOP",
    }
    # Parameters, one average and two moments, 4 bytes of each; at steps 15 and 30.
    assert lines_of(text, "checkpoints") == {
        "each": "3.33 MB: parameters, moving averages, Adam's moments",
        "written": "2, one every 15 steps",
    }


def test_a_training_for_gpus_says_how_long_it_takes_at_a_round_rate():
    config = replace(debug(), num_steps=100_000_000_000)
    hours = step_flops(config, **SIZES) * 1e11 / 4e14 / 3600
    text = plan(config=config, num_workers=4)
    assert lines_of(text, "operations")["the training"].endswith(
        f": {hours:.2f} hours if each of 4 workers sustains 100 TFLOP/s"
    )


def test_memory_is_the_estimate_line_by_line_for_the_largest_pass():
    # Sixteen rows on 3 workers are 5 or 6, in 2 passes of at most 3; on 2 they are 8, in 2 passes of 4.
    memory = memory_estimate(debug(), **SIZES, rows_per_pass=4, num_shards=2)
    shown = lines_of(plan(num_workers=3, min_workers=2, rows_per_pass=4, num_shards=2), "memory")
    names = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "Adam's moments": memory.optimizer,
        "moving averages": memory.averages,
        "activations": memory.activations,
        "temporaries": memory.temporaries,
        "together": memory.total,
    }
    assert {name: rest.split(" MB  ")[0].strip() for name, rest in shown.items()} == {
        name: f"{size / 1e6:.2f}" for name, size in names.items()
    }
    assert shown["parameters"].endswith("float32, one of 2 shards")
    assert shown["activations"].endswith("of 4 rows in float32")


def test_every_field_stands_there_and_an_override_beside_its_presets_value():
    config = replace(debug(), global_batch_size=8, ema_decays=(0.9, 0.99))
    shown = lines_of(plan(config=config), "configuration")
    assert list(shown) == ["preset", *config.flat()]
    assert shown["preset"] == "debug"
    assert shown["network.patch_size"] == "4"
    assert shown["global_batch_size"] == "8    (debug has 16)"
    assert shown["ema_decays"] == "0.9 0.99    (debug has 0.9)"


def test_tokens_of_what_the_network_is_told_are_counted():
    work = lines_of(plan("debug_imf", debug_imf()), "work")
    assert work["an image"] == "24 tokens: 4 of patches, 20 of what the network is told"
    assert work["a step"] == "16 images, 384 tokens"


@pytest.mark.parametrize(
    ("rows", "workers", "rows_per_pass", "passes"),
    [
        (256, 8, 32, 1),
        (256, 8, 31, 2),
        (256, 3, 32, 3),  # 86 rows on the one with most
        (5, 2, 1, 2),  # 2 or 3 rows: a third pass would be empty on one
        (16, 16, 4, 1),
    ],
)
def test_passes_are_equally_many_on_all_workers_and_none_is_empty(rows, workers, rows_per_pass, passes):
    assert num_passes(rows, workers, rows_per_pass) == passes
    shares = [(rank + 1) * rows // workers - rank * rows // workers for rank in range(workers)]
    assert min(shares) >= passes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_shape": (4, 8, 16)}, "latents must be square, but got 8x16"),
        ({"num_workers": 17}, r"num_workers must lie in \[1, global_batch_size = 16\], but got 17"),
        ({"num_workers": 2, "min_workers": 3}, r"min_workers must lie in \[1, num_workers = 2\], but got 3"),
        ({"rows_per_pass": 0}, "rows_per_pass must be at least 1, but got 0"),
        ({"num_shards": 0}, "num_shards must be at least 1, but got 0"),
        ({"latent_shape": (4, 6, 6)}, "the latent size must be a multiple of the patch size, but got 6 and 4"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)
