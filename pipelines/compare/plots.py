"""Plots of the comparison's report, and its grid of samples."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from meanflow_core.grids import image_grid
from pipelines.compare.methods import BUDGET_TITLES
from pipelines.compare.table import curve_title, results_of

COLORS = {
    "flow_matching": "tab:gray",
    "meanflow": "tab:blue",
    "meanflow_own_velocity": "tab:green",
    "improved_meanflow": "tab:red",
}


def plot_quality(report: dict[str, Any], path: Path) -> None:
    """Fréchet distance against NFE: a panel per budget, a curve per method with the range over seeds."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = report["budgets"]
    figure, panels = pyplot.subplots(
        1, len(budgets), figsize=(5.6 * len(budgets), 4.6), layout="constrained", sharey=True, squeeze=False
    )
    for axis, budget in zip(panels[0], budgets, strict=True):
        for (method, solver), curve in results_of(report, budget).items():
            nfe = [result["nfe"] for result in curve]
            mean, low, high = ([result["frechet"][key] for result in curve] for key in ("mean", "min", "max"))
            style = "s--" if solver == "heun" else "o-"
            axis.plot(nfe, mean, style, ms=5, color=COLORS[method], label=curve_title(report, method, solver))
            axis.fill_between(nfe, low, high, color=COLORS[method], alpha=0.18, linewidth=0)
        for name, label, style in (
            ("reconstruction", "autoencoder reconstructions", "dotted"),
            ("held_out", "held-out real images (floor)", "dashed"),
        ):
            axis.axhline(report[name]["frechet"], linestyle=style, color="black", lw=1.2, label=label)
        axis.set(title=BUDGET_TITLES[budget], xlabel="function evaluations (NFE) per image", xscale="log", yscale="log")
        axis.set_xticks(report["nfe"], [str(nfe) for nfe in report["nfe"]])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel("Fréchet distance (judge features, not FID)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_losses(report: dict[str, Any], path: Path) -> None:
    """Loss curves: squared error at r = t, which all methods have, and at r < t; a column per budget."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = report["budgets"]
    figure, panels = pyplot.subplots(
        2, len(budgets), figsize=(5.6 * len(budgets), 6.6), layout="constrained", sharey="row", squeeze=False
    )
    for column, budget in enumerate(budgets):
        for entry in report["methods"]:
            curves = [
                trial["loss_curve"]
                for trial in report["trials"]
                if budget in trial["budgets"] and trial["method"] == entry["name"]
            ]
            per_step = entry["step_flops"] / 1e12 if budget == "flops" else 1.0
            for row, key in enumerate(("squared_error_r_equals_t", "squared_error_r_below_t")):
                _plot_curves(panels[row][column], curves, key, per_step, COLORS[entry["name"]], entry["title"])
        for row, times in enumerate(("r = t", "r < t")):
            panels[row][column].set(title=f"squared error at {times}, {BUDGET_TITLES[budget]}", yscale="log")
            panels[row][column].yaxis.set_major_formatter("{x:g}")
            panels[row][column].yaxis.set_minor_formatter("{x:g}")
            panels[row][column].grid(alpha=0.3, which="both")
        panels[1][column].set_xlabel("training step" if budget == "steps" else "training FLOPs (teraflop)")
    # Improved MeanFlow's error has a different target, so its curves are not comparable with the others.
    figure.suptitle("targets: guidance scales from 1 to 8 for improved MeanFlow, 2 for the others", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plot_curves(
    axis: Axes, curves: list[list[dict[str, Any]]], key: str, per_step: float, color: str, title: str
) -> None:
    """Plots the mean over seeds and its range; nothing if the method has no such samples."""
    curves = [curve for curve in curves if all(point[key] is not None for point in curve)]
    if not curves:
        return
    values = np.array([[point[key] for point in curve] for curve in curves])  # (seeds, points)
    x = [point["step"] * per_step for point in curves[0]]
    axis.plot(x, values.mean(axis=0), color=color, lw=1.5, label=title)
    axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.18, linewidth=0)


def plot_samples(blocks: dict[str, dict[int, np.ndarray]], path: Path, *, num_columns: int, subtitle: str) -> None:
    """A grid of samples: {row title: {NFE: uint8 images (N, H, W, 3)}}, a block of images per cell."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    nfe = sorted({count for row in blocks.values() for count in row})
    sample = next(iter(next(iter(blocks.values())).values()))
    height = -(-len(sample) // num_columns) / num_columns
    cell = 2.05
    figure, panels = pyplot.subplots(
        len(blocks),
        len(nfe),
        figsize=(cell * len(nfe) + 0.6, (cell * height + 0.08) * len(blocks) + 0.7),
        layout="constrained",
        squeeze=False,
    )
    for row, (title, images) in zip(panels, blocks.items(), strict=True):
        for axis, count in zip(row, nfe, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if count in images:
                axis.imshow(image_grid(images[count], num_columns))
        row[0].set_ylabel(textwrap.fill(title, 14))
    for axis, count in zip(panels[0], nfe, strict=True):
        axis.set_title(f"{count} NFE")
    figure.suptitle(subtitle, fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
