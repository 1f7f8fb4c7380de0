"""Evaluations side by side: one table and one plot of several reports, where they were made under the same rules.

    python -m pipelines.side_by_side --reports build/first/report build/second/report --output build/both
    python -m pipelines.side_by_side --reports models:/meanflow-b2@champion runs:/3f6c0e --output both

A report is a folder that pipelines.evaluate wrote, or is found through MLflow under the run that trained the model.
Writes side_by_side.md, side_by_side.json and side_by_side.png.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import mlflow
from mlflow.exceptions import MlflowException

from pipelines import storage
from pipelines.command_line import parse_command_line, run_command
from pipelines.errors import InputError
from pipelines.evaluate.report import COLUMNS, scale_by_calls
from pipelines.tracking.registry import REGISTRY_SCHEMES, find_run

logger = logging.getLogger(__name__)

# Figures of reports that differ in one of these do not compare.
RULES = ("distance", "num_samples", "labels", "image_size", "uint8_rule", "extractor", "precision_recall")
CLEAR_ERRORS = 2.0  # standard errors of a difference from which on it is called one


@dataclass(frozen=True, kw_only=True)
class SideBySideJob:
    """Compare evaluations."""

    reports: tuple[str, ...]
    """Two or more: a report's folder, models:/name@alias, or runs:/id. Differences are to the first one."""
    output: Path
    """Folder to write."""
    tracking_uri: str | None = None
    """MLflow address; MLFLOW_TRACKING_URI unless given."""
    allow_other_rules: bool = False
    """Compare what was made under different rules all the same, naming them in the table."""

    def __post_init__(self) -> None:
        if len(self.reports) < 2:
            raise ValueError(f"reports must name at least two, but got {len(self.reports)}")


