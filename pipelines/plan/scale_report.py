"""What `pipelines.plan` shows of an estimate: text, JSON, a picture."""

import json
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

import matplotlib

from pipelines.plan import description
from pipelines.plan.hardware import FRAGMENTED_SHARE, RESERVED_BYTES, SHARE_OF_LINK, SHARE_OF_PEAK
from pipelines.plan.scale import Estimate, Training
from pipelines.plan.sections import counted, duration, scaled, section, table

Range = tuple[float, float]


@dataclass(frozen=True)
class Assumption:
    """A number that an estimate stands on."""

    name: str
    """Of what."""
    value: str
    """With its unit."""
    source: str
    """Where it comes from."""


def assumptions(estimate: Estimate) -> list[Assumption]:
    """Everything that was put in and not counted, with its value and where it comes from."""
    cluster, config = estimate.cluster, estimate.workload.config
    gpu = cluster.gpu
    found = []
    if cluster.teraflops is not None:
        found.append(Assumption("a GPU sustains", f"{cluster.teraflops:g} TFLOP/s of the model's", "--teraflops"))
    else:
        precisions = [config.precision, *(["float32"] if estimate.executed.in_float32 else [])]
        for precision in dict.fromkeys(precisions):
            peak, sustained = gpu.peak_teraflops[precision], cluster.sustained_teraflops(precision)
            found += [
                Assumption(f"peak in {precision}", f"{peak:g} TFLOP/s", f"data sheet of the {gpu.name}, dense"),
                Assumption(
                    f"sustained in {precision}",
                    f"{sustained:.1f} TFLOP/s",
                    f"products at {SHARE_OF_PEAK:g} of the peak (a guess), the rest at {gpu.memory_tbyte:g} TB/s of memory, "
                    f"as much of it as a published DiT-XL/2 has (Open-Sora, 8 H800); no GPU was measured here",
                ),
            ]
    link = "--link-gbyte"
    if cluster.link_gbyte == SHARE_OF_LINK * gpu.link_gbyte:
        link = f"{SHARE_OF_LINK:g} (a guess) of the data sheet's {gpu.link_gbyte:g} in one direction"
    found += [
        Assumption("GPU to GPU", f"{cluster.link_gbyte:g} GB/s", link),
        Assumption(
            "node to node", f"{cluster.network_gbit:g} Gbit/s", "--network-gbit: 100 is plain TCP, EFA has 400 to 3,200"
        ),
        Assumption("storage to node", f"{cluster.storage_gbyte:g} GB/s", "--storage-gbyte: a guess"),
        Assumption(
            "a GPU's memory",
            f"{gpu.usable_bytes / 1e9:.1f} of {gpu.memory_bytes / 1e9:g} GB",
            f"data sheet; less {FRAGMENTED_SHARE:.0%} for gaps, {RESERVED_BYTES / 1e9:g} GB for CUDA and NCCL (guesses)",
        ),
        Assumption(
            "not counted",
            "latencies, pictures, checkpoints, restarts, waiting for data",
            "little beside the steps, where all is well",
        ),
    ]
    if cluster.price_per_gpu_hour is not None:
        found.append(Assumption("a GPU's hour", f"{cluster.price_per_gpu_hour:g}", "--price-per-gpu-hour"))
    return found


def text(preset: str, estimate: Estimate, stands_on: list[Assumption]) -> str:
    """For a terminal; ends without a newline."""
    workload, config, sizes = estimate.workload, estimate.workload.config, estimate.workload.sizes
    asked = estimate.asked
    where = counted(asked.num_gpus, "GPU")
    rows = workload.rows_per_pass or estimate.largest_rows
    share = description.shares(config.global_batch_size, asked.num_gpus, rows)
    gpus = f"{where} ({estimate.cluster.gpu.name}), {counted(asked.num_nodes, 'node')}"
    changed = description.changes(preset, config)
    sections = [
        f"An estimate: {preset} on {gpus}. What it stands on is at its end.",
        *([section("configuration", changed)] if changed else []),
        section("work", description.work(config, sizes, workload.num_images, [("a GPU", share)])),
        section(description.OPERATIONS, [*description.operations(config, sizes, estimate.flops), *_executed(estimate)]),
        section(description.MEMORY, _memory(estimate)),
        section(f"a step on {where}", _step(estimate)),
        section("data, on each node", _data(estimate)),
        section("checkpoints", _checkpoints(estimate)),
        section(f"the training on {where}", _training(asked)),
        table("on other numbers of GPUs", *_scaling(estimate)),
        *([_left_out(estimate)] if estimate.left_out else []),
        section("assumptions", [(entry.name, f"{entry.value}: {entry.source}") for entry in stands_on]),
    ]
    return "\n\n".join(sections)


