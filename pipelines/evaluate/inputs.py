"""Inputs of an evaluation: the generator or sample file, the extractor, the reference and the real images."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from meanflow_core.generator import load_pipeline
from meanflow_core.generator_folder import read_provenance
from meanflow_core.pipeline import MeanFlowPipeline
from pipelines.errors import InputError
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.real_images import ImageSource, find_real_images
from pipelines.evaluate.sample_files import open_sample_file
from pipelines.extractors.opening import Extractor, open_extractor
from pipelines.extractors.reference import Reference, read_reference, require_same_protocol
from pipelines.tracking.registry import fetch_generator


@dataclass(frozen=True)
class Generator:
    """A generator to sample."""

    folder: Path
    """Local folder with its weights."""
    pipeline: MeanFlowPipeline
    ema_decay: float | None
    """EMA decay of its weights. None if the folder does not record it."""

    refined_on: tuple[dict[str, str], ...] = ()
    """Identities of the extractors whose distances it was trained to lower, by `meanflow refine`."""

    @property
    def class_names(self) -> list[str]:
        """Name per class label."""
        return list(self.pipeline.class_names.values())

    @property
    def num_classes(self) -> int:
        """Number of classes of the network."""
        return int(self.pipeline.transformer.config.num_classes)


@dataclass(frozen=True)
class Inputs:
    """All inputs of an evaluation, checked for consistency."""

    extractor: Extractor
    generator: Generator | None
    """None if a sample file is measured."""
    samples: np.ndarray | None
    """Images of the sample file, uint8 (N, H, H, 3)."""
    reference: Reference | None
    """None: compute it from the training images."""
    train: ImageSource | None
    held_out: ImageSource | None

    @property
    def is_trained_on(self) -> bool:
        """Whether the generator was trained to lower this extractor's distance."""
        weights = self.extractor.identity["weights_sha256"]
        refined_on = () if self.generator is None else self.generator.refined_on
        return any(identity["weights_sha256"] == weights for identity in refined_on)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        if self.generator is not None:
            return self.generator.pipeline.image_size
        assert self.samples is not None
        return self.samples.shape[1]

    @cached_property
    def class_counts(self) -> tuple[int, ...]:
        """Number of training images of each class of the generator."""
        assert self.train is not None
        assert self.generator is not None
        return tuple(self.train[2].class_counts(self.generator.num_classes))

    @cached_property
    def num_features(self) -> int:
        """Number of pooled features of the extractor."""
        size = self.image_size
        return self.extractor(torch.zeros(1, size, size, 3, dtype=torch.uint8)).pooled.shape[1]


def open_inputs(job: EvaluateJob) -> Inputs:
    """Opens all inputs of a job. Raises InputError for missing or inconsistent inputs."""
    extractor = open_extractor(job.extractor, job.extractor_weights, "cpu")
    generator, samples = None, None
    if job.samples is not None:
        samples = open_sample_file(job.samples)
        _check_samples(job, samples)
    else:
        assert job.model is not None
        folder = fetch_generator(job.model, job.tracking_uri)
        provenance = read_provenance(folder)
        generator = Generator(
            folder, load_pipeline(folder), provenance.get("ema_decay"), tuple(provenance.get("refined_on", ()))
        )
        _check_generator(job, generator, extractor)
    class_names = None if generator is None else generator.class_names
    inputs = Inputs(
        extractor=extractor,
        generator=generator,
        samples=samples,
        reference=None if job.reference is None else read_reference(job.reference),
        train=None if job.train_images is None else find_real_images(job.train_images, class_names),
        held_out=None if job.held_out_images is None else find_real_images(job.held_out_images, class_names),
    )
    if inputs.reference is not None:
        require_same_protocol(inputs.reference, extractor.identity, inputs.image_size, inputs.num_features)
    return inputs


def _check_samples(job: EvaluateJob, samples: np.ndarray) -> None:
    if job.held_out_images is not None or job.save_samples is not None:
        raise InputError("--held-out-images and --save-samples require --model, but got --samples")
    if len(samples) < 3:
        raise InputError(f"{job.samples} must have at least 3 images, but has {len(samples)}")


def _check_generator(job: EvaluateJob, generator: Generator, extractor: Extractor) -> None:
    if extractor.class_names is not None and list(extractor.class_names) != generator.class_names:
        raise InputError(
            f"the judge in {job.extractor} was trained on the classes {', '.join(extractor.class_names)}, but the generator "
            f"on {', '.join(generator.class_names)}; give --extractor inception, or a judge of the generator's classes"
        )
    if job.labels == "balanced" and job.num_samples < 2 * generator.num_classes:
        raise InputError(
            f"--num-samples must be at least {2 * generator.num_classes} (2 for each of the {generator.num_classes} "
            f"classes), but got {job.num_samples}"
        )
    if (job.guidance_scales or job.guidance_intervals) and not generator.pipeline.supports_guidance:
        raise InputError(
            "the generator's guidance is fixed in its weights; remove --guidance-scales and --guidance-intervals"
        )
    if "heun" in job.solvers and generator.pipeline.config.prediction != "velocity":
        raise InputError(
            f"--solvers heun requires a flow matching generator, which predicts velocity, but this one predicts "
            f"{generator.pipeline.config.prediction.replace('_', ' ')}; use euler"
        )