def read_report(location: str, tracking_uri: str | None) -> dict[str, Any]:
    """A report's JSON. Raises InputError where there is none, or it is of another kind."""
    if location.startswith(REGISTRY_SCHEMES):
        address = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        run = find_run(location, address) if address else None
        if run is None:
            raise InputError(f"no run of {location} at {address}; give --tracking-uri, or set MLFLOW_TRACKING_URI")
        try:
            path = Path(
                mlflow.artifacts.download_artifacts(
                    run_id=run.run_id, artifact_path="evaluate/report.json", tracking_uri=address
                )
            )
        except (MlflowException, OSError) as error:
            raise InputError(f"run {run.run_id} of {location} has no report; run pipelines.evaluate first") from error
    else:
        path = Path(storage.absolute(location))
        path = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text())
        report["protocol"]["reference"], report["samples"][0]["frechet"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{location} holds no report of pipelines.evaluate ({error!r})") from error
    return report


def rule_differences(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where the rules of reports differ from the first one's, in words."""
    (first_name, first), *others = reports.items()
    found = []
    for name, report in others:
        theirs, ours = report["protocol"], first["protocol"]
        for rule in RULES:
            if theirs.get(rule) != ours.get(rule):
                found.append(f"{rule}: {ours.get(rule)} in {first_name}, {theirs.get(rule)} in {name}")
        if _moments_hash(theirs) != _moments_hash(ours):
            found.append(
                f"reference: {ours['reference']['where']} in {first_name}, {theirs['reference']['where']} in {name}"
            )
    return found


def _moments_hash(protocol: Mapping[str, Any]) -> str:
    reference = protocol["reference"]
    # Two files made of the same images alike need not have the same bytes.
    made = reference["protocol"]
    if not made:
        return str(reference["sha256"])
    source = made["source"]
    content = {key: value for key, value in source.items() if key not in ("images", "latents")} or source  # not where
    return json.dumps({**made, "source": content})


def table(reports: Mapping[str, Mapping[str, Any]], differences: list[str]) -> str:
    """The Markdown table."""
    first = next(iter(reports.values()))
    entries = [(name, entry) for name, report in reports.items() for entry in report["samples"]]
    shown = [key for key in COLUMNS if any(key in entry for _, entry in entries)]
    titles = [COLUMNS[key][0] or first["protocol"]["distance"] for key in shown]
    lines = [f"Mind: the rules differ: {difference}." for difference in differences]
    for name, report in reports.items():
        lines += [f"{name}: {flag}." for flag in report["flags"]]
    lines += [
        f"{first['protocol']['num_samples']} samples each; ± is one standard error; a difference to the first model of "
        f"less than {CLEAR_ERRORS:g} of its own errors is no difference.",
        "",
        "| " + " | ".join(["model", "samples", "network calls", *titles, "difference"]) + " |",
        "|" + "---|" * (4 + len(shown)),
    ]
    baseline = {entry["title"]: entry for entry in first["samples"]}
    for name, entry in entries:
        cells = [COLUMNS[key][1].format(entry[key]) if key in entry else "" for key in shown]
        cells[shown.index("frechet")] += f" ± {entry['frechet_standard_error']:.3f}"
        own = baseline.get(entry["title"])
        is_first = own is entry or own is None
        cells.append("" if is_first or own is None else _difference(entry, own))
        lines.append(f"| {name} | {entry['title']} | {entry.get('network_calls', '')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _difference(entry: Mapping[str, float], baseline: Mapping[str, float]) -> str:
    """Of the distances, with its error: as of independent draws, so too wide where both had the same noise."""
    difference = entry["frechet"] - baseline["frechet"]
    error = (entry["frechet_standard_error"] ** 2 + baseline["frechet_standard_error"] ** 2) ** 0.5
    verdict = "" if abs(difference) >= CLEAR_ERRORS * error else ", none"
    return f"{difference:+.3f} ± {error:.3f}{verdict}"


def plot(reports: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Distance against network calls, a curve per model, with two standard errors and the floor."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 4.2), layout="constrained")
    ticks = set()
    for name, report in reports.items():
        entries = sorted(report["samples"], key=lambda entry: entry.get("network_calls", 1))
        calls = [entry.get("network_calls", 1) for entry in entries]
        ticks |= set(calls)
        errors = [2 * entry["frechet_standard_error"] for entry in entries]
        axis.errorbar(calls, [entry["frechet"] for entry in entries], yerr=errors, fmt="o-", capsize=3, label=name)
    first = next(iter(reports.values()))
    if "held_out" in first:
        axis.axhline(first["held_out"]["frechet"], ls="--", color="black", lw=1, label="held-out real images")
    axis.set_ylabel(first["protocol"]["distance"])
    scale_by_calls(axis, ticks, is_distance=True)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def short_names(locations: tuple[str, ...]) -> list[str]:
    """Names for a table: the models' own, or the folders' without what all have in common. They differ as these do."""
    if len(set(locations)) < len(locations):
        raise InputError(f"reports must differ, but got {', '.join(locations)}")
    parts = [location.rstrip("/").removesuffix("/report.json").split("/") for location in locations]
    while all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    while all(len(part) > 1 for part in parts) and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]


def compare(job: SideBySideJob) -> str:
    """Writes the files and returns the table. Raises InputError where reports do not compare."""
    output = Path(storage.output_location(str(job.output), "--output"))
    found = [read_report(location, job.tracking_uri) for location in job.reports]
    reports = dict(zip(short_names(job.reports), found, strict=True))
    differences = rule_differences(reports)
    if differences and not job.allow_other_rules:
        raise InputError(
            f"the reports were made under different rules ({'; '.join(differences)}); evaluate again under the same ones, "
            f"or give --allow-other-rules and read the table with that in mind"
        )
    output.mkdir(parents=True, exist_ok=True)
    text = table(reports, differences)
    (output / "side_by_side.md").write_text(text)
    content = {"rule_differences": differences, "reports": reports}
    (output / "side_by_side.json").write_text(json.dumps(content, indent=2) + "\n")
    plot(reports, output / "side_by_side.png")
    return text


def main() -> None:
    """The command."""
    job = parse_command_line(SideBySideJob, __doc__)
    print(compare(job), end="")
    print(f"written to {job.output}")


if __name__ == "__main__":
    run_command(main)
