"""What a refinement reads: the generator, and extractors with their references. Opened by the driver and by every worker."""

import functools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meanflow_core.autoencoder import weight_hash
from meanflow_core.frechet import FrechetReference
from meanflow_core.generator import load_pipeline
from meanflow_core.generator_folder import read_provenance
from meanflow_core.interop.conversion import ignore_step_size
from meanflow_core.networks.dit import MeanFlowDiT
from meanflow_core.networks.interface import NetworkModel
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.refinement import Renderer
from pipelines.errors import InputError
from pipelines.extractors.interface import Extractor
from pipelines.extractors.opening import INCEPTION, open_extractor
from pipelines.extractors.reference import Reference, read_reference, require_same_protocol
from pipelines.images.sources import find_images
from pipelines.refine.job import RefineJob
from pipelines.tracking.registry import fetch_generator


@dataclass(frozen=True)
class Generator:
    """The generator to refine."""

    folder: Path
    pipeline: MeanFlowPipeline
    provenance: dict[str, Any]
    was_multi_step: bool
    """Whether it predicted instantaneous velocities, for sampling in many steps."""

    @property
    def network(self) -> NetworkModel:
        """The network to train, in float32."""
        network: NetworkModel = self.pipeline.transformer
        return network

    @functools.cached_property
    def weights_sha256(self) -> str:
        """Hash of the network's weights."""
        return weight_hash(self.network)

    def renderer(self, num_inference_steps: int) -> Renderer:
        """Turns noise into pixels with the generator's decoder and default guidance."""
        config = self.pipeline.config
        return Renderer(
            vae=self.pipeline.vae,
            num_inference_steps=num_inference_steps,
            guidance_scale=config.guidance_scale,
            guidance_interval_start=config.guidance_interval_start,
            guidance_interval_end=config.guidance_interval_end,
        )


def open_generator(job: RefineJob, device: torch.device | str = "cpu", tracking_uri: str | None = None) -> Generator:
    """Opens the generator of --model, frozen. tracking_uri: MLflow address; default: MLFLOW_TRACKING_URI.

    A flow matching generator becomes one that predicts the same velocity for a step of any length: the refinement then turns
    it into a one-step generator. Raises InputError if the generator cannot be refined.
    """
    folder = fetch_generator(job.model, tracking_uri)
    try:
        pipeline, provenance = load_pipeline(folder, device), read_provenance(folder)
    except ValueError as error:
        raise InputError(f"--model {job.model}: {error}") from error
    prediction, network = pipeline.config.prediction, pipeline.transformer
    if prediction == "epsilon" or (prediction == "velocity" and not isinstance(network, MeanFlowDiT)):
        raise InputError(
            f"--model {job.model} predicts {prediction.replace('epsilon', 'noise')} for sampling in many steps, and cannot "
            f"take one step; give a generator that predicts average velocities, or flow matching of the DiT network"
        )
    if prediction == "consistency" and job.config.num_inference_steps > 1:
        raise InputError(
            f"--model {job.model} is a consistency model, whose further steps add fresh noise; refine it with "
            f"--num-inference-steps 1, but got {job.config.num_inference_steps}"
        )
    if prediction == "velocity":
        ignore_step_size(network)
        pipeline.register_to_config(prediction="average_velocity", guidance_scale=1.0)
    return Generator(folder, pipeline, provenance, was_multi_step=prediction == "velocity")


@dataclass(frozen=True)
class Metric:
    """An extractor with the reference that distances in its features are measured to."""

    label: str
    """A name for logs: the extractor's, or that of a judge's folder; numbered if several have the same."""
    extractor: Extractor
    reference: Reference
    weight: float | None
    """Weight in the loss; None if it is held out."""

    @property
    def key(self) -> str:
        """Name of its metric in MLflow."""
        return f"{'held_out' if self.weight is None else 'trained_on'}/{self.label}"

    def frechet_reference(self, device: torch.device) -> FrechetReference:
        """The reference's moments, prepared for distances."""
        return FrechetReference.of(self.reference.moments, device)


def open_metrics(job: RefineJob, image_size: int, device: torch.device | str = "cpu") -> list[Metric]:
    """Opens all extractors and references: first those to train on.

    Raises InputError for a reference of another extractor or image size, for one of fewer images than features, for an
    extractor that is both trained on and held out, and for one without a gradient that is to be trained on.
    """
    weights = [*(job.loss_weights or [1.0] * len(job.extractors)), *[None] * len(job.held_out_extractors)]
    names = [*job.extractors, *job.held_out_extractors]
    locations = [*job.references, *job.held_out_references]
    if job.extractor_weights is not None and INCEPTION not in names:
        raise InputError(f"--extractor-weights is only for inception, but the extractors are {', '.join(names)}")
    extractors = [open_extractor(name, job.extractor_weights if name == INCEPTION else None, device) for name in names]
    _require_different(extractors, names)
    labels = [_label(extractor, name) for extractor, name in zip(extractors, names, strict=True)]
    counts = Counter(labels)
    metrics: list[Metric] = []
    for number, (extractor, location, weight) in enumerate(zip(extractors, locations, weights, strict=True)):
        label = labels[number] if counts[labels[number]] == 1 else f"{labels[number]}_{number + 1}"
        reference = read_reference(location)
        probe = extractor.pooled(torch.zeros(1, 3, image_size, image_size, device=device, requires_grad=True))
        if weight is not None and not probe.requires_grad:
            raise InputError(f"{names[number]} gives features without a gradient, so it can only be held out")
        num_features = probe.shape[1]
        require_same_protocol(reference, extractor.identity, image_size, num_features)
        num_images = None if reference.protocol is None else reference.protocol["num_images"]
        if num_images is not None and num_images <= num_features:
            raise InputError(
                f"the reference {location} must be of more images than the extractor has features, {num_features}, or its "
                f"covariance is singular, but is of {num_images}; make it of more images, or choose an extractor with fewer "
                f"features"
            )
        metrics.append(Metric(label, extractor, reference, weight))
    return metrics


def _label(extractor: Extractor, name: str) -> str:
    found = Path(name).name if extractor.identity["name"] == "judge" else extractor.identity["name"]
    return re.sub(r"[^\w.-]", "_", found)  # MLflow's rules


def _require_different(extractors: list[Extractor], names: list[str]) -> None:
    seen: dict[tuple[tuple[str, str], ...], str] = {}
    for extractor, name in zip(extractors, names, strict=True):
        identity = tuple(sorted(extractor.identity.items()))
        if identity in seen:
            raise InputError(
                f"extractors must differ, but {name} and {seen[identity]} are the same; one that is trained on cannot be "
                f"held out"
            )
        seen[identity] = name


def class_counts(job: RefineJob, generator: Generator) -> list[int]:
    """Images of each class, in whose proportions labels are drawn: those of --data, else one of each.

    Raises InputError if --data has other classes than the generator.
    """
    names = list(generator.pipeline.class_names.values())
    num_classes = int(generator.network.config.num_classes)
    if job.data is None:
        return [1] * num_classes
    index = find_images(job.data)[2]
    if names and list(index.class_names) != names:
        raise InputError(
            f"--data {job.data} has the classes {', '.join(index.class_names[:5])}, ..., but the generator "
            f"{', '.join(names[:5])}, ...; give the data that it was trained on"
        )
    counts = index.class_counts(num_classes)
    if len(counts) != num_classes:
        raise InputError(f"--data {job.data} has {len(counts)} classes, but the generator {num_classes}")
    return counts
