"""Reads all of a latent dataset and reports its problems."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from meanflow_core.latents import SD_VAE_FT_MSE_MEAN, SD_VAE_FT_MSE_STD, LatentNormalization
from pipelines import storage
from pipelines.check.figure import Sample, draw_samples, read_images
from pipelines.check.job import CheckJob
from pipelines.check.statistics import ChannelStatistics
from pipelines.errors import InputError
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.manifest import Manifest, read_manifest, shard_name
from pipelines.latents.shards import Shard, invalid_values, read_shard
from pipelines.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CheckReport:
    """What a check found."""

    manifest: Manifest
    """Manifest of the dataset."""
    normalization: LatentNormalization
    """Normalization of the latents, from the config of the dataset's autoencoder."""
    statistics: ChannelStatistics
    """Statistics of all samples."""
    class_counts: np.ndarray
    """Number of samples per class, int64."""
    problems: list[str] = field(default_factory=list)
    """Errors; empty if the dataset is intact."""
    notes: list[str] = field(default_factory=list)
    """Warnings."""
    psnr: float | None = None
    """Mean PSNR in dB of decoded latents against their images; None if the images are not available."""

    @property
    def num_samples(self) -> int:
        """Number of samples read."""
        return int(self.class_counts.sum())


def check(job: CheckJob) -> CheckReport:
    """Checks a dataset. Raises InputError if there is none."""
    manifest, vae = read_manifest(job.data), open_autoencoder(job.data)
    report = CheckReport(
        manifest=manifest,
        normalization=LatentNormalization.from_vae_config(vae.config),
        statistics=ChannelStatistics(manifest.latent_shape[0]),
        class_counts=np.zeros(len(manifest.class_names), dtype=np.int64),
    )
    counts = manifest.shard_num_samples
    if len(counts) != manifest.num_shards or sum(counts) != manifest.num_samples:
        report.problems.append("the sample counts in the manifest disagree")
        return report
    samples = _check_shards(job, report)
    report.notes += report.statistics.mismatches(report.normalization)
    num_empty = int((report.class_counts == 0).sum())
    if num_empty:
        report.notes.append(f"{num_empty} of {len(report.class_counts)} classes have no samples")
    if not report.problems:
        images: Sequence[np.ndarray | None] = [None] * len(samples)
        try:
            images = read_images(job.data, job.images or manifest.source, manifest.recipe.image_size, samples)
        except (InputError, OSError) as error:
            report.notes.append(f"cannot compare with the images: {error}; give their location with --images")
        report.psnr = draw_samples(samples, images, vae, job.figure)
    return report


def _check_shards(job: CheckJob, report: CheckReport) -> list[Sample]:
    """Adds problems and statistics of all shards to the report. Returns the samples for the figure."""
    filesystem, root = storage.open_storage(job.data)
    manifest = report.manifest
    count = min(job.num_samples, manifest.num_samples)
    figure_indices = np.arange(count) * manifest.num_samples // count
    samples: list[Sample] = []
    known_ids: set[str] = set()
    progress, start = Progress(logger, "checked", "latents", manifest.num_samples), 0
    for number, num_samples in enumerate(manifest.shard_num_samples):
        stop = start + num_samples
        try:
            shard = read_shard(filesystem, f"{root}/{shard_name(number)}")
        except (OSError, InputError) as error:
            report.problems.append(f"{shard_name(number)} cannot be read: {error}")
        else:
            problems = _shard_problems(shard, manifest, number, known_ids)
            report.problems += [f"{shard_name(number)}: {problem}" for problem in problems]
            known_ids.update(shard.sample_ids)
            num_classes = len(report.class_counts)
            report.class_counts += np.bincount(shard.labels.clip(0, num_classes - 1), minlength=num_classes)
            if shard.moments.shape[1:] == manifest.recipe.moments_shape:
                report.statistics.add(shard.moments)
            if not problems:
                samples += _select(shard, figure_indices[(figure_indices >= start) & (figure_indices < stop)] - start)
        start = stop
        progress.update(start)
    return samples


def _select(shard: Shard, rows: np.ndarray) -> list[Sample]:
    return [
        Sample(
            shard.sample_ids[row],
            shard.moments[row],
            None if shard.moments_mirrored is None else shard.moments_mirrored[row],
        )
        for row in rows
    ]


def _shard_problems(shard: Shard, manifest: Manifest, number: int, known_ids: set[str]) -> list[str]:
    """Lists the problems of a readable shard. known_ids: sample ids of earlier shards."""
    problems = []
    if len(shard.labels) != manifest.shard_num_samples[number]:
        problems.append(f"{len(shard.labels)} samples instead of {manifest.shard_num_samples[number]} in the manifest")
    sha256, stored = shard.content_sha256(), shard.summary.sha256
    if sha256 != stored:
        problems.append(f"damaged after it was written: its content has hash {sha256[:12]}, not {stored[:12]}")
    elif sha256 != manifest.shard_sha256[number]:
        problems.append(f"changed after the manifest was written (hash {sha256[:12]})")
    if shard.moments.shape[1:] != manifest.recipe.moments_shape:
        problems.append(f"moments of shape {shard.moments.shape[1:]} instead of {manifest.recipe.moments_shape}")
    problems += invalid_values(shard, len(manifest.class_names))
    repeated = [sample_id for sample_id in shard.sample_ids if sample_id in known_ids]
    if repeated:
        problems.append(f"{len(repeated)} sample ids also occur in earlier shards, such as {repeated[0]}")
    return problems


def describe(report: CheckReport) -> str:
    """Formats the report as text."""
    manifest, counts = report.manifest, report.class_counts
    lines = [
        f"{report.num_samples} samples of {len(counts)} classes ({counts.min()} to {counts.max()} each), "
        f"{manifest.num_rejected} images rejected",
        "",
    ]
    raw, normalized = report.statistics.raw(), report.statistics.normalized(report.normalization)
    has_reference = len(raw[0]) == len(SD_VAE_FT_MSE_MEAN) and manifest.recipe.vae_id == "stabilityai/sd-vae-ft-mse"
    heading = "channel   raw mean    raw std   normalized mean, std"
    lines.append(f"{heading}   sd-vae-ft-mse on ImageNet, raw mean, std" if has_reference else heading)
    for channel in range(len(raw[0])):
        reference = f"{SD_VAE_FT_MSE_MEAN[channel]:12.3f} {SD_VAE_FT_MSE_STD[channel]:10.3f}" if has_reference else ""
        lines.append(
            f"{channel:7d} {raw[0][channel]:10.3f} {raw[1][channel]:10.3f} {normalized[0][channel]:12.3f} "
            f"{normalized[1][channel]:9.3f}{reference}"
        )
    lines.append("")
    if report.psnr is not None:
        lines.append(f"PSNR of decoded latents against their images: {report.psnr:.1f} dB")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"PROBLEM: {problem}" for problem in report.problems]
    lines.append(f"problems: {len(report.problems) or 'none'}")
    return "\n".join(lines)
