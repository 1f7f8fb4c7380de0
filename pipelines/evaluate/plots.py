"""Plots of evaluations: quality against function evaluations and against guidance."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from pipelines.evaluate.samples import Setting
from pipelines.evaluate.table import COLUMNS


def plot_quality(report: Mapping[str, Any], path: Path) -> None:
    """Plots the distance and one more metric against NFE. Lines mark held-out images and reconstructions."""
    entries = report["samples"]
    others = ("accuracy", "probe_accuracy", "inception_score", "recall")
    second = next((key for key in others if all(key in entry for entry in entries)), None)
    keys = ["frechet"] + ([second] if second else [])
    figure = Figure(figsize=(4.5 * len(keys), 3.6), layout="constrained")
    axes = figure.subplots(1, len(keys), squeeze=False)
    for axis, key in zip(axes[0], keys, strict=True):
        for variant in dict.fromkeys(entry["variant"] for entry in entries):
            curve = [entry for entry in entries if entry["variant"] == variant]
            plot_curve(axis, curve, key, label=variant or "samples")
        for name, colour, style, label in (
            ("reconstruction", "tab:orange", ":", "autoencoder's reconstructions"),
            ("held_out", "tab:green", "--", "held-out real images"),
        ):
            if key in report.get(name, {}):
                axis.axhline(report[name][key], ls=style, color=colour, label=label)
        axis.set_title(COLUMNS[key][0] or report["protocol"]["distance"])
        scale_axes(axis, {entry["num_function_evaluations"] for entry in entries}, is_distance=key == "frechet")
    if second in ("accuracy", "probe_accuracy"):
        axes[0][1].set_ylim(0.0, 1.03)
    axes[0][-1].legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=130)


def plot_guidance(report: Mapping[str, Any], path: Path) -> None:
    """Plots the distance against the guidance scale, one curve per interval, solver and number of steps."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axis = figure.subplots()
    curves: dict[str, list[dict]] = {}
    for entry in report["samples"]:
        others = {key: entry[key] for key in ("num_steps", "guidance_interval", "solver")}
        curves.setdefault(Setting(**others).title, []).append(entry)
    for title, entries in curves.items():
        entries.sort(key=lambda entry: entry["guidance_scale"])
        plot_curve(axis, entries, "frechet", x="guidance_scale", label=title)
    axis.set(xlabel="guidance scale omega", ylabel=report["protocol"]["distance"])
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def plot_side_by_side(reports: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plots the distance against function evaluations, one curve per report."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    counts = set()
    for name, report in reports.items():
        entries = [{"num_function_evaluations": 1, **entry} for entry in report["samples"]]
        entries.sort(key=lambda entry: entry["num_function_evaluations"])
        counts |= {entry["num_function_evaluations"] for entry in entries}
        plot_curve(axis, entries, "frechet", label=name)
    first = next(iter(reports.values()))
    if "held_out" in first:
        axis.axhline(first["held_out"]["frechet"], ls="--", color="black", lw=1, label="held-out real images")
    axis.set_ylabel(first["protocol"]["distance"])
    scale_axes(axis, counts, is_distance=True)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def plot_curve(
    axis: Axes, entries: Sequence[Mapping[str, Any]], key: str, *, label: str, x: str = "num_function_evaluations"
) -> None:
    """Plots one metric. The distance has error bars of two standard errors."""
    errors = [2 * entry["frechet_standard_error"] for entry in entries] if key == "frechet" else None
    values = [entry[key] for entry in entries]
    axis.errorbar([entry[x] for entry in entries], values, yerr=errors, fmt="o-", capsize=3, label=label)


def scale_axes(axis: Axes, counts: Collection[int], *, is_distance: bool) -> None:
    """Sets a logarithmic x axis with a tick for each count, and for a distance also a logarithmic y axis."""
    axis.set(xlabel="function evaluations (NFE) per image", xscale="log")
    if is_distance:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xticks(sorted(counts), [str(count) for count in sorted(counts)])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