def _executed(estimate: Estimate) -> list[tuple[str, str]]:
    executed = estimate.executed
    whole = executed.in_precision + executed.in_float32
    if whole < 1.001 * estimate.flops:
        return []
    in_float32 = f", of them {scaled(executed.in_float32, 'FLOP')} in float32" if executed.in_float32 else ""
    return [("a step, as it is run", f"{scaled(whole, 'FLOP')}{in_float32}")]


def _memory(estimate: Estimate) -> list[tuple[str, str]]:
    asked, usable, workload = estimate.asked, estimate.cluster.gpu.usable_bytes, estimate.workload
    shards = workload.num_shards(asked.num_gpus)
    share = ceil(workload.config.global_batch_size / asked.num_gpus)
    verdict = (
        f"{'it fits' if estimate.fits else 'it does NOT fit'}; at most {estimate.largest_rows} of its {share} rows do"
    )
    return [
        *description.memory_lines(workload.config, estimate.memory, asked.rows_at_once, shards),
        ("to be had", f"{usable / 1e9:.2f} GB: {verdict} at once"),
    ]


def _step(estimate: Estimate) -> list[tuple[str, str]]:
    asked, sent = estimate.asked, estimate.asked.communication
    compute = ("compute", f"{asked.compute_seconds:.3f} s")
    if asked.num_gpus == 1:
        return [compute]
    what = "gradients" if estimate.workload.parallelism == "ddp" else "parameters, for each call anew, and gradients"
    gradient = scaled(estimate.workload.gradient_bytes, "B")
    lines = [
        compute,
        ("out of each GPU", f"{scaled(sent.gpu_bytes, 'B')} in a ring: {what}, {gradient} in float32"),
        ("communication", f"{sent.seconds:.3f} s in a ring"),
    ]
    if asked.num_nodes > 1:
        first = "if nodes add up first"
        lines[2:] = [
            (
                "out of each node",
                f"{scaled(sent.node_bytes, 'B')} in a ring; {scaled(sent.least_node_bytes, 'B')} {first}",
            ),
            ("communication", f"{sent.seconds:.3f} s in a ring; {sent.hierarchical_seconds:.3f} s {first}"),
            ("to hide it", f"{estimate.hiding_gbit:.0f} Gbit/s a node, for the ring"),
        ]
    waiting = tuple(100 * (1 - asked.compute_seconds / seconds) for seconds in asked.step_seconds)
    lines.append(
        (
            "together",
            f"{_range(asked.step_seconds, '.3f')} s, as all that can hides behind compute, or nothing: "
            f"{_range((waiting[0], waiting[1]), '.0f')} % of it waiting",
        )
    )
    return lines


def _data(estimate: Estimate) -> list[tuple[str, str]]:
    workload = estimate.workload
    mirrored = "with mirror images" if workload.mirrored else "without mirror images"
    pace = estimate.node_images_per_second
    return [
        ("latents", f"{scaled(workload.latent_bytes, 'B')} {mirrored}, {workload.image_bytes:,} B an image"),
        ("copied in", f"{duration(estimate.copy_seconds)}, once"),
        (
            "read",
            f"{pace:,.0f} images/s at most: {pace * workload.image_bytes / 1e6:,.1f} MB/s, from the node's own copy",
        ),
    ]


def _checkpoints(estimate: Estimate) -> list[tuple[str, str]]:
    least, most = (duration(seconds) for seconds in estimate.checkpoint_seconds)
    every = f": {least}" if least == most else f": {least} to {most}"
    late = "" if estimate.upload_seconds < estimate.checkpoint_seconds[0] else ", LONGER than between two"
    return [
        *description.checkpoints(estimate.workload.config, estimate.workload.sizes, every),
        ("uploaded in", f"{duration(estimate.upload_seconds)}, every node its part, beside the next steps{late}"),
    ]


