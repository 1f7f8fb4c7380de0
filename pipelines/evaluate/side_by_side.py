"""Compares evaluation reports in one table and one plot."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from pipelines import storage
from pipelines.errors import InputError
from pipelines.evaluate.job import SideBySideJob
from pipelines.evaluate.plots import plot_side_by_side
from pipelines.evaluate.table import columns_of, header, nfe_of, row
from pipelines.tracking.registry import REGISTRY_SCHEMES, find_run

# Metrics are comparable if the protocols have these entries and the reference in common.
COMPARED = ("distance", "num_samples", "labels", "image_size", "uint8_rule", "extractor", "precision_recall")
SIGNIFICANT_ERRORS = 2.0  # a difference of at least this many standard errors is significant


def compare(job: SideBySideJob) -> str:
    """Writes table, plot and JSON, and returns the table.

    Raises InputError for invalid reports, and for different protocols unless the job allows them.
    """
    output = Path(storage.output_location(str(job.output), "--output"))
    contents = [read_report(location, job.tracking_uri) for location in job.reports]
    reports = dict(zip(short_names(job.reports), contents, strict=True))
    differences = protocol_differences(reports)
    if differences and not job.allow_different_protocols:
        raise InputError(
            f"the reports have different protocols ({'; '.join(differences)}); evaluate with one protocol, or give "
            f"--allow-different-protocols"
        )
    output.mkdir(parents=True, exist_ok=True)
    table = side_by_side_table(reports, differences)
    (output / "side_by_side.md").write_text(table)
    content = {"protocol_differences": differences, "reports": reports}
    (output / "side_by_side.json").write_text(json.dumps(content, indent=2) + "\n")
    plot_side_by_side(reports, output / "side_by_side.png")
    return table


def read_report(location: str, tracking_uri: str | None) -> dict[str, Any]:
    """Reads a report. Raises InputError for a missing or invalid report."""
    if location.startswith(REGISTRY_SCHEMES):
        path = _download_report(location, tracking_uri)
    else:
        path = Path(storage.absolute(location))
        path = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text())
        report["protocol"], report["samples"]  # a report.json of `meanflow compare` lacks these: KeyError
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"cannot read a report in {location}: {error!r}; give an --output folder of `meanflow evaluate`"
        ) from error
    return report


def _download_report(location: str, tracking_uri: str | None) -> Path:
    """Downloads the report that `meanflow evaluate` logged to a model's MLflow run."""
    address = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not address:
        raise InputError(f"report {location} is in MLflow; give --tracking-uri, or set MLFLOW_TRACKING_URI")
    run = find_run(location, address)
    if run is None:
        raise InputError(f"MLflow at {address} has no run of {location}; check the model's name and --tracking-uri")
    try:
        artifact = f"runs:/{run.run_id}/evaluate/report.json"
        return Path(mlflow.artifacts.download_artifacts(artifact, tracking_uri=address))
    except (MlflowException, OSError) as error:
        raise InputError(
            f"MLflow run {run.run_id} of {location} has no report; run `meanflow evaluate` first"
        ) from error


def protocol_differences(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describes how the other reports' protocols differ from the first one's."""
    (first_name, first), *others = reports.items()
    differences = []
    for name, report in others:
        ours, theirs = first["protocol"], report["protocol"]
        for key in COMPARED:
            if theirs.get(key) != ours.get(key):
                differences.append(f"{key}: {ours.get(key)} in {first_name}, {theirs.get(key)} in {name}")
        if _reference_identity(theirs) != _reference_identity(ours):
            locations = [protocol["reference"]["location"] for protocol in (ours, theirs)]
            differences.append(f"reference: {locations[0]} in {first_name}, {locations[1]} in {name}")
    return differences


def _reference_identity(protocol: Mapping[str, Any]) -> str:
    """Returns the protocol that a reference file was made with, or the file's hash if it states none.

    The location of the images or latents is left out if the source has other entries. Files made from the same images
    therefore have equal identities.
    """
    reference = protocol["reference"]
    made_with = reference["protocol"]
    if not made_with:
        return str(reference["sha256"])
    source = {key: value for key, value in made_with["source"].items() if key not in ("images", "latents")}
    return json.dumps({**made_with, "source": source or made_with["source"]})


def side_by_side_table(reports: Mapping[str, Mapping[str, Any]], differences: list[str]) -> str:
    """Returns the Markdown table. differences: protocol differences, listed above it as warnings."""
    first = next(iter(reports.values()))
    entries = [(name, entry) for name, report in reports.items() for entry in report["samples"]]
    lines = [f"Warning: the protocols differ: {difference}." for difference in differences]
    lines += [f"Warning for {name}: {warning}." for name, report in reports.items() for warning in report["warnings"]]
    shown = columns_of(entry for _, entry in entries)
    lines += [
        f"{first['protocol']['num_samples']} samples each; ± is one standard error. The last column is the difference from "
        f"the first report. It is significant if it is at least {SIGNIFICANT_ERRORS:g} of its standard errors.",
        "",
        *header(["model", "samples", "NFE"], shown, first["protocol"]["distance"], ["difference"]),
    ]
    baselines = {entry["title"]: entry for entry in first["samples"]}
    for name, entry in entries:
        baseline = baselines.get(entry["title"])
        difference = "" if baseline is None or baseline is entry else _difference(entry, baseline)
        lines.append(row([name, entry["title"], nfe_of(entry)], entry, shown, [difference]))
    return "\n".join(lines) + "\n"


def _difference(entry: Mapping[str, float], baseline: Mapping[str, float]) -> str:
    """Difference of the distances and its standard error, which assumes independent samples.

    If the samples share their noise, the true error is smaller.
    """
    difference = entry["frechet"] - baseline["frechet"]
    error = (entry["frechet_standard_error"] ** 2 + baseline["frechet_standard_error"] ** 2) ** 0.5
    verdict = "" if abs(difference) >= SIGNIFICANT_ERRORS * error else ", not significant"
    return f"{difference:+.3f} ± {error:.3f}{verdict}"


def short_names(locations: tuple[str, ...]) -> list[str]:
    """Distinct names for the table: the locations without their common leading and trailing parts."""
    if len(set(locations)) < len(locations):
        raise InputError(f"reports must differ, but got {', '.join(locations)}")
    parts = [location.rstrip("/").removesuffix("/report.json").split("/") for location in locations]
    while all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    while all(len(part) > 1 for part in parts) and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]
