"""What a training would be, as text, before anything is started: its configuration, its length and its costs."""

from math import ceil
from typing import Any

from meanflow_core.config import NetworkConfig, TrainingConfig
from meanflow_core.imf_transformer import NUM_CONDITION_TOKENS
from meanflow_core.presets import PRESETS
from meanflow_core.training import num_passes
from pipelines.latents.manifest import NetworkSizes
from pipelines.plan.cost import (
    MemoryEstimate,
    checkpoint_bytes,
    forward_flops,
    memory_estimate,
    num_parameters,
    step_flops,
)
from pipelines.plan.scale import largest_pass, seconds_of_flops
from pipelines.plan.sections import counted, duration, scaled, section, span

# A round figure to divide by, for the order of a training's length; `python -m pipelines.plan` knows GPUs.
ASSUMED_TERAFLOPS = 100.0

Lines = list[tuple[str, str]]


def describe(
    preset: str,
    config: TrainingConfig,
    *,
    num_samples: int,
    latent_shape: tuple[int, int, int],
    num_classes: int,
    num_workers: int,
    min_workers: int | None,
    rows_per_pass: int,
    num_shards: int,
) -> str:
    """Everything that is known of a training before it starts, for a terminal; ends without a newline.

    latent_shape: (C, H, W). min_workers: the fewest workers that it goes on with, None where their number is fixed.
    rows_per_pass: the most rows that a worker takes at once. num_shards: devices that share parameters, gradients,
    optimiser and averages; 1 where each has all.
    Raises ValueError for latents that are not square, workers without rows, or sizes that do not fit.
    """
    channels, height, width = latent_shape
    if height != width:
        raise ValueError(f"latents must be square, but got {height}x{width}")
    _check_workers(config, num_workers, min_workers, rows_per_pass)
    fewest = num_workers if min_workers is None else min_workers
    sizes: NetworkSizes = {"sample_size": height, "in_channels": channels, "num_classes": num_classes}
    batch = config.global_batch_size
    workers = [("workers", f"{num_workers}: {shares(batch, num_workers, rows_per_pass)}")]
    if fewest < num_workers:
        workers.append(("at fewest", f"{fewest}: {shares(batch, fewest, rows_per_pass)}"))
    rows = max(largest_pass(batch, count, rows_per_pass) for count in range(fewest, num_workers + 1))
    memory = memory_estimate(config, **sizes, rows_per_pass=rows, num_shards=num_shards)
    flops = step_flops(config, **sizes)
    seconds = config.num_steps * seconds_of_flops(flops, batch, num_workers, ASSUMED_TERAFLOPS)
    length = ""
    if seconds > 36.0:  # else nobody's GPUs: a training for CPUs, with no such rate
        length = f": {duration(seconds)} {_if_sustained(num_workers)} {ASSUMED_TERAFLOPS:g} TFLOP/s"
    sections = [
        ("configuration", _configuration(preset, config)),
        ("work", work(config, sizes, num_samples, workers)),
        (OPERATIONS, operations(config, sizes, flops, length)),
        (MEMORY, memory_lines(config, memory, rows, num_shards)),
        ("checkpoints", checkpoints(config, sizes)),
    ]
    return "\n\n".join(section(title, lines) for title, lines in sections)


def _check_workers(config: TrainingConfig, num_workers: int, min_workers: int | None, rows_per_pass: int) -> None:
    if not 1 <= num_workers <= config.global_batch_size:
        raise ValueError(
            f"num_workers must lie in [1, global_batch_size = {config.global_batch_size}], but got {num_workers}"
        )
    if min_workers is not None and not 1 <= min_workers <= num_workers:
        raise ValueError(f"min_workers must lie in [1, num_workers = {num_workers}], but got {min_workers}")
    if rows_per_pass < 1:
        raise ValueError(f"rows_per_pass must be at least 1, but got {rows_per_pass}")


def _if_sustained(num_workers: int) -> str:
    return "if the worker sustains" if num_workers == 1 else f"if each of {num_workers} workers sustains"


def _configuration(preset: str, config: TrainingConfig) -> Lines:
    return [("preset", preset), *((name, value) for name, value, _ in _against_preset(preset, config))]


def changes(preset: str, config: TrainingConfig) -> Lines:
    """The numbers that are not the preset's, each beside the preset's own."""
    return [(name, value) for name, value, is_changed in _against_preset(preset, config) if is_changed]


