"""Stage 3: what a generator is worth: samples drawn and measured on every device, under a protocol that is written down.

    python -m pipelines.evaluate --model models:/meanflow-demo@champion --tracking-uri sqlite:////runs/mlflow.db \\
        --train-images demo/train --held-out-images demo/val --num-samples 1000 --output report
    python -m pipelines.evaluate --model runs/xl2/generator --reference VIRTUAL_imagenet256_labeled.npz \\
        --extractor inception --labels random --steps 1 2 --output report

Frechet distance with its standard error, Inception Score, precision and recall, sFID; and beside real images, what
those score themselves, how much the samples vary, and whether they copy. The distance is FID in the features of
`inception` alone. Writes report.json, table.md and pictures, and logs them to the MLflow run that trained the model.
"""

import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image

from meanflow_core.autoencoder import weight_hash
from meanflow_core.generator import load_pipeline
from meanflow_core.grids import image_grid
from meanflow_core.metrics import (
    Manifold,
    frechet_distance,
    frechet_estimate,
    inception_score,
    peak_signal_to_noise,
    precision_and_recall,
)
from meanflow_core.pipeline import MeanFlowPipeline
from pipelines import storage
from pipelines.cluster import choose_gpus, start_ray
from pipelines.command_line import parse_command_line
from pipelines.errors import InputError
from pipelines.evaluate import averages, measuring
from pipelines.evaluate.extractors import INCEPTION, Extractor, describe, open_extractor
from pipelines.evaluate.job import FIELD_NUM_SAMPLES, EvaluateJob
from pipelines.evaluate.measuring import NUM_GROUPS, NUM_SPLITS, Chunk, Drawn, Measured
from pipelines.evaluate.pixel_distances import PixelDistances
from pipelines.evaluate.reference import (
    UINT8_RULE,
    Reference,
    absolute_extractor,
    default_workers,
    image_chunks,
    protocol_of,
    read_reference,
    reference_bytes,
    require_same_rules,
)
from pipelines.evaluate.report import plot, plot_guidance, slug, table, way_slug
from pipelines.evaluate.sample_files import SampleFile, open_sample_file
from pipelines.evaluate.samples import Setting
from pipelines.images.decoding import read_pixels
from pipelines.images.index import ImageIndex
from pipelines.images.sources import find_images
from pipelines.progress import format_seconds
from pipelines.tracking.provenance import code_identity
from pipelines.tracking.registry import REGISTRY_SCHEMES, WEIGHTS_TAG, fetch_generator, find_run, tag_generator
from pipelines.tracking.run import Run

logger = logging.getLogger(__name__)

GRID_COLUMNS = 8
GRID_CLASSES = 10
NUM_NEIGHBOURS = 3  # of precision and recall, as in ADM's evaluation
NUM_PIXEL_SAMPLES = 1000  # images that come back for the pixel distances
NUM_PIXEL_TRAIN = 10_000  # training images that samples are held against
MEASURES = (
    "frechet", "frechet_standard_error", "inception_score", "precision", "recall", "spatial_frechet", "accuracy",
    "diversity", "nearest_train_ratio",
)  # fmt: skip


def figures(measured: Measured, reference: Reference, manifold: Manifold | None) -> dict[str, float]:
    """What a set of images scores, as far as extractor and reference go. manifold: `manifold_of` the reference."""
    estimate = frechet_estimate([measured.groups[group] for group in sorted(measured.groups)], reference.moments)
    found = {"frechet": estimate.value, "frechet_standard_error": estimate.standard_error}
    if measured.scores:
        found["inception_score"], found["inception_score_deviation"] = inception_score(measured.splits)
    if measured.spatial is not None and reference.spatial is not None:
        found["spatial_frechet"] = frechet_distance(measured.spatial, reference.spatial)
    if measured.features and manifold is not None:
        features = torch.cat(measured.features)
        if len(features) > NUM_NEIGHBOURS:
            found["precision"], found["recall"] = precision_and_recall(Manifold.of(features, NUM_NEIGHBOURS), manifold)
    if measured.num_right is not None:
        found["accuracy"] = measured.num_right / measured.num_rows
    return found


