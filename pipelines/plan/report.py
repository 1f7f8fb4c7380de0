"""Text reports of `pipelines.train --dry-run` and of `pipelines.plan`, which adds times, traffic and cost."""

from collections.abc import Sequence
from math import ceil
from typing import Any

from meanflow_core.config import TrainingConfig
from meanflow_core.imf_transformer import NUM_CONDITION_TOKENS
from meanflow_core.presets import PRESETS
from meanflow_core.training import num_passes
from pipelines.plan.cost import (
    MemoryEstimate,
    checkpoint_bytes,
    forward_flops,
    memory_estimate,
    num_parameters,
    step_flops,
)
from pipelines.plan.estimate import Estimate, Range, Workload, largest_pass, seconds_of_flops
from pipelines.plan.hardware import FRAGMENTATION, LINK_FRACTION, PEAK_FRACTION, RESERVED_BYTES

DRY_RUN_TERAFLOPS = 100.0  # a round figure; `pipelines.plan` has the rates of specific GPUs

Lines = list[tuple[str, str]]


def section(title: str, lines: Sequence[tuple[str, str]]) -> str:
    """A title, then one line per (name, text) with aligned texts."""
    width = max(len(name) for name, _ in lines)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in lines)])


def table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """A title, then right-aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join([title, *(f"  {line}" for line in lines)])


def with_prefix(value: float, unit: str) -> str:
    """A value with four digits and a metric prefix: 259.2 TFLOP, 13.53 GB, 676.4 M."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    power = 0
    while value >= 999.95 and power < len(prefixes) - 1:
        value, power = value / 1000.0, power + 1
    decimals = 0 if power == 0 else 1 if value >= 100 else 2
    return f"{value:.{decimals}f} {prefixes[power]}{unit}".rstrip()


def format_duration(seconds: float) -> str:
    """2.7 s, 54 s, 7.1 minutes, 5.20 hours, 9.0 days."""
    if seconds < 120.0:
        return f"{seconds:.{1 if seconds < 10.0 else 0}f} s"
    if seconds < 7200.0:
        return f"{seconds / 60.0:.1f} minutes"
    hours = seconds / 3600.0
    return f"{hours / 24.0:,.1f} days" if hours >= 48.0 else f"{hours:,.2f} hours"


def format_range(pair: Range, form: str) -> str:
    """ "1.5 to 2.0", or "1.5" if both round to that."""
    lowest, highest = (format(value, form) for value in sorted(pair))
    return lowest if lowest == highest else f"{lowest} to {highest}"


def describe(preset: str, workload: Workload, num_workers: int, min_workers: int | None = None) -> str:
    """Describes a training run before it starts: configuration, length, FLOPs, memory and checkpoints. No trailing newline.

    min_workers: lower bound for elastic training; None for a fixed number of workers.
    Raises ValueError for more workers than samples in a batch, and for sizes that do not fit.
    """
    config, batch = workload.config, workload.config.global_batch_size
    fewest = num_workers if min_workers is None else min_workers
    if not 1 <= fewest <= num_workers <= batch:
        raise ValueError(
            f"1 <= min_workers <= num_workers <= global_batch_size = {batch} must hold, but got min_workers {fewest} and "
            f"num_workers {num_workers}"
        )
    samples_per_pass = workload.samples_per_pass or batch
    workers = [("workers", f"{num_workers}: {_shares(batch, num_workers, samples_per_pass)}")]
    if fewest < num_workers:
        workers.append(("at least", f"{fewest}: {_shares(batch, fewest, samples_per_pass)}"))
    rows = max(largest_pass(batch, count, samples_per_pass) for count in range(fewest, num_workers + 1))
    shards = workload.num_shards(fewest)
    flops = step_flops(config, **workload.sizes)
    seconds = config.num_steps * seconds_of_flops(flops, batch, num_workers, DRY_RUN_TERAFLOPS)
    length = "" if seconds < 36.0 else (  # shorter runs are for CPUs, which are far slower
        f": {format_duration(seconds)} if each of {num_workers} workers sustains {DRY_RUN_TERAFLOPS:g} TFLOP/s"
    )  # fmt: skip
    memory = memory_estimate(config, **workload.sizes, samples_per_pass=rows, num_shards=shards)
    configuration = [(name, value) for name, value, _ in _against_preset(preset, config)]
    return "\n\n".join(
        [
            section("configuration", [("preset", preset), *configuration]),
            section("work", _work(workload, workers)),
            section("FLOPs (a multiply-add counts as two)", _flops(workload, flops, length)),
            section(
                "memory of each device, without torch.compile and fragmentation", _memory(config, memory, rows, shards)
            ),
            section("checkpoints", _checkpoints(workload)),
        ]
    )


