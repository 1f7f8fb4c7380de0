"""What an evaluation's report looks like: the table, and the plots against network calls and guidance."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from pipelines.evaluate.samples import Setting

COLUMNS = {
    "frechet": (None, "{:.3f}"),
    "spatial_frechet": ("sFID", "{:.3f}"),
    "inception_score": ("Inception Score", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "diversity": ("diversity", "{:.3f}"),
    "nearest_train_ratio": ("nearest-train ratio", "{:.3f}"),
}


def table(report: dict) -> str:
    """The report as a Markdown table."""
    protocol = report["protocol"]
    rows = [(name, report[key]) for name, key in (("held-out real (the floor)", "held_out"),
            ("autoencoder's reconstructions", "reconstruction")) if key in report]  # fmt: skip
    rows += [(f"samples, {entry['title']}", entry) for entry in report["samples"]]
    shown = [key for key in COLUMNS if any(key in row for _, row in rows)]
    titles = [COLUMNS[key][0] or protocol["distance"] for key in shown]
    lines = [
        f"{protocol['num_samples']} samples of `{report['model']}`, labels {protocol['labels']}, seed "
        f"{protocol['base_seed']}; reference `{protocol['reference']['where']}`"
        + (f" of {count} images." if (count := protocol["reference"].get("num_images")) else "."),
        *([] if protocol["distance"] == "FID" else ["The distance here is not FID: its features are not Inception's."]),
        *(f"Mind: {flag}." for flag in report["flags"]),
        "",
        "| " + " | ".join(["images", "network calls", *titles]) + " |",
        "|" + "---|" * (2 + len(shown)),
    ]  # fmt: skip
    for name, row in rows:
        cells = [COLUMNS[key][1].format(row[key]) if key in row else "" for key in shown]
        if "frechet" in shown:
            cells[shown.index("frechet")] += f" ± {row['frechet_standard_error']:.3f}"
        lines.append(f"| {name} | {row.get('network_calls', '')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(report: dict, path: Path) -> None:
    """Distance (with two standard errors) and a second figure against network calls, with what real images score."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = report["samples"]
    second = next(
        (key for key in ("accuracy", "inception_score", "recall") if all(key in entry for entry in entries)), None
    )
    keys = ["frechet"] + ([second] if second else [])
    figure, axes = pyplot.subplots(1, len(keys), figsize=(4.5 * len(keys), 3.6), layout="constrained", squeeze=False)
    ways = list(dict.fromkeys(way_of(entry) for entry in entries))
    for axis, key in zip(axes[0], keys, strict=True):
        for way in ways:
            curve = [entry for entry in entries if way_of(entry) == way]
            calls, values = [entry["network_calls"] for entry in curve], [entry[key] for entry in curve]
            errors = [2 * entry["frechet_standard_error"] for entry in curve] if key == "frechet" else None
            axis.errorbar(calls, values, yerr=errors, fmt="o-", capsize=3, label=way or "samples")
        for name, colour, style, label in (("reconstruction", "tab:orange", ":", "autoencoder's reconstructions"),
                                           ("held_out", "tab:green", "--", "held-out real images")):  # fmt: skip
            if key in report.get(name, {}):
                axis.axhline(report[name][key], ls=style, color=colour, label=label)
        title = report["protocol"]["distance"] if key == "frechet" else COLUMNS[key][0]
        axis.set_title(title)
        scale_by_calls(axis, {entry["network_calls"] for entry in entries}, is_distance=key == "frechet")
    if second == "accuracy":
        axes[0][1].set_ylim(0.0, 1.03)
    axes[0][-1].legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def scale_by_calls(axis: Axes, calls: Collection[int], *, is_distance: bool) -> None:
    """Numbers of network calls along the axis, each with its tick; a distance upwards on a logarithmic scale."""
    axis.set(xlabel="network calls per image", xscale="log")
    if is_distance:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xticks(sorted(calls), [str(count) for count in sorted(calls)])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def plot_guidance(report: dict, path: Path) -> None:
    """Distance against the guidance scale, a curve per interval and number of steps."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5.5, 3.8), layout="constrained")
    curves: dict[str, list[dict]] = {}
    for entry in report["samples"]:
        interval = entry["guidance_interval"]
        name = f"{entry['num_steps']} step{'s' * (entry['num_steps'] > 1)}"
        name += " in [{:g}, {:g}]".format(*interval) if interval is not None else ""
        curves.setdefault(name + (", Heun" if entry["solver"] == "heun" else ""), []).append(entry)
    for name, entries in curves.items():
        entries.sort(key=lambda entry: entry["guidance_scale"])
        scales, distances = ([entry[key] for entry in entries] for key in ("guidance_scale", "frechet"))
        errors = [2 * entry["frechet_standard_error"] for entry in entries]
        axis.errorbar(scales, distances, yerr=errors, fmt="o-", capsize=3, label=name)
    axis.set(xlabel="guidance scale omega", ylabel=report["protocol"]["distance"])
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def way_of(entry: Mapping[str, Any]) -> str:
    """How an entry samples, its number of steps aside."""
    setting = Setting(
        num_steps=1,
        guidance_scale=entry["guidance_scale"],
        guidance_interval=None if entry["guidance_interval"] is None else tuple(entry["guidance_interval"]),
        solver=entry["solver"],
    )
    return setting.way


def slug(setting: Setting) -> str:
    """A setting as part of a file's name: "2steps-omega4-0.2to0.8-heun"."""
    steps, way = f"{setting.num_steps}step{'s' * (setting.num_steps > 1)}", way_slug(setting)
    return f"{steps}-{way}" if way else steps


def way_slug(setting: Setting) -> str:
    """`Setting.way` as part of a file's or a metric's name: "omega4-0.2to0.8-heun"; empty where it is."""
    words = []
    if setting.guidance_scale is not None:
        words.append(f"omega{setting.guidance_scale:g}")
    if setting.guidance_interval is not None:
        words.append("{:g}to{:g}".format(*setting.guidance_interval))
    if setting.solver != "euler":
        words.append(setting.solver)
    return "-".join(words)
