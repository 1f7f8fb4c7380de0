"""Plot of the comparison's report, and its grid of samples."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from meanflow_core.grids import image_grid
from pipelines.compare.job import BUDGET_TITLES
from pipelines.compare.report import curves_of
from pipelines.evaluate.plots import scale_axes

MARKERS = "osv^D<>pXP"


def plot_quality(report: Mapping[str, Any], path: Path) -> None:
    """Fréchet distance against NFE: a panel per budget, a curve per method with the range over seeds."""
    budgets = report["budgets"]
    figure = Figure(figsize=(6.0 * len(budgets), 5.6), layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for axis, budget in zip(panels, budgets, strict=True):
        for title, curve in curves_of(report, budget).items():
            number = report["methods"].index(curve[0]["method"])
            color, marker = colormaps["tab10"](number % 10), MARKERS[number % len(MARKERS)]
            nfe = [result["nfe"] for result in curve]
            mean, low, high = ([result["frechet"][key] for result in curve] for key in ("mean", "min", "max"))
            style = "--" if curve[0]["solver"] == "heun" else "-"
            axis.plot(nfe, mean, style, marker=marker, ms=5, color=color, label=title)
            axis.fill_between(nfe, low, high, color=color, alpha=0.15, linewidth=0)
        for name, label, style in (
            ("reconstruction", "autoencoder's reconstructions", "dotted"),
            ("held_out", "held-out real images (floor)", "dashed"),
        ):
            axis.axhline(report[name]["frechet"], linestyle=style, color="black", lw=1.2, label=label)
        axis.set_title(BUDGET_TITLES[budget])
        scale_axes(axis, report["nfe"], is_distance=True)
    panels[0].set_ylabel(f"{report['distance']}, not FID")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def plot_samples(blocks: Mapping[str, Mapping[int, np.ndarray]], path: Path, *, num_columns: int, title: str) -> None:
    """A grid of samples: {method's title: {NFE: uint8 images (N, H, W, 3)}}, a block of images per cell."""
    first = next(iter(blocks.values()))
    height = -(-len(next(iter(first.values()))) // num_columns) / num_columns
    cell = 2.05
    figure = Figure(figsize=(cell * len(first) + 0.6, (cell * height + 0.08) * len(blocks) + 0.7), layout="constrained")
    panels = figure.subplots(len(blocks), len(first), squeeze=False)
    for row, (method, images) in zip(panels, blocks.items(), strict=True):
        for axis, block in zip(row, images.values(), strict=True):
            axis.imshow(image_grid(block, num_columns))
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(textwrap.fill(method, 14))
    for axis, nfe in zip(panels[0], first, strict=True):
        axis.set_title(f"{nfe} NFE")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)