def describe_estimate(preset: str, estimate: Estimate) -> str:
    """Describes an estimate and its assumptions. No trailing newline."""
    workload, cluster, config = estimate.workload, estimate.cluster, estimate.workload.config
    requested = estimate.requested
    gpus = f"{requested.num_gpus} GPU{'s' if requested.num_gpus > 1 else ''}"
    rows = workload.samples_per_pass or estimate.largest_micro_batch
    workers = [("a GPU", _shares(config.global_batch_size, requested.num_gpus, rows))]
    changed = [(name, value) for name, value, is_changed in _against_preset(preset, config) if is_changed]
    shards, share = workload.num_shards(requested.num_gpus), ceil(config.global_batch_size / requested.num_gpus)
    verdict = "fits" if estimate.fits else "does NOT fit"
    limit = f"at most {estimate.largest_micro_batch} of {share} samples fit"
    usable = ("usable", f"{cluster.gpu.usable_bytes / 1e9:.2f} GB: it {verdict}; {limit}")
    sections = [
        f"Estimate: {preset} on {gpus} ({cluster.gpu.name}), {requested.num_nodes} node(s). Its assumptions are at the end.",
        *([section("configuration", changed)] if changed else []),
        section("work", _work(workload, workers)),
        section("FLOPs (a multiply-add counts as two)", [*_flops(workload, estimate.flops), *_executed(estimate)]),
        section(
            "memory of each GPU, without torch.compile",
            [*_memory(config, estimate.memory, requested.micro_batch_size, shards), usable],
        ),
        section(f"a step on {gpus}", _step(estimate)),
        section("data, on each node", _data(estimate)),
        section("checkpoints", [*_checkpoints(workload), *_checkpoint_times(estimate)]),
        section(f"the training on {gpus}", _training(estimate)),
        table("on other numbers of GPUs", _scaling(estimate)),
        section("assumptions", [(name, f"{value}: {source}") for name, value, source in assumptions(estimate)]),
    ]
    return "\n\n".join(sections)


def assumptions(estimate: Estimate) -> list[tuple[str, str, str]]:
    """(name, value with unit, source) of every assumed number."""
    cluster, gpu = estimate.cluster, estimate.cluster.gpu
    rates = []
    if cluster.teraflops is not None:
        rates.append(("sustained per GPU", f"{cluster.teraflops:g} TFLOP/s of model FLOPs", "--teraflops"))
    else:
        for precision in dict.fromkeys([estimate.workload.config.precision, "float32"]):
            if precision == "float32" and not estimate.executed.in_float32 and len(rates):
                continue
            rates.append(
                (
                    f"sustained in {precision}",
                    f"{cluster.sustained_teraflops(precision):.1f} of {gpu.peak_teraflops[precision]:g} TFLOP/s",
                    f"matrix products at {PEAK_FRACTION:g} of the {gpu.name}'s dense peak (a guess), the rest at "
                    f"{gpu.memory_tbyte:g} TB/s, calibrated on a published DiT-XL/2 (Open-Sora, 8 H800); not measured here",
                )
            )
    from_sheet = cluster.link_gbyte == LINK_FRACTION * gpu.link_gbyte
    link = f"{LINK_FRACTION:g} (a guess) of the data sheet's {gpu.link_gbyte:g}" if from_sheet else "--link-gbyte"
    price = cluster.price_per_gpu_hour
    return [
        *rates,
        ("GPU to GPU", f"{cluster.link_gbyte:g} GB/s", link),
        ("node to node", f"{cluster.network_gbit:g} Gbit/s", "--network-gbit; plain TCP has 100, EFA 400 to 3,200"),
        ("storage to node", f"{cluster.storage_gbyte:g} GB/s", "--storage-gbyte; the default is a guess"),
        (
            "memory of a GPU",
            f"{gpu.usable_bytes / 1e9:.1f} of {gpu.memory_bytes / 1e9:g} GB",
            f"data sheet, less {FRAGMENTATION:.0%} fragmentation and {RESERVED_BYTES / 1e9:g} GB for CUDA and NCCL (guesses)",
        ),
        ("not counted", "latencies, sampling, checkpoints, restarts, waiting for data", "comparatively small"),
        *([] if price is None else [("price of a GPU hour", f"{price:g}", "--price-per-gpu-hour")]),
    ]


