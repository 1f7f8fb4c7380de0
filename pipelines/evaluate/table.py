"""An evaluation's report as a Markdown table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Metric -> column title and format. The title of the distance depends on the extractor.
COLUMNS = {
    "frechet": (None, "{:.3f}"),
    "spatial_frechet": ("sFID", "{:.3f}"),
    "inception_score": ("Inception Score", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "probe_accuracy": ("probe accuracy", "{:.3f}"),
    "diversity": ("diversity", "{:.3f}"),
    "nearest_train_ratio": ("nearest-train ratio", "{:.3f}"),
    "nearest_train_feature_ratio": ("nearest-train ratio in features", "{:.3f}"),
}


def report_table(report: Mapping[str, Any]) -> str:
    """The table of one report, after a paragraph on its protocol and warnings."""
    protocol = report["protocol"]
    real = (("held-out real images (the floor)", "held_out"), ("autoencoder's reconstructions", "reconstruction"))
    rows = [(title, report[key]) for title, key in real if key in report]
    rows += [(f"samples, {entry['title']}", entry) for entry in report["samples"]]
    reference = protocol["reference"]
    of_images = f" of {reference['num_images']} images" if reference.get("num_images") else ""
    lines = [
        f"{protocol['num_samples']} samples of `{report['model']}`, labels {protocol['labels']}, seed "
        f"{protocol['base_seed']}; reference `{reference['location']}`{of_images}."
    ]
    if protocol["distance"] != "FID":
        lines.append("The distance is not FID, because its features are not those of the published Inception.")
    lines += [f"Warning: {warning}." for warning in report["warnings"]]
    shown = columns_of(entry for _, entry in rows)
    lines += ["", *header(["images", "NFE"], shown, marked_distance(report))]
    lines += [row([title, nfe_of(entry)], entry, shown) for title, entry in rows]
    return "\n".join(lines) + "\n"


def marked_distance(report: Mapping[str, Any]) -> str:
    """Title of a report's distance, marked if the generator was trained on it."""
    is_trained_on = report["protocol"].get("generator", {}).get("is_trained_on_extractor", False)
    return f"{report['protocol']['distance']}, trained on" if is_trained_on else str(report["protocol"]["distance"])


def columns_of(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that at least one entry has."""
    present = {key for entry in entries for key in entry}
    return [key for key in COLUMNS if key in present]


def header(first: Sequence[str], columns: Sequence[str], distance: str, last: Sequence[str] = ()) -> list[str]:
    """The table's two header lines. distance: title of the distance; first, last: titles around the metrics."""
    titles = [*first, *(COLUMNS[key][0] or distance for key in columns), *last]
    return ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]


def row(first: Sequence[str], entry: Mapping[str, Any], columns: Sequence[str], last: Sequence[str] = ()) -> str:
    """A table line: the metrics of an entry, between other cells."""
    cells = [COLUMNS[key][1].format(entry[key]) if key in entry else "" for key in columns]
    cells[columns.index("frechet")] += f" ± {entry['frechet_standard_error']:.3f}"
    return "| " + " | ".join([*first, *cells, *last]) + " |"


def nfe_of(entry: Mapping[str, Any]) -> str:
    """Number of function evaluations (NFE) of an entry; empty if the entry has none, as for real images."""
    return str(entry.get("num_function_evaluations", ""))
