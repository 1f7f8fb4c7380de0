"""What a training would be, as text, before anything is started: its configuration, its length and its costs."""

from math import ceil
from typing import Any

from meanflow_core.config import NetworkConfig, TrainingConfig
from meanflow_core.cost import checkpoint_bytes, forward_flops, memory_estimate, num_parameters, step_flops
from meanflow_core.imf_transformer import NUM_CONDITION_TOKENS
from meanflow_core.presets import PRESETS
from meanflow_core.training import num_passes

# A round figure to divide by, for the order of a training's length: an H100's peak is 989 in bfloat16, 67 in float32.
ASSUMED_TERAFLOPS = 100.0


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
    sizes = {"sample_size": height, "in_channels": channels, "num_classes": num_classes}
    batch = config.global_batch_size
    tokens, of_tokens = _tokens(config.network, height)
    steps_per_epoch = num_samples / batch
    workers = [("workers", f"{num_workers}: {_shares(batch, num_workers, rows_per_pass)}")]
    if fewest < num_workers:
        workers.append(("at fewest", f"{fewest}: {_shares(batch, fewest, rows_per_pass)}"))
    flops = step_flops(config, **sizes)
    checkpoints = ceil(config.num_steps / config.checkpoint_interval_steps)
    sections = [
        ("configuration", _configuration(preset, config)),
        (
            "work",
            [
                ("parameters", _scaled(num_parameters(config.network, **sizes), "")),
                (
                    "data",
                    f"{num_samples:,} images as latents {channels}x{height}x{width}, {_counted(num_classes, 'class')}",
                ),
                ("an image", f"{_counted(tokens, 'token')}{of_tokens}"),
                ("a step", f"{_counted(batch, 'image')}, {_counted(batch * tokens, 'token')}"),
                *workers,
                ("an epoch", f"{steps_per_epoch:,.1f} steps"),
                (
                    "the training",
                    f"{_counted(config.num_steps, 'step')}, {config.num_steps / steps_per_epoch:,.1f} epochs",
                ),
            ],
        ),
        (
            "operations (a multiplication and its addition are two)",
            [
                ("to sample an image", f"{_scaled(forward_flops(config.network, **sizes), 'FLOP')} per network call"),
                ("a step", _scaled(flops, "FLOP")),
                (
                    "the training",
                    f"{_scaled(flops * config.num_steps, 'FLOP')}{_time(flops * config.num_steps, num_workers)}",
                ),
            ],
        ),
        (
            "memory of each device, estimated without torch.compile and fragmentation",
            _memory(config, sizes, range(fewest, num_workers + 1), rows_per_pass, num_shards),
        ),
        (
            "checkpoints",
            [
                (
                    "each",
                    f"{_scaled(checkpoint_bytes(config, **sizes), 'B')}: parameters, moving averages, Adam's moments",
                ),
                ("written", f"{checkpoints:,}, one every {_counted(config.checkpoint_interval_steps, 'step')}"),
            ],
        ),
    ]
    return "\n\n".join(_section(title, lines) for title, lines in sections)


def _check_workers(config: TrainingConfig, num_workers: int, min_workers: int | None, rows_per_pass: int) -> None:
    if not 1 <= num_workers <= config.global_batch_size:
        raise ValueError(
            f"num_workers must lie in [1, global_batch_size = {config.global_batch_size}], but got {num_workers}"
        )
    if min_workers is not None and not 1 <= min_workers <= num_workers:
        raise ValueError(f"min_workers must lie in [1, num_workers = {num_workers}], but got {min_workers}")
    if rows_per_pass < 1:
        raise ValueError(f"rows_per_pass must be at least 1, but got {rows_per_pass}")


def _configuration(preset: str, config: TrainingConfig) -> list[tuple[str, str]]:
    usual = PRESETS[preset]().flat() if preset in PRESETS else config.flat()
    lines = [("preset", preset)]
    for name, value in config.flat().items():
        changed = "" if value == usual[name] else f"    ({preset} has {_value(usual[name])})"
        lines.append((name, f"{_value(value)}{changed}"))
    return lines


