"""The picture of a refinement: every extractor's distance against the step."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure


def plot_distances(points: Mapping[str, Mapping[int, float]], file: Path) -> None:
    """Plots {"trained_on/NAME" or "held_out/NAME": {step: distance}}, each relative to its first value."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for key, values in points.items():
        kind, _, name = key.partition("/")
        first = next(iter(values.values()), 1.0)
        is_held_out = kind == "held_out"
        axes.plot(
            list(values),
            [value / first for value in values.values()],
            linestyle="-" if is_held_out else "--",
            marker="o" if is_held_out else "x",
            label=f"{name}, {'held out' if is_held_out else 'trained on'} (from {first:.4g})",
        )
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xlabel="step", ylabel="distance, relative to the start", yscale="log")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter("{x:g}")
    axes.set_title("Only the held-out distances say whether the images became better", fontsize=10)
    axes.legend()
    figure.savefig(file, dpi=120)