def _against_preset(preset: str, config: TrainingConfig) -> list[tuple[str, str, bool]]:
    """(name, value, whether it differs from the preset's) of every field."""
    defaults = PRESETS[preset]().flat() if preset in PRESETS else config.flat()

    def show(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    found = []
    for name, value in config.flat().items():
        changed = value != defaults[name]
        found.append((name, show(value) + (f"    (preset: {show(defaults[name])})" if changed else ""), changed))
    return found


def _work(workload: Workload, workers: Lines) -> Lines:
    config, sizes = workload.config, workload.sizes
    size, batch = sizes["sample_size"], config.global_batch_size
    shape = "x".join(map(str, workload.latent_shape))
    patches = (size // config.network.patch_size) ** 2
    conditioning = 0 if config.network.architecture == "dit" else NUM_CONDITION_TOKENS
    tokens = patches + conditioning
    of_tokens = f": {patches} patches and {conditioning} of conditioning" if conditioning else ""
    steps_per_epoch = workload.num_images / batch
    return [
        ("parameters", with_prefix(num_parameters(config.network, **sizes), "")),
        ("data", f"{workload.num_images:,} images, {sizes['num_classes']:,} classes, latents {shape}"),
        ("an image", f"{tokens:,} tokens{of_tokens}"),
        ("a step", f"{batch:,} images, {batch * tokens:,} tokens"),
        *workers,
        ("an epoch", f"{steps_per_epoch:,.1f} steps"),
        ("the training", f"{config.num_steps:,} steps, {config.num_steps / steps_per_epoch:,.1f} epochs"),
    ]  # fmt: skip


def _shares(batch: int, num_workers: int, samples_per_pass: int) -> str:
    """Samples of each worker, and its number of passes."""
    fewest, most = batch // num_workers, ceil(batch / num_workers)
    passes = num_passes(batch, num_workers, samples_per_pass)
    samples = f"{format_range((fewest, most), ',')} samples each"
    if passes == 1:
        return f"{samples}, in one pass"
    pair = (fewest // passes, largest_pass(batch, num_workers, samples_per_pass))
    return f"{samples}, in {passes} passes of {format_range(pair, ',')}"


def _flops(workload: Workload, flops: float, length: str = "") -> Lines:
    forward = forward_flops(workload.config.network, **workload.sizes)
    return [
        ("to sample an image", f"{with_prefix(forward, 'FLOP')} per function evaluation"),
        ("a step", with_prefix(flops, "FLOP")),
        ("the training", f"{with_prefix(flops * workload.config.num_steps, 'FLOP')}{length}"),
    ]


def _executed(estimate: Estimate) -> Lines:
    executed = estimate.executed
    total = executed.in_precision + executed.in_float32
    if total < 1.001 * estimate.flops:
        return []
    in_float32 = f", {with_prefix(executed.in_float32, 'FLOP')} of it in float32" if executed.in_float32 else ""
    return [("a step, as executed", f"{with_prefix(total, 'FLOP')}{in_float32}")]


def _memory(config: TrainingConfig, memory: MemoryEstimate, rows: int, num_shards: int) -> Lines:
    shard = "" if num_shards == 1 else f", one of {num_shards} shards"
    checkpointing = " with activation checkpointing" if config.activation_checkpointing else ""
    lines = [
        ("parameters", memory.parameters, f"float32{shard}"),
        ("gradients", memory.gradients, f"float32{shard}"),
        ("Adam's moments", memory.optimizer, f"2 x float32{shard}"),
        ("moving averages", memory.averages, f"{len(config.ema_decays)} x float32{shard}"),
        ("activations", memory.activations, f"of {rows} samples in {config.precision}{checkpointing}"),
        ("temporaries", memory.temporaries, "at the peak of a step"),
        ("total", memory.total, "plus about 1 GB for CUDA; the worker that draws samples also holds the autoencoder"),
    ]
    unit, scale = ("GB", 1e9) if memory.total >= 1e9 else ("MB", 1e6)  # one unit for all, so that lines compare
    width = len(f"{memory.total / scale:.2f}")
    return [(name, f"{size / scale:{width}.2f} {unit}  {note}") for name, size, note in lines]


def _step(estimate: Estimate) -> Lines:
    requested = estimate.requested
    lines = [("compute", f"{requested.compute_seconds:.3f} s")]
    if requested.num_gpus == 1:
        return lines
    content = (
        "gradients" if estimate.workload.parallelism == "ddp" else "parameters of every network call, and gradients"
    )
    gradient = with_prefix(estimate.workload.gradient_bytes, "B")
    waiting = [100 * (1 - requested.compute_seconds / seconds) for seconds in requested.step_seconds]
    lines += [
        ("sent by each GPU", f"{with_prefix(requested.gpu_bytes, 'B')} in a ring: {content} ({gradient} in float32)"),
        ("communication", f"{requested.communication_seconds:.3f} s"),
    ]
    if requested.num_nodes > 1:
        lines.append(("to hide it", f"{estimate.hiding_gbit:.0f} Gbit/s between nodes"))
    both = format_range(requested.step_seconds, ".3f")
    lines.append(
        ("a step", f"{both} s: {format_range((waiting[0], waiting[1]), '.0f')} % of it waiting for communication")
    )
    return lines


def _data(estimate: Estimate) -> Lines:
    workload, pace = estimate.workload, estimate.node_images_per_second
    mirrored = "with" if workload.mirrored else "without"
    size = with_prefix(workload.latent_bytes, "B")
    return [
        ("latents", f"{size} {mirrored} mirror images, {workload.image_bytes:,} B per image"),
        ("copied in", f"{format_duration(estimate.copy_seconds)}, once"),
        ("read", f"at most {pace:,.0f} images/s, {pace * workload.image_bytes / 1e6:,.1f} MB/s, from the node's copy"),
    ]  # fmt: skip


def _checkpoints(workload: Workload) -> Lines:
    config = workload.config
    interval = config.checkpoint_interval_steps
    size = with_prefix(checkpoint_bytes(config, **workload.sizes), "B")
    return [
        ("size", f"{size}: parameters, moving averages, Adam's moments"),
        ("number", f"{ceil(config.num_steps / interval):,}, one every {interval:,} steps"),
    ]  # fmt: skip


def _checkpoint_times(estimate: Estimate) -> Lines:
    shortest, longest = (format_duration(seconds) for seconds in estimate.checkpoint_seconds)
    late = "" if estimate.upload_seconds < estimate.checkpoint_seconds[0] else "; LONGER than the time between two"
    return [
        ("every", shortest if shortest == longest else f"{shortest} to {longest}"),
        ("upload", f"{format_duration(estimate.upload_seconds)}, each node its part, in the background{late}"),
    ]


def _training(estimate: Estimate) -> Lines:
    requested = estimate.requested
    steps = (1 / requested.step_seconds[1], 1 / requested.step_seconds[0])
    days = (requested.seconds[0] / 86400, requested.seconds[1] / 86400)
    return [
        ("pace", f"{format_range(requested.images_per_second, ',.0f')} images/s, {format_range(steps, '.2f')} steps/s"),
        ("time", f"{format_range(days, ',.1f')} days"),
        ("GPU hours", format_range(requested.gpu_hours, ",.0f")),
        ("cost", "give --price-per-gpu-hour" if requested.cost is None else format_range(requested.cost, ",.0f")),
    ]


def _scaling(estimate: Estimate) -> list[list[str]]:
    has_price = estimate.cluster.price_per_gpu_hour is not None
    rows = [
        ["GPUs", "nodes", "s/step", "images/s", "days", "GPU hours", *(["cost"] if has_price else []), "efficiency"]
    ]
    for training in estimate.trainings:
        days = (training.seconds[0] / 86400, training.seconds[1] / 86400)
        percent = (100 * training.efficiency[0], 100 * training.efficiency[1])
        rows.append(
            [
                str(training.num_gpus),
                str(training.num_nodes),
                format_range(training.step_seconds, ".3f"),
                format_range(training.images_per_second, ",.0f"),
                format_range(days, ",.1f"),
                format_range(training.gpu_hours, ",.0f"),
                *([] if training.cost is None else [format_range(training.cost, ",.0f")]),
                f"{format_range(percent, '.0f')} %",
            ]
        )
    for number in estimate.left_out:  # more GPUs than samples in a batch, or not one sample fits
        rows.append([str(number), *["-"] * (len(rows[0]) - 1)])
    return rows