def _value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _tokens(config: NetworkConfig, sample_size: int) -> tuple[int, str]:
    patches = (sample_size // config.patch_size) ** 2
    if config.architecture == "dit":
        return patches, ""
    return patches + NUM_CONDITION_TOKENS, f": {patches} of patches, {NUM_CONDITION_TOKENS} of what the network is told"


def _shares(batch: int, num_workers: int, rows_per_pass: int) -> str:
    least, most = batch // num_workers, ceil(batch / num_workers)
    passes = num_passes(batch, num_workers, rows_per_pass)
    rows = f"{_span(least, most)} {'row' if most == 1 else 'rows'} each"
    if passes == 1:
        return f"{rows}, at once"
    return f"{rows}, in {passes} passes of {_span(least // passes, _largest_pass(batch, num_workers, rows_per_pass))}"


def _span(least: int, most: int) -> str:
    return (
        f"{least:,}" if least == most else f"{least:,} or {most:,}" if least + 1 == most else f"{least:,} to {most:,}"
    )


def _largest_pass(batch: int, num_workers: int, rows_per_pass: int) -> int:
    return ceil(ceil(batch / num_workers) / num_passes(batch, num_workers, rows_per_pass))


def _time(flops: float, num_workers: int) -> str:
    hours = flops / (num_workers * ASSUMED_TERAFLOPS * 1e12) / 3600.0
    if hours < 0.01:  # nobody's GPUs: a training for CPUs, with no such rate
        return ""
    time = f"{hours / 24.0:,.1f} days" if hours >= 48.0 else f"{hours:,.2f} hours"
    workers = "if the worker sustains" if num_workers == 1 else f"if each of {num_workers} workers sustains"
    return f": {time} {workers} {ASSUMED_TERAFLOPS:g} TFLOP/s"


def _memory(
    config: TrainingConfig, sizes: dict[str, int], worker_counts: range, rows_per_pass: int, num_shards: int
) -> list[tuple[str, str]]:
    rows = max(_largest_pass(config.global_batch_size, count, rows_per_pass) for count in worker_counts)
    memory = memory_estimate(config, **sizes, rows_per_pass=rows, num_shards=num_shards)
    shard = "" if num_shards == 1 else f", one of {num_shards} shards"
    checkpointing = " with checkpointing" if config.activation_checkpointing else ""
    lines = [
        ("parameters", memory.parameters, f"float32{shard}"),
        ("gradients", memory.gradients, f"float32{shard}"),
        ("Adam's moments", memory.optimizer, f"2 x float32{shard}"),
        ("moving averages", memory.averages, f"{len(config.ema_decays)} x float32{shard}"),
        ("activations", memory.activations, f"of {_counted(rows, 'row')} in {config.precision}{checkpointing}"),
        ("temporaries", memory.temporaries, "at the worst moment of a step"),
        ("together", memory.total, "and about 1 GB for CUDA; on the worker that draws samples, the autoencoder too"),
    ]
    unit, size_of_unit = ("GB", 1e9) if memory.total >= 1e9 else ("MB", 1e6)  # one for all: lines are compared
    width = len(f"{memory.total / size_of_unit:.2f}")
    return [(name, f"{size / size_of_unit:{width}.2f} {unit}  {note}") for name, size, note in lines]


def _section(title: str, lines: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in lines)])


def _counted(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _scaled(value: float, unit: str) -> str:
    """Four digits and a prefix of a thousand's power: 259.2 TFLOP, 13.53 GB, 676.4 M."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    power = 0
    while value >= 999.95 and power < len(prefixes) - 1:
        value, power = value / 1000.0, power + 1
    decimals = 0 if power == 0 else 1 if value >= 100 else 2
    return f"{value:.{decimals}f} {prefixes[power]}{unit}".rstrip()