def manifold_of(reference: Reference, num_points: int) -> Manifold | None:
    """The manifold of at most `num_points` of a reference's images; None where there are too few, or no features."""
    if reference.features is None or min(num_points, len(reference.features)) <= NUM_NEIGHBOURS:
        return None
    return Manifold.of(spread(reference.features, num_points), NUM_NEIGHBOURS)


def spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` rows, evenly from all of them: those of a reference stand class by class."""
    count = min(count, len(rows))
    return rows[torch.arange(count) * len(rows) // max(count, 1)]


RealImages = tuple[Any, Any, ImageIndex]


def find_real_images(location: str, class_names: Sequence[str] | None) -> RealImages:
    """A source of real images whose classes are the generator's; any classes where there is none.

    Raises InputError where they are not, or a class has fewer than two images.
    """
    found = find_images(location)
    index = found[2]
    if class_names is None:
        return found
    if index.class_names != list(class_names):
        raise InputError(
            f"the classes in {location} are {', '.join(index.class_names)}, but the generator's are "
            f"{', '.join(class_names)}; every class needs images"
        )
    counts = np.bincount(index.entries["label"].to_numpy(), minlength=len(class_names))
    if counts.min() < 2:
        few = class_names[int(counts.argmin())]
        raise InputError(f"{location} has {counts.min()} images of class {few}, but 2 are needed of each")
    return found


def read_evenly(images: RealImages, size: int, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At most `num_images` readable images spread evenly over a source: uint8 (N, size, size, 3), and their classes."""
    pixels, labels = read_pixels(*images, size, num_images)
    return torch.from_numpy(pixels), torch.from_numpy(labels)


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    pipeline: MeanFlowPipeline | None
    """The generator; None for a file of samples."""
    samples: np.ndarray | None
    """The file's images."""
    image_size: int
    class_names: list[str]

    @property
    def num_classes(self) -> int:
        """Of the generator's network."""
        assert self.pipeline is not None
        return int(self.pipeline.transformer.config.num_classes)


def open_subject(job: EvaluateJob) -> Subject:
    """The generator, or the file of samples. Raises InputError where there is none."""
    if job.samples is not None:
        samples = open_sample_file(job.samples)
        return Subject(None, samples, samples.shape[1], [])
    assert job.model is not None
    pipeline = load_pipeline(fetch_generator(job.model, job.tracking_uri))
    return Subject(pipeline, None, pipeline.image_size, list(pipeline.class_names.values()))


def _require_fit(job: EvaluateJob, subject: Subject, extractor: Extractor) -> None:
    if subject.pipeline is None:
        if job.held_out_images is not None or job.ema_decay is not None or job.save_samples is not None:
            raise InputError("--held-out-images, --ema-decay and --save-samples need a generator, --model")
        assert subject.samples is not None
        if len(subject.samples) < 3:
            raise InputError(f"{job.samples} must hold at least 3 images, but holds {len(subject.samples)}")
        return
    if extractor.class_names is not None and list(extractor.class_names) != subject.class_names:
        raise InputError(
            f"the judge in {job.extractor} knows the classes {', '.join(extractor.class_names)}, but the generator's are "
            f"{', '.join(subject.class_names)}; name an --extractor that was trained on them, or inception"
        )
    if job.labels == "balanced" and job.num_samples < 2 * subject.num_classes:
        raise InputError(
            f"--num-samples must be at least 2 for each of {subject.num_classes} classes, but got {job.num_samples}"
        )
    own_guidance = job.guidance_scales or job.guidance_intervals
    if own_guidance and not subject.pipeline.takes_guidance:
        raise InputError("this generator's guidance is in its weights; leave --guidance-scales and -intervals out")
    if "heun" in job.solvers and subject.pipeline.config.prediction != "velocity":
        raise InputError("--solvers heun integrates a velocity, but this generator gives average velocities")


def _sample_name(number: int) -> str:
    return f"samples {number}"


def _grid_indices(job: EvaluateJob, num_classes: int) -> np.ndarray:
    """Sample indices for the grid: a row, all of one length, for each of up to GRID_CLASSES classes spread evenly.

    Random labels may leave classes without samples: the rows are of those that have some.
    """
    labels = job.rule.labels_of(np.arange(job.num_samples), num_classes)
    drawn, counts = np.unique(labels, return_counts=True)
    num_rows = min(len(drawn), GRID_CLASSES)
    shown = np.arange(num_rows) * len(drawn) // num_rows
    columns = min(GRID_COLUMNS, int(counts[shown].min()))
    return np.concatenate([np.flatnonzero(labels == label)[:columns] for label in drawn[shown]])


def _stored_chunks(name: str, path: Path, num_rows: int, num_features: int) -> list[Chunk]:
    return measuring.cut(
        name,
        measuring.spans(num_rows),
        lambda start, stop: measuring.Stored(path, slice(start, stop)),
        num_features=num_features,
    )


def plan_chunks(
    job: EvaluateJob, subject: Subject, reference: Reference | None, train: RealImages | None, held_out: RealImages | None
) -> list[Chunk]:  # fmt: skip
    """All that is to be measured, in order: the real images first."""
    num_features, size = job.num_precision_recall, subject.image_size
    chunks: list[Chunk] = []
    if reference is None:
        assert train is not None
        chunks += image_chunks("training images", train, size, num_features=num_features)
    elif reference.has_images and reference.features is None and num_features and storage.is_local(reference.where):
        kept = min(num_features, len(open_sample_file(Path(reference.where))))
        chunks += _stored_chunks("reference images", Path(reference.where), kept, num_features)
    if held_out is not None:
        real = image_chunks(
            "held-out images", held_out, size, mixed=True, num_features=num_features, num_images=NUM_PIXEL_SAMPLES
        )
        chunks += real
        if subject.pipeline is not None:
            chunks += [
                replace(chunk, set_name="reconstructions", source=replace(chunk.source, through_autoencoder=True))
                for chunk in real
                if isinstance(chunk.source, measuring.Read)
            ]
    if subject.samples is not None:
        assert job.samples is not None
        return chunks + _stored_chunks(_sample_name(0), job.samples, len(subject.samples), num_features)
    num_images = NUM_PIXEL_SAMPLES if held_out is not None and train is not None else 0
    for number, setting in enumerate(job.settings):

        def drawn(start: int, stop: int, setting: Setting = setting) -> Drawn:
            return Drawn(setting, job.rule, np.arange(start, stop))

        chunks += measuring.cut(
            _sample_name(number),
            measuring.spans(job.num_samples),
            drawn,
            num_features=num_features,
            num_images=job.num_samples if job.save_samples is not None else num_images,
        )
    indices = _grid_indices(job, subject.num_classes)
    grid = Drawn(job.settings[0], job.rule, indices)
    return [*chunks, Chunk("grid", 0, len(indices), grid, num_images=len(indices))]


class ImageKeeper:
    """Writes every setting's samples to its file as they come, and leaves those that come back without a file."""

    def __init__(self, job: EvaluateJob, size: int) -> None:
        self._files: dict[str, SampleFile] = {}
        self.paths: list[Path] = []
        if job.save_samples is not None:
            for number, setting in enumerate(job.settings):
                path = job.save_samples / f"samples-{slug(setting)}.npz"
                self.paths.append(path)
                self._files[_sample_name(number)] = SampleFile(path, job.num_samples, size)
        self._num_samples = job.num_samples
        self._written: dict[str, int] = {}

    def __call__(self, measured: Measured) -> None:
        """Takes a chunk's images."""
        file = self._files.get(measured.set_name)
        if file is None:
            return
        images = torch.cat(measured.images)
        file.write(images.numpy())
        start = self._written.get(measured.set_name, 0)
        stop = self._written[measured.set_name] = start + len(images)
        kept = measuring.share(NUM_PIXEL_SAMPLES, self._num_samples, start, stop)
        measured.images = [images[:kept].clone()]
        measured.labels = [torch.cat(measured.labels)[:kept].clone()]

    def close(self) -> None:
        """Finishes the files: until then they are not there under their names."""
        for file in self._files.values():
            file.close()


def flags(
    job: EvaluateJob, reference: Reference, extractor: Mapping[str, str], num_features: int, count: int
) -> list[str]:
    """What a reader must know before comparing these figures with others."""
    found = []
    if reference.protocol is None:
        found.append(
            f"{reference.where} does not say with which extractor, crop and size it was made: figures against it hold "
            f"only if those are the same"
        )
    if extractor["name"] == INCEPTION and count != FIELD_NUM_SAMPLES:
        found.append(f"{count} samples: FID falls with their number, and the field's is of {FIELD_NUM_SAMPLES}")
    if reference.has_images and reference.features is None and job.num_precision_recall:
        found.append("no precision and recall: the reference's images are read from a local disk alone")
    if count <= num_features:
        found.append(f"{count} samples for {num_features} features: their covariance is singular, the distance biased")
    return found


def _absolute(location: str | None) -> str | None:
    return None if location is None else storage.absolute(location)


def _prepared(job: EvaluateJob) -> tuple[EvaluateJob, Run | None]:
    """The job with places that mean the same in every process, and the run that trained the model."""
    model = job.model
    if model is not None and not model.startswith(REGISTRY_SCHEMES):
        model = storage.absolute(model)
    output = Path(storage.output_location(str(job.output), "--output"))
    save = job.save_samples
    for option, place in (("--output", job.output), ("--save-samples", save)):
        if place is not None and str(place).startswith(("s3:", "gs:", "gcs:", "abfs:", "hdfs:")):
            raise InputError(
                f"{option} must be a folder on a mounted disk, but got {place}; MLflow has a copy of the report"
            )
    job = replace(
        job,
        model=model,
        output=output,
        samples=None if job.samples is None else job.samples.absolute(),
        save_samples=None if save is None else Path(storage.output_location(str(save), "--save-samples")),
        extractor=absolute_extractor(job.extractor),
        extractor_weights=None if job.extractor_weights is None else job.extractor_weights.absolute(),
        reference=_absolute(job.reference),
        train_images=_absolute(job.train_images),
        held_out_images=_absolute(job.held_out_images),
    )
    run = find_run(model, job.tracking_uri) if model is not None else None
    return replace(job, tracking_uri=job.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")), run


def evaluate(job: EvaluateJob) -> dict:
    """Measures, writes the report's files, logs them, and returns the report. Raises InputError for unfit input."""
    job, run = _prepared(job)
    if job.ema_decay is not None:
        assert job.model is not None
        job = replace(job, model=str(averages.generator_of(job.model, job.ema_decay, job.output)))
    extractor = open_extractor(job.extractor, job.extractor_weights, "cpu")
    subject = open_subject(job)
    _require_fit(job, subject, extractor)
    size = subject.image_size
    seen = extractor(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    num_features = seen.pooled.shape[1]
    reference = None if job.reference is None else read_reference(job.reference)
    if reference is not None:
        require_same_rules(reference, extractor.identity, size, num_features)
    names = None if subject.pipeline is None else subject.class_names
    train = None if job.train_images is None else find_real_images(job.train_images, names)
    held_out = None if job.held_out_images is None else find_real_images(job.held_out_images, names)
    chunks = plan_chunks(job, subject, reference, train, held_out)

    start_ray(needed_cpus=(job.num_workers or os.cpu_count() or 1) + 1)
    num_workers = default_workers(job.num_workers, job.device)
    use_gpu = choose_gpus(job.device, num_workers)
    keeper = ImageKeeper(job, size)
    began = time.monotonic()
    sets = measuring.measure_sets(
        chunks,
        measuring.MeasuringPlan(
            extractor=job.extractor,
            extractor_weights=job.extractor_weights,
            model=job.model,
            tracking_uri=job.tracking_uri,
            batch_size=job.batch_size,
            cpu_threads=job.cpu_threads,
        ),
        num_workers=num_workers,
        use_gpu=use_gpu,
        on_chunk=keeper,
    )
    keeper.close()
    for name, measured in sets.items():
        if name != "grid" and measured.num_rows < 3:
            raise InputError(
                f"{measured.num_rows} of the {name} can be read, {measured.num_unreadable} cannot; at least 3 are needed"
            )
    seconds = time.monotonic() - began
    num_measured = sum(measured.num_rows for measured in sets.values())
    logger.info("%d images in %s; computing the figures", num_measured, format_seconds(seconds))

    job.output.mkdir(parents=True, exist_ok=True)
    if reference is None:
        assert train is not None
        source = {"images": str(job.train_images), "sha256": train[1].sha256}
        measured = sets["training images"]
        reference = _own_reference(job, measured, protocol_of(extractor.identity, source, size, measured.num_rows))
    elif "reference images" in sets:
        reference = replace(reference, features=torch.cat(sets["reference images"].features))
    report = _report(job, subject, extractor.identity, reference, sets, num_features)
    report["images_per_second"] = num_measured / seconds
    report["machine"] = {
        "workers": num_workers,
        "device": _device_name(use_gpu),
        "cpu_threads": job.cpu_threads,
    }
    if held_out is not None and train is not None and subject.pipeline is not None:
        _add_pixel_distances(report, sets, read_evenly(train, size, NUM_PIXEL_TRAIN)[0])
    report["num_unreadable"] = {
        name: measured.num_unreadable for name, measured in sets.items() if measured.num_unreadable
    }
    for name, count in report["num_unreadable"].items():
        logger.warning("left out %d unreadable %s", count, name)
    files = _write(job, subject, report, sets)
    _log(job, run, report, files)
    return report


def _own_reference(job: EvaluateJob, measured: Measured, protocol: Mapping[str, Any]) -> Reference:
    """Of the training images that were measured beside, kept in the report's folder for the next evaluation."""
    path = job.output / "reference.npz"
    filesystem, place = storage.open_storage(str(path))
    storage.write_bytes(filesystem, place, reference_bytes(measured, protocol))
    return read_reference(str(path))


def _device_name(use_gpu: bool) -> str:
    if not use_gpu:
        return f"CPU ({platform.processor() or platform.machine()})"
    name = ray.remote(num_gpus=1)(lambda: torch.cuda.get_device_name())
    return str(ray.get(name.remote()))


def _report(
    job: EvaluateJob, subject: Subject, extractor: Mapping[str, str], reference: Reference,
    sets: Mapping[str, Measured], num_features: int,
) -> dict:  # fmt: skip
    settings = job.settings if subject.pipeline is not None else []
    count = job.num_samples if subject.samples is None else len(subject.samples)
    report: dict[str, Any] = {
        "model": job.model or str(job.samples),
        "protocol": {
            "distance": describe(extractor),
            "num_samples": count,
            "labels": job.labels if subject.pipeline is not None else "the file's",
            "base_seed": job.seed,
            "sample_rule": "sample i: noise of torch's CPU generator seeded with base_seed * 2^32 + i",
            "uint8_rule": UINT8_RULE,
            "image_size": subject.image_size,
            "batch_size": job.batch_size,
            "precision": "float32",
            "extractor": dict(extractor),
            "reference": {
                "where": reference.where,
                "sha256": reference.sha256,
                "num_images": None if reference.protocol is None else reference.protocol["num_images"],
                "protocol": reference.protocol,
            },
            "precision_recall": {"num_neighbours": NUM_NEIGHBOURS, "num_at_most": job.num_precision_recall},
            "inception_score_splits": NUM_SPLITS,
            "jackknife_groups": NUM_GROUPS,
            "code": code_identity(),
        },
        "flags": flags(job, reference, extractor, num_features, count),
    }
    if subject.pipeline is not None:
        report["protocol"]["generator"] = {
            "transformer_sha256": weight_hash(subject.pipeline.transformer),
            "vae_sha256": weight_hash(subject.pipeline.vae),
            "prediction": subject.pipeline.config.prediction,
            "ema_decay": job.ema_decay,
        }
    manifold = manifold_of(reference, job.num_precision_recall)
    for name, key in (("held-out images", "held_out"), ("reconstructions", "reconstruction")):
        if name in sets:
            report[key] = figures(sets[name], reference, manifold)
    if "reconstructions" in sets:
        rebuilt, real = (torch.cat(sets[name].images) for name in ("reconstructions", "held-out images"))
        if len(rebuilt) == len(real):  # else storage failed for one of them, and which one is not known
            report["autoencoder_psnr"] = peak_signal_to_noise(rebuilt, real)
    report["samples"] = []
    for number, setting in enumerate(settings):
        measured = sets[_sample_name(number)]
        assert subject.pipeline is not None
        report["samples"].append(
            {
                "title": setting.title,
                **asdict(setting),
                "network_calls": setting.network_calls(subject.pipeline),
                **figures(measured, reference, manifold),
                "seconds_per_image": measured.seconds / measured.num_rows,
            }
        )
    if subject.samples is not None:
        report["samples"].append({"title": "of the file", **figures(sets[_sample_name(0)], reference, manifold)})
    return report


def _add_pixel_distances(report: dict, sets: Mapping[str, Measured], train: torch.Tensor) -> None:
    held_out = sets["held-out images"]
    pixels = PixelDistances(train, torch.cat(held_out.images), torch.cat(held_out.labels))
    named = [("held-out images", report["held_out"]), ("reconstructions", report["reconstruction"])]
    named += [(_sample_name(number), entry) for number, entry in enumerate(report["samples"])]
    for name, entry in named:
        entry.update(pixels.measure(torch.cat(sets[name].images), torch.cat(sets[name].labels)))


def _write(job: EvaluateJob, subject: Subject, report: dict, sets: Mapping[str, Measured]) -> list[Path]:
    """Writes the report's files, and names those that belong to it."""
    files = [job.output / "samples.png"]
    if subject.samples is not None:
        shown, columns = subject.samples[: GRID_COLUMNS**2], GRID_COLUMNS
    else:
        shown = torch.cat(sets["grid"].images).numpy()
        columns = len(shown) // len(torch.cat(sets["grid"].labels).unique())
    Image.fromarray(image_grid(shown, columns)).save(files[0])
    if subject.pipeline is not None:
        files.append(job.output / "quality_against_steps.png")
        plot(report, files[-1])
        if len(job.guidance_scales) > 1:
            files.append(job.output / "quality_against_guidance.png")
            plot_guidance(report, files[-1])
    for name, content in (("table.md", table(report)), ("report.json", json.dumps(report, indent=2) + "\n")):
        files.append(job.output / name)
        files[-1].write_text(content)
    return files


def _log(job: EvaluateJob, run: Run | None, report: dict, files: Sequence[Path]) -> None:
    if run is None and job.tracking_uri is not None and job.model is not None:
        run = find_run(job.model, job.tracking_uri)
    if run is None and job.tracking_uri is None:
        logger.info("no MLflow address given, so the report is in %s alone", job.output)
        return
    trained_here = run is not None
    if run is None:
        parameters = {"model": report["model"], "num_samples": report["protocol"]["num_samples"], "seed": job.seed}
        weights = report["protocol"].get("generator", {}).get("transformer_sha256")
        tags = {} if weights is None else {WEIGHTS_TAG: weights}
        run = Run.begin(str(job.tracking_uri), "meanflow-ray", "evaluate", parameters, tags)
    # Another average's figures must not stand where the generator's own are looked for.
    place = "evaluate" if job.ema_decay is None else f"evaluate-ema-{job.ema_decay:g}"
    settings = job.settings if job.model is not None else [Setting(num_steps=1)]
    for setting, entry in zip(settings, report["samples"], strict=True):
        way = way_slug(setting)
        family = f"{place}/{way}/" if way else f"{place}/"
        found = {f"{family}{key}": entry[key] for key in MEASURES if key in entry}
        run.log_metrics(found, setting.num_steps)  # the number of steps is the metric's step: MLflow draws the curve
    for path in files:
        run.log_file(path, place)
    run.flush()
    if trained_here and job.model is not None:
        tag_generator(
            run,
            report["protocol"]["generator"]["transformer_sha256"],
            "evaluate.",
            _version_tags(report, settings, f"runs:/{run.run_id}/{place}/report.json"),
        )
    if not trained_here:
        run.end("FINISHED")
    logger.info("logged to MLflow run %s at %s", run.run_id, run.tracking_uri)


def _version_tags(report: dict, settings: Sequence[Setting], where: str) -> dict[str, str]:
    """What a model's version says of its last evaluation: where the report is, and each setting's distance."""
    protocol = report["protocol"]
    tags = {
        "evaluate.report": where,
        "evaluate.distance": protocol["distance"],
        "evaluate.num_samples": str(protocol["num_samples"]),
        "evaluate.reference_sha256": protocol["reference"]["sha256"],
    }
    for setting, entry in zip(settings, report["samples"], strict=True):
        way = way_slug(setting)
        steps = f"{setting.num_steps}-step{'' if setting.num_steps == 1 else 's'}"
        tags[f"evaluate.frechet.{steps}{f'.{way}' if way else ''}"] = (
            f"{entry['frechet']:.4g} +- {entry['frechet_standard_error']:.2g}"
        )
    return tags


def main() -> None:
    """The command."""
    job = parse_command_line(EvaluateJob, __doc__)
    report = evaluate(job)
    print(table(report), end="")
    print(f"report: {job.output}")
