"""Measures a generator before and after its refinement with several extractors."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from meanflow_core.autoencoder import weight_hash
from meanflow_core.generator import load_network
from meanflow_core.generator_folder import read_provenance
from pipelines.before_after.job import BeforeAfterJob
from pipelines.errors import InputError
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.run import evaluate
from pipelines.evaluate.table import columns_of, header, marked_distance, row
from pipelines.extractors.opening import INCEPTION, absolute_extractor, open_extractor
from pipelines.tracking.registry import fetch_generator

CAPTION_HEIGHT = 14  # pixels above each half of the picture


def before_after(job: BeforeAfterJob) -> str:
    """Measures, writes table.md and before_after.png, and returns the table.

    Raises InputError if the generator was not refined, if all extractors were trained on, and for other invalid input.
    """
    provenance = read_provenance(fetch_generator(job.model, job.tracking_uri))
    trained_on = {identity["weights_sha256"] for identity in provenance.get("refined_on", ())}
    before = job.before or provenance.get("refined_from")
    if not trained_on or before is None:
        raise InputError(f"--model {job.model} must be a generator of `meanflow refine`, but it was not refined")
    _require_same_weights(job, before, provenance.get("refined_from_sha256"))
    names = [absolute_extractor(name) for name in job.extractors]
    identities = [open_extractor(name, _weights(job, name), "cpu").identity for name in names]
    if all(identity["weights_sha256"] in trained_on for identity in identities):
        raise InputError(
            f"the generator was trained on all of --extractors {' '.join(job.extractors)}, and such a distance says "
            f"nothing about the images; add an extractor that it was not trained on"
        )
    job.output.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for number, (name, identity) in enumerate(zip(names, identities, strict=True)):
        folder = job.output / f"{number + 1}-{identity['name']}"
        reports = {}
        reference = job.references[number] if job.references else None
        for title, model in (("before", before), ("after", job.model)):
            reports[title] = evaluate(
                EvaluateJob(
                    model=model,
                    output=folder / title,
                    extractor=name,
                    extractor_weights=_weights(job, name),
                    reference=reference,
                    train_images=job.train_images,
                    held_out_images=job.held_out_images,
                    steps=job.steps,
                    num_samples=job.num_samples,
                    num_precision_recall=job.num_precision_recall,
                    labels=job.labels,
                    batch_size=job.batch_size,
                    num_workers=job.num_workers,
                    device=job.device,
                    tracking_uri=job.tracking_uri,
                ),
                logs_to_mlflow=False,  # a run has one evaluation, but here are several
            )
            reference = reference or str(folder / "before" / "reference.npz")
        lines += ["", *_table(reports)]
        if number == 0:
            _picture([folder / title / "samples.png" for title in reports], job.output / "before_after.png")
    text = "\n".join([f"{job.num_samples} samples of each generator, {job.labels} labels.", *lines]) + "\n"
    (job.output / "table.md").write_text(text)
    return text


def _require_same_weights(job: BeforeAfterJob, before: str, expected: str | None) -> None:
    """Raises InputError if the weights before the refinement are not those that it started from."""
    try:
        found = weight_hash(load_network(fetch_generator(before, job.tracking_uri)))
    except ValueError as error:
        raise InputError(f"{before}: {error}; give --before, the generator before the refinement") from error
    if expected is not None and found != expected:
        raise InputError(
            f"{before} has other weights than when it was refined; give --before, the generator of that time"
        )


def _weights(job: BeforeAfterJob, name: str) -> Path | None:
    return job.extractor_weights if name == INCEPTION else None


def _table(reports: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of one extractor's table."""
    entries = [("held-out images", "", reports["before"]["held_out"])]
    entries += [(title, entry["title"], entry) for title, report in reports.items() for entry in report["samples"]]
    shown = columns_of(entry for _, _, entry in entries)
    is_trained_on = reports["after"]["protocol"]["generator"]["is_trained_on_extractor"]
    distance = marked_distance(reports["after"]) + ("" if is_trained_on else ", held out")
    return [
        *header(["images", "samples"], shown, distance),
        *(row([*names], entry, shown) for *names, entry in entries),
    ]


def _picture(files: list[Path], output: Path) -> None:
    """The grids of the same classes and seeds, side by side."""
    grids = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    height, width, _ = grids[0].shape
    canvas = Image.new("RGB", (2 * width + CAPTION_HEIGHT, height + CAPTION_HEIGHT), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (title, grid) in enumerate(zip(("before", "after"), grids, strict=True)):
        left = number * (width + CAPTION_HEIGHT)
        draw.text((left + 2, 1), title, fill="black")
        canvas.paste(Image.fromarray(grid), (left, CAPTION_HEIGHT))
    canvas.save(output)
