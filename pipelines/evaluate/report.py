"""The content of an evaluation's report: the protocol, warnings, and the metrics of every set of images."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from meanflow_core.autoencoder import weight_hash
from meanflow_core.metrics import (
    Manifold,
    frechet_distance,
    frechet_estimate,
    inception_score,
    peak_signal_to_noise,
    precision_and_recall,
)
from pipelines.evaluate.feature_distances import FeatureDistances
from pipelines.evaluate.inputs import Inputs
from pipelines.evaluate.job import STANDARD_NUM_SAMPLES, EvaluateJob
from pipelines.evaluate.linear_probe import PROBE_PROTOCOL, LinearProbe, fit_probe
from pipelines.evaluate.pixel_distances import PixelDistances
from pipelines.evaluate.plan import HELD_OUT_IMAGES, RECONSTRUCTIONS, TRAINING_IMAGES, has_neighbours, samples_set
from pipelines.evaluate.sources import UINT8_RULE
from pipelines.evaluate.sums import NUM_GROUPS, NUM_SPLITS, SetSums
from pipelines.extractors.opening import INCEPTION, distance_name
from pipelines.extractors.reference import Reference
from pipelines.tracking.provenance import code_identity

MAX_PROBE_CLASSES = 100
TRAINED_ON_WARNING = (
    "the generator was trained on this extractor by `meanflow refine`, so the distance measures the training and not the "
    "images; state it only beside distances in held-out extractors (meanflow before-after)"
)
NUM_NEIGHBOURS = 3  # for precision and recall, as in ADM's evaluation


def build_report(
    job: EvaluateJob,
    inputs: Inputs,
    reference: Reference,
    sets: Mapping[str, SetSums],
    train_pixels: torch.Tensor | None,
) -> dict[str, Any]:
    """Builds the report as a JSON-serializable dict.

    train_pixels: training images for the pixel distances, uint8 (N, H, W, 3). None omits these metrics.
    """
    manifold = manifold_of(reference, job.num_precision_recall)
    reported = [HELD_OUT_IMAGES, RECONSTRUCTIONS, *(samples_set(number) for number in range(len(job.settings)))]
    probe = probe_of(job, inputs, reference)
    metrics = {name: compute_metrics(sets[name], reference, manifold, probe) for name in reported if name in sets}
    if train_pixels is not None:
        _add_pixel_distances(metrics, sets, train_pixels)
    if has_neighbours(job, inputs) and HELD_OUT_IMAGES in sets:
        _add_feature_distances(metrics, sets)
    report: dict[str, Any] = {
        "model": job.model or str(job.samples),
        "protocol": protocol(job, inputs, reference),
        "warnings": protocol_warnings(
            job, reference, inputs.extractor.identity, inputs.num_features, num_samples(job, inputs)
        )
        + probe_warnings(inputs, reference)
        + ([TRAINED_ON_WARNING] if inputs.is_trained_on else []),
    }
    if probe is not None:
        report["protocol"]["linear_probe"] = PROBE_PROTOCOL
    for name, key in ((HELD_OUT_IMAGES, "held_out"), (RECONSTRUCTIONS, "reconstruction")):
        if name in sets:
            report[key] = metrics[name]
    if RECONSTRUCTIONS in sets:
        rebuilt, real = (torch.cat(sets[name].images) for name in (RECONSTRUCTIONS, HELD_OUT_IMAGES))
        if len(rebuilt) == len(real):  # else an image was unreadable in one pass only, and the pairs are unknown
            report["autoencoder_psnr"] = peak_signal_to_noise(rebuilt, real)
    if inputs.generator is None:
        report["samples"] = [{"title": "from the file", **metrics[samples_set(0)]}]
    else:
        report["samples"] = [
            {
                "title": setting.title,
                "variant": setting.variant,
                **asdict(setting),
                "num_function_evaluations": setting.num_function_evaluations(inputs.generator.pipeline),
                **metrics[samples_set(number)],
                "seconds_per_image": sets[samples_set(number)].seconds / sets[samples_set(number)].num_images,
            }
            for number, setting in enumerate(job.settings)
        ]
    return report


def num_samples(job: EvaluateJob, inputs: Inputs) -> int:
    """Number of samples per setting, or in the sample file."""
    return job.num_samples if inputs.samples is None else len(inputs.samples)


def protocol(job: EvaluateJob, inputs: Inputs, reference: Reference) -> dict[str, Any]:
    """Everything that the metrics depend on. Reports with different protocols are not comparable."""
    generator = inputs.generator
    content: dict[str, Any] = {
        "distance": distance_name(inputs.extractor.identity),
        "num_samples": num_samples(job, inputs),
        "labels": job.labels if generator is not None else "those of the file",
        "base_seed": job.seed,
        "sample_rule": "sample i: noise of torch's CPU generator seeded with base_seed * 2^32 + i",
        "uint8_rule": UINT8_RULE,
        "image_size": inputs.image_size,
        "batch_size": job.batch_size,
        "precision": "float32",
        "extractor": dict(inputs.extractor.identity),
        "reference": {
            "location": reference.location,
            "sha256": reference.sha256,
            "num_images": None if reference.protocol is None else reference.protocol["num_images"],
            "protocol": reference.protocol,
        },
        "precision_recall": {"num_neighbours": NUM_NEIGHBOURS, "num_at_most": job.num_precision_recall},
        "inception_score_splits": NUM_SPLITS,
        "jackknife_groups": NUM_GROUPS,
        "code": code_identity(),
    }
    if generator is not None:
        if job.labels == "training":
            content["class_counts"] = list(inputs.class_counts)
        content["generator"] = {
            "transformer_sha256": weight_hash(generator.pipeline.transformer),
            "vae_sha256": weight_hash(generator.pipeline.vae),
            "prediction": generator.pipeline.config.prediction,
            "ema_decay": generator.ema_decay,
            "is_trained_on_extractor": inputs.is_trained_on,
        }
    return content


def protocol_warnings(
    job: EvaluateJob, reference: Reference, extractor: Mapping[str, str], num_features: int, num_samples: int
) -> list[str]:
    """Lists reasons why the metrics may not be comparable with others."""
    warnings = []
    if reference.protocol is None:
        warnings.append(
            f"{reference.location} does not state its extractor, crop and image size; the metrics are valid only if these "
            f"match the evaluation's"
        )
    if extractor["name"] == INCEPTION and num_samples != STANDARD_NUM_SAMPLES:
        warnings.append(
            f"FID decreases with the number of samples; published FIDs use {STANDARD_NUM_SAMPLES}, but this one {num_samples}"
        )
    if reference.has_images and reference.features is None and job.num_precision_recall:
        warnings.append(
            "precision and recall are missing, because the reference's images can only be read from a local disk"
        )
    if num_samples <= num_features:
        warnings.append(
            f"the covariance is singular and the distance biased, because {num_samples} samples are too few for "
            f"{num_features} features"
        )
    return warnings


def probe_of(job: EvaluateJob, inputs: Inputs, reference: Reference) -> LinearProbe | None:
    """Fits a linear probe to the reference's features.

    None if the extractor knows the classes itself, if there is no generator, if the reference has no labels of the
    generator's classes, or if there are more than MAX_PROBE_CLASSES: a reference then has too few features of each.
    """
    generator = inputs.generator
    if inputs.extractor.class_names is not None or generator is None or not job.num_precision_recall:
        return None
    if generator.num_classes > MAX_PROBE_CLASSES:
        return None
    if reference.features is None or reference.feature_labels is None:
        return None
    if reference.class_names != tuple(generator.class_names) or len(reference.feature_labels.unique()) < 2:
        return None
    return fit_probe(reference.features, reference.feature_labels, generator.num_classes)


def probe_warnings(inputs: Inputs, reference: Reference) -> list[str]:
    """The reason why a reference of `meanflow reference` gives no probe accuracy, if it is in the reference."""
    if inputs.generator is None or inputs.extractor.class_names is not None or reference.protocol is None:
        return []
    if reference.class_names is None:
        return [
            f"probe accuracy is missing, because {reference.location} has no labels; make it again with "
            f"`meanflow reference --images`"
        ]
    if reference.class_names == tuple(inputs.generator.class_names):
        return []
    return [f"probe accuracy is missing, because {reference.location} has other classes than the generator"]


def compute_metrics(
    sums: SetSums, reference: Reference, manifold: Manifold | None, probe: LinearProbe | None = None
) -> dict[str, float]:
    """Computes all metrics that the extractor and the reference support.

    manifold: the reference's, from `manifold_of`. probe: fitted to the reference, from `probe_of`.
    """
    estimate = frechet_estimate([sums.groups[group] for group in sorted(sums.groups)], reference.moments)
    metrics = {"frechet": estimate.value, "frechet_standard_error": estimate.standard_error}
    if sums.scores:
        metrics["inception_score"], metrics["inception_score_deviation"] = inception_score(sums.splits)
    if sums.spatial is not None and reference.spatial is not None:
        metrics["spatial_frechet"] = frechet_distance(sums.spatial, reference.spatial)
    if sums.features and manifold is not None:
        features = torch.cat(sums.features)
        if len(features) > NUM_NEIGHBOURS:
            own_manifold = Manifold.of(features, NUM_NEIGHBOURS)
            metrics["precision"], metrics["recall"] = precision_and_recall(own_manifold, manifold)
    if sums.num_correct is not None:
        metrics["accuracy"] = sums.num_correct / sums.num_images
    if probe is not None and sums.features and sums.feature_labels:
        metrics["probe_accuracy"] = probe.accuracy(torch.cat(sums.features), torch.cat(sums.feature_labels))
    return metrics


def manifold_of(reference: Reference, num_points: int) -> Manifold | None:
    """Manifold of at most `num_points` of a reference's features. None if there are too few features."""
    if reference.features is None:
        return None
    count = min(num_points, len(reference.features))
    if count <= NUM_NEIGHBOURS:
        return None
    # Spread evenly, because references are often sorted by class.
    indices = torch.arange(count) * len(reference.features) // count
    return Manifold.of(reference.features[indices], NUM_NEIGHBOURS)


def _add_pixel_distances(
    metrics: Mapping[str, dict[str, float]], sets: Mapping[str, SetSums], train_pixels: torch.Tensor
) -> None:
    held_out = sets[HELD_OUT_IMAGES]
    distances = PixelDistances(train_pixels, torch.cat(held_out.images), torch.cat(held_out.labels))
    for name, values in metrics.items():
        values.update(distances.measure(torch.cat(sets[name].images), torch.cat(sets[name].labels)))


def _add_feature_distances(metrics: Mapping[str, dict[str, float]], sets: Mapping[str, SetSums]) -> None:
    held_out = torch.cat(sets[HELD_OUT_IMAGES].features)
    distances = FeatureDistances(torch.cat(sets[TRAINING_IMAGES].features), held_out)
    for name, values in metrics.items():
        values.update(distances.measure(torch.cat(sets[name].features)))
