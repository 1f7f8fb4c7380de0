"""Text reports of `meanflow train --dry-run` and of `meanflow plan`, which adds times, traffic and cost."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

from meanflow_core.config import DiTConfig, ImprovedDiTConfig, TrainingConfig
from meanflow_core.networks.improved_dit import NUM_CONDITION_TOKENS
from meanflow_core.presets import preset_config
from meanflow_core.training import num_passes
from pipelines.plan.cost import (
    checkpoint_bytes,
    executed_flops,
    forward_flops,
    num_parameters,
    step_flops,
)
from pipelines.plan.estimate import (
    Estimate,
    compute_seconds,
    estimate,
    gradient_bytes,
    largest_pass,
    memory_of,
    seconds_of_flops,
)
from pipelines.plan.hardware import FRAGMENTATION, LINK_FRACTION, PEAK_FRACTION, RESERVED_BYTES, Cluster
from pipelines.plan.job import Workload

CHANGED = "    (preset: "  # begins the note on a field that differs from the preset
DRY_RUN_TERAFLOPS = 100.0  # a round figure; `meanflow plan` has the rates of specific GPUs
OTHER_NUMBERS_OF_GPUS = (1, 8, 16, 32, 64)
FLOPS_TITLE = "FLOPs (a multiply-add counts as two)"
MEMORY_TITLE = "memory of each device, without torch.compile and fragmentation"

Lines = list[tuple[str, str]]


def section(title: str, lines: Lines) -> str:
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


def format_range(values: Sequence[float], form: str | Callable[[float], str]) -> str:
    """ "1.5 to 2.0", or "1.5" if both round to that."""
    lowest, highest = (form(value) if callable(form) else format(value, form) for value in sorted(values))
    return lowest if lowest == highest else f"{lowest} to {highest}"


def describe(preset: str, workload: Workload, num_workers: int, min_workers: int | None = None) -> str:
    """Describes a training run before it starts: configuration, length, FLOPs, memory and checkpoints. No trailing newline.

    min_workers: lower bound for elastic training; None for a fixed number of workers.
    Raises ValueError for more workers than samples in a batch, and for incompatible sizes.
    """
    config, batch = workload.config, workload.config.global_batch_size
    fewest = num_workers if min_workers is None else min_workers
    if not 1 <= fewest <= num_workers <= batch:
        raise ValueError(
            f"1 <= min_workers <= num_workers <= global_batch_size = {batch} must hold, but got min_workers {fewest} and "
            f"num_workers {num_workers}"
        )
    samples_per_pass = workload.samples_per_pass or batch
    workers = {"workers": num_workers} | ({"at least": fewest} if fewest < num_workers else {})
    rows = max(largest_pass(batch, count, samples_per_pass) for count in range(fewest, num_workers + 1))
    seconds = config.num_steps * seconds_of_flops(
        step_flops(config, **workload.sizes), batch, num_workers, DRY_RUN_TERAFLOPS
    )
    length = f"{format_duration(seconds)} if each of {num_workers} workers sustains {DRY_RUN_TERAFLOPS:g} TFLOP/s"
    sections = [
        section("configuration", [("preset", preset), *_configuration(preset, config)]),
        section("work", _work(workload, workers, samples_per_pass)),
        # No time for a run this short: it is meant for CPUs, which are far slower than DRY_RUN_TERAFLOPS.
        section(FLOPS_TITLE, [*_flops(workload), *([("time", length)] if seconds >= 36.0 else [])]),
        section(MEMORY_TITLE, _memory(workload, rows, fewest)),
        section("checkpoints", _checkpoints(workload)),
    ]
    return "\n\n".join(sections)


def describe_estimate(preset: str, workload: Workload, cluster: Cluster, num_gpus: int) -> str:
    """Describes the training run on a number of GPUs, and the assumed rates. No trailing newline.

    Raises ValueError if the GPUs do not fill whole nodes or exceed the batch size, or if not even one sample fits on a GPU.
    """
    found, config, gpu = estimate(workload, cluster, num_gpus), workload.config, cluster.data_sheet
    changed = [(name, value) for name, value in _configuration(preset, config) if CHANGED in value]
    gpus = f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}"
    verdict = "fits" if found.micro_batch_size <= found.largest_micro_batch else "does NOT fit"
    share = ceil(config.global_batch_size / num_gpus)
    limit = f"at most {found.largest_micro_batch} of {share} samples fit"
    memory = _memory(workload, found.micro_batch_size, num_gpus)
    samples_per_pass = workload.samples_per_pass or found.largest_micro_batch
    sections = [
        f"Estimate: {preset} on {gpus} ({gpu.name}), {found.num_nodes} node(s). Its assumptions are at the end.",
        *([section("configuration", changed)] if changed else []),
        section("work", _work(workload, {"GPUs": num_gpus}, samples_per_pass)),
        section(FLOPS_TITLE, [*_flops(workload), *_executed(workload)]),
        section(MEMORY_TITLE, [*memory, ("usable", f"{gpu.usable_bytes / 1e9:.2f} GB: it {verdict}; {limit}")]),
        section(f"a step on {gpus}", _step(workload, found)),
        section("data, on each node", _data(workload, cluster, found)),
        section("checkpoints", [*_checkpoints(workload), *_uploads(workload, cluster, found)]),
        table("the training, by number of GPUs", _trainings(workload, cluster, found)),
        section("assumptions", _assumptions(workload, cluster)),
    ]
    return "\n\n".join(sections)


def _configuration(preset: str, config: TrainingConfig) -> Lines:
    """Every field; a changed one with the preset's value."""
    defaults = preset_config(preset).flat()

    def show(value: Any) -> str:
        return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)

    return [
        (name, show(value) + ("" if value == defaults[name] else f"{CHANGED}{show(defaults[name])})"))
        for name, value in config.flat().items()
    ]