def _against_preset(preset: str, config: TrainingConfig) -> list[tuple[str, str, bool]]:
    usual = PRESETS[preset]().flat() if preset in PRESETS else config.flat()
    return [
        (name, _value(value) + ("" if value == usual[name] else f"    ({preset} has {_value(usual[name])})"),
         value != usual[name])
        for name, value in config.flat().items()
    ]  # fmt: skip


def _value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def work(config: TrainingConfig, sizes: NetworkSizes, num_samples: int, workers: Lines) -> Lines:
    """The network, the data, a step, and the whole. workers: lines of who takes which part of a step."""
    size, batch = sizes["sample_size"], config.global_batch_size
    tokens, of_tokens = _tokens(config.network, size)
    steps_per_epoch = num_samples / batch
    shape = f"{sizes['in_channels']}x{size}x{size}"
    return [
        ("parameters", scaled(num_parameters(config.network, **sizes), "")),
        ("data", f"{num_samples:,} images as latents {shape}, {counted(sizes['num_classes'], 'class')}"),
        ("an image", f"{counted(tokens, 'token')}{of_tokens}"),
        ("a step", f"{counted(batch, 'image')}, {counted(batch * tokens, 'token')}"),
        *workers,
        ("an epoch", f"{steps_per_epoch:,.1f} steps"),
        ("the training", f"{counted(config.num_steps, 'step')}, {config.num_steps / steps_per_epoch:,.1f} epochs"),
    ]


def _tokens(config: NetworkConfig, sample_size: int) -> tuple[int, str]:
    patches = (sample_size // config.patch_size) ** 2
    if config.architecture == "dit":
        return patches, ""
    return patches + NUM_CONDITION_TOKENS, f": {patches} of patches, {NUM_CONDITION_TOKENS} of what the network is told"


def shares(batch: int, num_workers: int, rows_per_pass: int) -> str:
    """The rows of each worker, and in how many passes it takes them."""
    least, most = batch // num_workers, ceil(batch / num_workers)
    passes = num_passes(batch, num_workers, rows_per_pass)
    rows = f"{span(least, most)} {'row' if most == 1 else 'rows'} each"
    if passes == 1:
        return f"{rows}, at once"
    return f"{rows}, in {passes} passes of {span(least // passes, largest_pass(batch, num_workers, rows_per_pass))}"


OPERATIONS = "operations (a multiplication and its addition are two)"


def operations(config: TrainingConfig, sizes: NetworkSizes, flops: float, length: str = "") -> Lines:
    """Operations of a network call, a step and the whole. flops: a step's. length: how long the whole takes."""
    return [
        ("to sample an image", f"{scaled(forward_flops(config.network, **sizes), 'FLOP')} per network call"),
        ("a step", scaled(flops, "FLOP")),
        ("the training", f"{scaled(flops * config.num_steps, 'FLOP')}{length}"),
    ]


MEMORY = "memory of each device, estimated without torch.compile and fragmentation"


def memory_lines(config: TrainingConfig, memory: MemoryEstimate, rows: int, num_shards: int) -> Lines:
    """What a device keeps. rows: the most that it takes at once."""
    shard = "" if num_shards == 1 else f", one of {num_shards} shards"
    checkpointing = " with checkpointing" if config.activation_checkpointing else ""
    lines = [
        ("parameters", memory.parameters, f"float32{shard}"),
        ("gradients", memory.gradients, f"float32{shard}"),
        ("Adam's moments", memory.optimizer, f"2 x float32{shard}"),
        ("moving averages", memory.averages, f"{len(config.ema_decays)} x float32{shard}"),
        ("activations", memory.activations, f"of {counted(rows, 'row')} in {config.precision}{checkpointing}"),
        ("temporaries", memory.temporaries, "at the worst moment of a step"),
        ("together", memory.total, "and about 1 GB for CUDA; on the worker that draws samples, the autoencoder too"),
    ]
    unit, size_of_unit = ("GB", 1e9) if memory.total >= 1e9 else ("MB", 1e6)  # one for all: lines are compared
    width = len(f"{memory.total / size_of_unit:.2f}")
    return [(name, f"{size / size_of_unit:{width}.2f} {unit}  {note}") for name, size, note in lines]


def checkpoints(config: TrainingConfig, sizes: NetworkSizes, interval: str = "") -> Lines:
    """Their size and number. interval: the time between two."""
    number = ceil(config.num_steps / config.checkpoint_interval_steps)
    each = scaled(checkpoint_bytes(config, **sizes), "B")
    return [
        ("each", f"{each}: parameters, moving averages, Adam's moments"),
        ("written", f"{number:,}, one every {counted(config.checkpoint_interval_steps, 'step')}{interval}"),
    ]