def _training(asked: Training) -> list[tuple[str, str]]:
    least, most = asked.seconds
    cost = "give --price-per-gpu-hour" if asked.cost is None else _range(asked.cost, ",.0f")
    steps = (1 / asked.step_seconds[1], 1 / asked.step_seconds[0])
    return [
        ("pace", f"{_range(asked.images_per_second, ',.0f')} images/s, {_range(steps, '.2f')} steps/s"),
        ("time", f"{_range((least / 86400, most / 86400), ',.1f')} days"),
        ("GPU-hours", _range(asked.gpu_hours, ",.0f")),
        ("cost", cost),
    ]


def _scaling(estimate: Estimate) -> tuple[list[str], list[list[str]]]:
    has_price = estimate.cluster.price_per_gpu_hour is not None
    cost = ["cost"] if has_price else []
    rows = []
    for training in estimate.others:
        days = (training.seconds[0] / 86400, training.seconds[1] / 86400)
        percent = (100 * training.efficiency[0], 100 * training.efficiency[1])
        rows.append(
            [
                str(training.num_gpus),
                str(training.num_nodes),
                _range(training.step_seconds, ".3f"),
                _range(training.images_per_second, ",.0f"),
                _range(days, ",.1f"),
                _range(training.gpu_hours, ",.0f"),
                *([_range(training.cost, ",.0f")] if training.cost is not None else []),
                f"{_range(percent, '.0f')} %",
            ]
        )
    return ["GPUs", "nodes", "s a step", "images/s", "days", "GPU-hours", *cost, "efficiency"], rows


def _left_out(estimate: Estimate) -> str:
    numbers = ", ".join(map(str, estimate.left_out))
    return f"  left out: {numbers} (more GPUs than a batch has images, or not one row fits)"


def _range(pair: Range, form: str) -> str:
    least, most = (format(value, form) for value in sorted(pair))
    return least if least == most else f"{least} to {most}"


def as_json(preset: str, estimate: Estimate, stands_on: list[Assumption]) -> str:
    """Every figure, by its name here and in bytes and seconds; ends with a newline."""
    content = {
        "preset": preset,
        "estimate": asdict(estimate),
        "usable_bytes": estimate.cluster.gpu.usable_bytes,
        "gradient_bytes": estimate.workload.gradient_bytes,
        "latent_bytes": estimate.workload.latent_bytes,
        "memory_bytes": estimate.memory.total,
        "assumptions": [asdict(entry) for entry in stands_on],
    }
    return json.dumps(content, indent=2) + "\n"


def draw(preset: str, estimate: Estimate, path: Path) -> None:
    """Days against GPUs, and the parts of a step."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    trainings = estimate.others
    numbers = [training.num_gpus for training in trainings]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    least, most = ([training.seconds[side] / 86400 for training in trainings] for side in (0, 1))
    ideal = [least[0] * numbers[0] / number for number in numbers]
    left.fill_between(numbers, least, most, alpha=0.3, label="communication hidden, to not")
    left.plot(numbers, most, "o-", color="tab:blue")
    left.plot(numbers, ideal, "k--", lw=1, label="in proportion")
    left.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="days", title=f"{preset}, {estimate.cluster.gpu.name}")
    left.set_xticks(numbers, [str(number) for number in numbers])
    left.yaxis.set_major_formatter("{x:g}")
    left.minorticks_off()
    left.grid(alpha=0.3)
    left.legend(fontsize="small")
    places = range(len(numbers))
    compute = [training.compute_seconds / training.step_seconds[1] for training in trainings]
    right.bar(places, compute, label="compute")
    right.bar(places, [1 - share for share in compute], bottom=compute, label="communication")
    network = f"{estimate.cluster.network_gbit:g} Gbit/s a node"
    right.set(xlabel="GPUs", ylabel="share of a step if nothing hides", title=network)
    right.set_xticks(list(places), [str(number) for number in numbers])
    right.legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