def _work(workload: Workload, workers: dict[str, int], samples_per_pass: int) -> Lines:
    """workers: {name of the line: number of workers}."""
    config, batch = workload.config, workload.config.global_batch_size
    steps_per_epoch = workload.images / batch
    shape = "x".join(map(str, workload.latent_shape))
    return [
        ("parameters", with_prefix(num_parameters(config.network, **workload.sizes), "")),
        ("data", f"{workload.images:,} images, {workload.classes:,} classes, latents {shape}"),
        *_tokens(workload),
        *((name, f"{number}: {_shares(batch, number, samples_per_pass)}") for name, number in workers.items()),
        ("an epoch", f"{steps_per_epoch:,.1f} steps"),
        ("the training", f"{config.num_steps:,} steps, {config.num_steps / steps_per_epoch:,.1f} epochs"),
    ]


def _tokens(workload: Workload) -> Lines:
    """Numbers of tokens, for transformers."""
    network, batch = workload.config.network, workload.config.global_batch_size
    if not isinstance(network, DiTConfig | ImprovedDiTConfig):
        return [("a step", f"{batch:,} images")]
    patches = (workload.sizes["sample_size"] // network.patch_size) ** 2
    conditioning = NUM_CONDITION_TOKENS if isinstance(network, ImprovedDiTConfig) else 0
    kinds = f": {patches} patches and {conditioning} of conditioning" if conditioning else ""
    tokens = patches + conditioning
    return [("an image", f"{tokens:,} tokens{kinds}"), ("a step", f"{batch:,} images, {batch * tokens:,} tokens")]


def _shares(batch: int, num_workers: int, samples_per_pass: int) -> str:
    """Samples of each worker, and its number of passes."""
    fewest, most = batch // num_workers, ceil(batch / num_workers)
    passes = num_passes(batch, num_workers, samples_per_pass)
    samples = f"{format_range((fewest, most), ',')} samples each"
    if passes == 1:
        return f"{samples}, in one pass"
    sizes = (fewest // passes, largest_pass(batch, num_workers, samples_per_pass))
    return f"{samples}, in {passes} passes of {format_range(sizes, ',')}"


def _flops(workload: Workload) -> Lines:
    flops = step_flops(workload.config, **workload.sizes)
    forward = forward_flops(workload.config.network, **workload.sizes)
    return [
        ("to sample an image", f"{with_prefix(forward, 'FLOP')} per function evaluation"),
        ("a step", with_prefix(flops, "FLOP")),
        ("the training", with_prefix(flops * workload.config.num_steps, "FLOP")),
    ]


def _executed(workload: Workload) -> Lines:
    """The FLOPs that a step executes, if it recomputes some."""
    executed = executed_flops(workload.config, **workload.sizes)
    total = executed.in_precision + executed.of_derivative
    if total < 1.001 * step_flops(workload.config, **workload.sizes):
        return []
    precision = workload.config.derivative_precision
    of_derivative = (
        f", {with_prefix(executed.of_derivative, 'FLOP')} of it in {precision}" if executed.of_derivative else ""
    )
    return [("a step, as executed", f"{with_prefix(total, 'FLOP')}{of_derivative}")]


def _memory(workload: Workload, rows: int, num_devices: int) -> Lines:
    config, memory, shards = workload.config, memory_of(workload, rows, num_devices), workload.num_shards(num_devices)
    shard = "" if shards == 1 else f", one of {shards} shards"
    checkpointing = " with activation checkpointing" if config.activation_checkpointing else ""
    lines = [
        ("parameters", memory.parameters, f"float32{shard}"),
        ("gradients", memory.gradients, f"float32{shard}"),
        ("Adam's moments", memory.optimizer, f"2 x float32{shard}"),
        ("moving averages", memory.averages, f"{len(config.ema_decays)} x float32{shard}"),
        ("activations", memory.activations, f"of {rows} samples in {config.precision}{checkpointing}"),
        ("temporaries", memory.temporaries, "at the peak of a step"),
        ("total", memory.total, "plus about 1 GB for CUDA; the worker that draws images also holds the autoencoder"),
    ]
    unit, scale = ("GB", 1e9) if memory.total >= 1e9 else ("MB", 1e6)  # one unit for all, so that lines compare
    width = len(f"{memory.total / scale:.2f}")
    return [(name, f"{size / scale:{width}.2f} {unit}  {note}") for name, size, note in lines]


def _step(workload: Workload, found: Estimate) -> Lines:
    lines = [("compute", f"{found.compute_seconds:.3f} s")]
    if found.num_gpus == 1:
        return lines
    content = "gradients" if workload.parallelism == "ddp" else "parameters of every network call, and gradients"
    gradient = with_prefix(gradient_bytes(workload), "B")
    lines += [
        ("sent by each GPU", f"{with_prefix(found.gpu_bytes, 'B')} in a ring: {content} ({gradient} in float32)"),
        ("communication", f"{found.communication_seconds:.3f} s"),
    ]
    if found.num_nodes > 1:
        lines.append(("needed to hide it", f"{found.hiding_gbit:.0f} Gbit/s between nodes"))
    waiting = [100 * (1 - found.compute_seconds / seconds) for seconds in found.step_seconds]
    step = (
        f"{format_range(found.step_seconds, '.3f')} s: {format_range(waiting, '.0f')} % of it waiting for communication"
    )
    return [*lines, ("a step", step)]


def _data(workload: Workload, cluster: Cluster, found: Estimate) -> Lines:
    pace = workload.config.global_batch_size / found.step_seconds[0] / found.num_nodes
    size = f"{with_prefix(workload.latent_bytes, 'B')} {'with' if workload.config.mirror else 'without'} mirror images"
    return [
        ("latents", f"{size}, {workload.image_bytes:,} B per image"),
        ("copied in", f"{format_duration(workload.latent_bytes / (cluster.storage_gbyte * 1e9))}, once"),
        ("read", f"at most {pace:,.0f} images/s, {pace * workload.image_bytes / 1e6:,.1f} MB/s, from the node's copy"),
    ]


def _checkpoints(workload: Workload) -> Lines:
    interval = workload.config.checkpoint_interval_steps
    size = with_prefix(checkpoint_bytes(workload.config, **workload.sizes), "B")
    return [
        ("size", f"{size}: parameters, moving averages, Adam's moments"),
        ("number", f"{ceil(workload.config.num_steps / interval):,}, one every {interval:,} steps"),
    ]


def _uploads(workload: Workload, cluster: Cluster, found: Estimate) -> Lines:
    times = [workload.config.checkpoint_interval_steps * seconds for seconds in found.step_seconds]
    upload = checkpoint_bytes(workload.config, **workload.sizes) / found.num_nodes / (cluster.storage_gbyte * 1e9)
    late = "" if upload < times[0] else "; LONGER than the time between two"
    return [
        ("every", format_range(times, format_duration)),
        ("upload", f"{format_duration(upload)}, each node its part, in the background{late}"),
    ]


def _trainings(workload: Workload, cluster: Cluster, requested: Estimate) -> list[list[str]]:
    """The header, then a row for each of the requested number of GPUs and OTHER_NUMBERS_OF_GPUS that can train."""
    config, price = workload.config, cluster.price_per_gpu_hour
    on_one_gpu = compute_seconds(workload, cluster, 1)
    header = ["GPUs", "nodes", "s/step", "images/s", "days", "GPU hours", *([] if price is None else ["cost"])]
    rows = [[*header, "efficiency"]]
    for number in sorted({*OTHER_NUMBERS_OF_GPUS, requested.num_gpus}):
        found = requested if number == requested.num_gpus else _estimate_that_fits(workload, cluster, number)
        if found is None:
            continue
        steps = found.step_seconds
        hours = [seconds * config.num_steps * number / 3600 for seconds in steps]
        row = [
            str(number),
            str(found.num_nodes),
            format_range(steps, ".3f"),
            format_range([config.global_batch_size / seconds for seconds in steps], ",.0f"),
            format_range([seconds * config.num_steps / 86400 for seconds in steps], ",.1f"),
            format_range(hours, ",.0f"),
            *([] if price is None else [format_range([hour * price for hour in hours], ",.0f")]),
            f"{format_range([100 * on_one_gpu / number / seconds for seconds in steps], '.0f')} %",
        ]
        rows.append(row)
    return rows


def _estimate_that_fits(workload: Workload, cluster: Cluster, num_gpus: int) -> Estimate | None:
    """An estimate whose micro-batches fit, even if samples_per_pass does not. None if these GPUs cannot train."""
    try:
        found = estimate(workload, cluster, num_gpus)
    except ValueError:
        return None
    if found.micro_batch_size <= found.largest_micro_batch:
        return found
    return estimate(replace(workload, samples_per_pass=found.largest_micro_batch), cluster, num_gpus)


def _assumptions(workload: Workload, cluster: Cluster) -> Lines:
    gpu, precision, price = cluster.data_sheet, workload.config.precision, cluster.price_per_gpu_hour
    if cluster.teraflops is not None:
        rates = [("sustained per GPU", f"{cluster.teraflops:g} TFLOP/s of model FLOPs: --teraflops")]
    else:
        has_derivative = executed_flops(workload.config, **workload.sizes).of_derivative > 0.0
        precisions = [precision, *([workload.config.derivative_precision] if has_derivative else [])]
        source = (
            f"matrix products at {PEAK_FRACTION:g} of the {gpu.name}'s dense peak (a guess), the rest at "
            f"{gpu.memory_tbyte:g} TB/s, calibrated on a published DiT-XL/2 (Open-Sora, 8 H800); not measured here"
        )
        rates = [
            (
                f"sustained in {name}",
                f"{cluster.sustained_teraflops(name):.1f} of {gpu.peak_teraflops[name]:g} TFLOP/s: {source}",
            )
            for name in precisions
        ]
    link = (
        "--link-gbyte" if cluster.link_gbyte else f"{LINK_FRACTION:g} (a guess) of the data sheet's {gpu.link_gbyte:g}"
    )
    reserved = f"{FRAGMENTATION:.0%} fragmentation and {RESERVED_BYTES / 1e9:g} GB for CUDA and NCCL (guesses)"
    usable = f"{gpu.usable_bytes / 1e9:.1f} of {gpu.memory_bytes / 1e9:g} GB"
    return [
        *rates,
        ("GPU to GPU", f"{cluster.sustained_link_gbyte:g} GB/s: {link}"),
        ("node to node", f"{cluster.network_gbit:g} Gbit/s: --network-gbit; plain TCP has 100, EFA 400 to 3,200"),
        ("storage to node", f"{cluster.storage_gbyte:g} GB/s: --storage-gbyte; the default is a guess"),
        ("memory of a GPU", f"{usable}: data sheet, less {reserved}"),
        ("not counted", "latencies, sampling, checkpoints, restarts, waiting for data: comparatively small"),
        (
            "price of a GPU hour",
            "give --price-per-gpu-hour for the cost" if price is None else f"{price:g}: --price-per-gpu-hour",
        ),
    ]
