"""The comparison's table and plots, made of its report, and its grid of samples."""

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from meanflow_core.grids import image_grid

COLORS = {
    "flow_matching": "tab:gray",
    "meanflow": "tab:blue",
    "meanflow_own_velocity": "tab:green",
    "improved_meanflow": "tab:red",
}
BUDGET_TITLES = {"steps": "equal steps", "flops": "equal training FLOPs"}


def results_of(report: dict[str, Any], budget: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """{(method, solver): its results by rising numbers of calls} of a budget, in the order of the report's methods."""
    curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in report["results"]:
        if result["budget"] == budget:
            curves.setdefault((result["method"], result["solver"]), []).append(result)
    return {key: sorted(curve, key=lambda result: result["calls"]) for key, curve in curves.items()}


def curve_title(report: dict[str, Any], method: str, solver: str) -> str:
    """A method's title, and the solver's name where a method has two."""
    title = next(entry["title"] for entry in report["methods"] if entry["name"] == method)
    solvers = {result["solver"] for result in report["results"] if result["method"] == method}
    return f"{title}, {solver.capitalize()}" if len(solvers) > 1 else str(title)


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    machine = report["hardware"]
    seeds = len(report["seeds"])
    where = machine["gpu"] or f"{machine['num_threads']} thread of {machine['num_cores']} cores, {machine['processor']}"
    low, high = report["timed_calls"][0], report["timed_calls"][-1]
    lines = [
        f"Fréchet distance of {report['num_samples']} samples to {report['num_train_images']} training images in the "
        f"features of the demo's judge (not FID): mean over {seeds} seed{'s' * (seeds > 1)}, and the range.",
        f"Held-out real images (the floor) {report['held_out']['frechet']:.4f}, the autoencoder's reconstructions "
        f"{report['reconstruction']['frechet']:.4f}; their class accuracies {report['held_out']['accuracy']:.3f} and "
        f"{report['reconstruction']['accuracy']:.3f}.",
    ]
    for budget in report["budgets"]:
        title = BUDGET_TITLES[budget]
        for key, what, digits in (("frechet", "Fréchet distance", 3), ("accuracy", "class accuracy", 3)):
            lines += [
                "",
                f"**{what} at {title}**, by network calls per image",
                "",
                f"| method | training steps | {' | '.join(map(str, report['calls']))} |",
                f"|---|---|{'---|' * len(report['calls'])}",
            ]
            for (method, solver), curve in results_of(report, budget).items():
                by_calls = {result["calls"]: result[key] for result in curve}
                cells = [_cell(by_calls.get(calls), digits) for calls in report["calls"]]
                steps = curve[0]["num_steps"]
                lines.append(f"| {curve_title(report, method, solver)} | {steps} | {' | '.join(cells)} |")
    lines += [
        "",
        "**Fréchet distance in one call, over flow matching's (Euler)**",
        "",
        f"| method | budget | over its {report['calls'][-1]} calls | over its one call |",
        "|---|---|---|---|",
    ]
    for ratio in report["ratios"]:
        title = next(entry["title"] for entry in report["methods"] if entry["name"] == ratio["method"])
        cells = [_cell(ratio[key], 2) for key in ("over_most_calls", "over_one_call")]
        lines.append(f"| {title} | {BUDGET_TITLES[ratio['budget']]} | {' | '.join(cells)} |")
    lines += [
        "",
        f"**Costs**, on {where}, torch {machine['torch']}; images drawn {report['timed_images']} at a time, of which "
        f"the decoder takes {report['decoder_milliseconds_per_image']:.1f} ms each",
        "",
        f"| method | parameters (in training) | GFLOPs per step | s per step | ms per image, {low} call | {high} calls |",
        "|---|---|---|---|---|---|",
    ]
    for entry in report["methods"]:
        milliseconds = [entry["milliseconds_per_image"][str(calls)] for calls in (low, high)]
        lines.append(
            f"| {entry['title']} | {entry['num_parameters_sampling'] / 1e6:.2f} M ({entry['num_parameters'] / 1e6:.2f} M) "
            f"| {entry['step_flops'] / 1e9:.1f} | {entry['seconds_per_step']:.3f} "
            f"| {milliseconds[0]:.1f} | {milliseconds[1]:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _cell(value: dict[str, float] | None, digits: int) -> str:
    if value is None:
        return "—"
    mean, low, high = (f"{value[key]:.{digits}f}" for key in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low}–{high})"


def plot_comparison(report: dict[str, Any], path: Path) -> None:
    """Fréchet distance against network calls: a panel per budget, a curve per method with the range over the seeds."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = report["budgets"]
    figure, panels = pyplot.subplots(
        1, len(budgets), figsize=(5.6 * len(budgets), 4.6), layout="constrained", sharey=True, squeeze=False
    )
    for axis, budget in zip(panels[0], budgets, strict=True):
        for (method, solver), curve in results_of(report, budget).items():
            calls = [result["calls"] for result in curve]
            mean, low, high = ([result["frechet"][key] for result in curve] for key in ("mean", "min", "max"))
            style = "s--" if solver == "heun" else "o-"
            axis.plot(calls, mean, style, ms=5, color=COLORS[method], label=curve_title(report, method, solver))
            axis.fill_between(calls, low, high, color=COLORS[method], alpha=0.18, linewidth=0)
        for name, label, style in (
            ("reconstruction", "autoencoder's reconstructions", "dotted"),
            ("held_out", "held-out real images: the floor", "dashed"),
        ):
            axis.axhline(report[name]["frechet"], linestyle=style, color="black", lw=1.2, label=label)
        axis.set(title=BUDGET_TITLES[budget], xlabel="network calls per image", xscale="log", yscale="log")
        axis.set_xticks(report["calls"], [str(calls) for calls in report["calls"]])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel("Fréchet distance (the judge's features; not FID)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_losses(report: dict[str, Any], path: Path) -> None:
    """Loss curves: the squared error where r = t, which all methods have, and where r < t; a column per budget."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = report["budgets"]
    figure, panels = pyplot.subplots(
        2, len(budgets), figsize=(5.6 * len(budgets), 6.6), layout="constrained", sharey="row", squeeze=False
    )
    for column, budget in enumerate(budgets):
        for entry in report["methods"]:
            curves = [
                run["loss_curve"]
                for run in report["runs"]
                if budget in run["budgets"] and run["method"] == entry["name"]
            ]
            per_step = entry["step_flops"] / 1e12 if budget == "flops" else 1.0
            for row, key in enumerate(("squared_error_r_equals_t", "squared_error_r_below_t")):
                _plot_curves(panels[row][column], curves, key, per_step, COLORS[entry["name"]], entry["title"])
        for row, what in enumerate(("r = t", "r < t")):
            panels[row][column].set(title=f"squared error where {what}, {BUDGET_TITLES[budget]}", yscale="log")
            panels[row][column].yaxis.set_major_formatter("{x:g}")
            panels[row][column].yaxis.set_minor_formatter("{x:g}")
            panels[row][column].grid(alpha=0.3, which="both")
        panels[1][column].set_xlabel("training step" if budget == "steps" else "training operations (teraflop)")
    # Its error is against another target: no better and no worse for lying above or below.
    figure.suptitle(
        "improved MeanFlow's targets have guidance scales drawn from 1 to 8, the others' have 2", fontsize=10
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plot_curves(
    axis: Axes, curves: list[list[dict[str, Any]]], key: str, per_step: float, color: str, title: str
) -> None:
    """The mean over seeds and its range; nothing where a method has no such rows."""
    curves = [curve for curve in curves if all(point[key] is not None for point in curve)]
    if not curves:
        return
    values = np.array([[point[key] for point in curve] for curve in curves])  # (seeds, points)
    at = [point["step"] * per_step for point in curves[0]]
    axis.plot(at, values.mean(axis=0), color=color, lw=1.5, label=title)
    axis.fill_between(at, values.min(axis=0), values.max(axis=0), color=color, alpha=0.18, linewidth=0)


def draw_grid(blocks: dict[str, dict[int, np.ndarray]], path: Path, *, num_columns: int, subtitle: str) -> None:
    """Samples: {row title: {calls: images uint8 (N, H, W, 3)}}; a block of images per cell, all of the same seeds."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    calls = sorted({count for row in blocks.values() for count in row})
    sample = next(iter(next(iter(blocks.values())).values()))
    height = -(-len(sample) // num_columns) / num_columns
    cell = 2.05
    figure, panels = pyplot.subplots(
        len(blocks),
        len(calls),
        figsize=(cell * len(calls) + 0.6, (cell * height + 0.08) * len(blocks) + 0.7),
        layout="constrained",
        squeeze=False,
    )
    for row, (title, images) in zip(panels, blocks.items(), strict=True):
        for axis, count in zip(row, calls, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if count in images:
                axis.imshow(image_grid(images[count], num_columns))
        row[0].set_ylabel(textwrap.fill(title, 14))
    for axis, count in zip(panels[0], calls, strict=True):
        axis.set_title(f"{count} call{'s' * (count > 1)}")
    figure.suptitle(subtitle, fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and greatest."""
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
