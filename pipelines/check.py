"""A look at a latent dataset: is all of it there, is it what it says, and does it look like its images?

    python -m pipelines.check --data latents

Reads every shard, compares counts and hashes with the manifest, looks for values that cannot be, sets the latents'
statistics beside what the autoencoder's normalisation promises, and draws decoded latents beside their images.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import AutoencoderKL

from meanflow_core.autoencoder import decode_latents
from meanflow_core.latents import (
    SD_VAE_FT_MSE_MEAN,
    SD_VAE_FT_MSE_STD,
    LatentNormalization,
    sample_latents,
)
from meanflow_core.metrics import peak_signal_to_noise
from pipelines import storage
from pipelines.command_line import parse_command_line, run_command
from pipelines.errors import InputError
from pipelines.images.decoding import decode_image
from pipelines.images.sources import ImageIndex, ImageSlice, list_images
from pipelines.latents.manifest import INDEX, Manifest, open_autoencoder, read_manifest
from pipelines.latents.shards import read_shard, shard_problems
from pipelines.progress import Progress

logger = logging.getLogger(__name__)

# A channel of normalised latents should have mean 0 and deviation 1; ImageNet's, by the one factor of Stable Diffusion,
# have 0.75 to 0.97 (improved MeanFlow's statistics), and other data differ more.
MEAN_BOUND, STD_BOUNDS = 1.0, (0.4, 2.5)


@dataclass(frozen=True, kw_only=True)
class CheckJob:
    """Check a latent dataset, and draw some of it."""

    data: str
    """Latent dataset: a path or URI."""
    images: str | None = None
    """Where its images lie now; where they lay when it was encoded unless given."""
    picture: Path = Path("build/check.png")
    """PNG to write: images, their decoded latents, and the decoded latents of their mirror images."""
    num_pictures: int = 8
    """Images in it, spread over the dataset."""

    def __post_init__(self) -> None:
        if self.num_pictures < 1:
            raise ValueError(f"num_pictures must be at least 1, but got {self.num_pictures}")


class ChannelStatistics:
    """Mean and deviation per channel of draws from the moments, summed in float64."""

    def __init__(self, num_channels: int) -> None:
        self._count = 0
        self._sum, self._squares = np.zeros(num_channels), np.zeros(num_channels)

    def add(self, moments: np.ndarray) -> None:
        """Adds moments (N, 2C, H, W): mean^2 + deviation^2 is what a draw's square is worth on average."""
        mean, std = np.split(moments.astype(np.float64), 2, axis=1)
        self._count += mean.size // mean.shape[1]
        self._sum += mean.sum(axis=(0, 2, 3))
        self._squares += (mean**2 + std**2).sum(axis=(0, 2, 3))

    def raw(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation (C,) of the autoencoder's own latents."""
        mean = self._sum / max(self._count, 1)
        return mean, np.sqrt(np.maximum(self._squares / max(self._count, 1) - mean**2, 0.0))

    def normalized(self, normalization: LatentNormalization) -> tuple[np.ndarray, np.ndarray]:
        """The same as a network sees them."""
        mean, std = self.raw()
        scale = np.array(normalization.std)
        return (mean - np.array(normalization.mean)) / scale, std / scale


@dataclass(frozen=True)
class CheckReport:
    """What was found."""

    problems: list[str]
    """What is wrong; empty for a dataset that is whole."""
    notes: list[str]
    """What deserves a look."""
    num_samples: int
    """Rows that were read."""
    classes: np.ndarray
    """Rows per class."""
    statistics: ChannelStatistics
    """Of all rows."""
    psnr: float | None
    """Mean PSNR in dB of decoded latents against their images; None where the images are out of reach."""


def _read_everything(location: str, manifest: Manifest) -> tuple[list[str], np.ndarray, ChannelStatistics]:
    """Problems, rows per class, statistics."""
    filesystem, root = storage.open_storage(location)
    problems: list[str] = []
    ids: set[str] = set()
    num_classes = len(manifest.class_names)
    classes = np.zeros(num_classes, dtype=np.int64)
    statistics = ChannelStatistics(manifest.latent_shape[0])
    progress, done = Progress(logger, "checked", "latents", manifest.num_samples), 0
    for number, num_rows in enumerate(manifest.shard_rows):
        name = manifest.shard_name(number)
        try:
            shard = read_shard(filesystem, f"{root}/{name}")
        except (OSError, InputError) as error:
            problems.append(f"{name} cannot be read: {error}")
            continue
        if len(shard.labels) != num_rows:
            problems.append(f"{name} has {len(shard.labels)} rows, but the manifest says {num_rows}")
        found, stated = shard.content_sha256(), shard.summary.sha256
        if found != stated:
            problems.append(
                f"{name} was damaged after it was written: its content has hash {found[:12]}, not {stated[:12]}"
            )
        elif found != manifest.shard_sha256[number]:
            problems.append(f"{name} is another than when the manifest was written (hash {found[:12]})")
        if shard.moments.shape[1:] != manifest.recipe.moments_shape:
            problems.append(f"{name} has moments {shard.moments.shape[1:]}, not {manifest.recipe.moments_shape}")
            continue
        problems += [f"{name}: {problem}" for problem in shard_problems(shard, num_classes)]
        twice = [sample_id for sample_id in shard.sample_ids if sample_id in ids]
        if twice:
            problems.append(f"{name} holds {len(twice)} samples of earlier shards, such as {twice[0]}")
        ids.update(shard.sample_ids)
        classes += np.bincount(shard.labels.clip(0, num_classes - 1), minlength=num_classes)
        statistics.add(shard.moments)
        done += len(shard.labels)
        progress.update(done)
    return problems, classes, statistics


def _unlikely_statistics(manifest: Manifest, vae: AutoencoderKL, statistics: ChannelStatistics) -> list[str]:
    mean, std = statistics.normalized(LatentNormalization.from_vae_config(vae.config))
    return [
        f"channel {channel} of the normalised latents has mean {mean[channel]:.2f} and deviation {std[channel]:.2f}, "
        f"where about 0 and 1 are expected: are normalisation and autoencoder the right ones?"
        for channel in range(len(mean))
        if abs(mean[channel]) > MEAN_BOUND or not STD_BOUNDS[0] <= std[channel] <= STD_BOUNDS[1]
    ]


def _find_rows(
    location: str, manifest: Manifest, wanted: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Ids, moments and mirrored moments of some rows of the dataset, in ascending order."""
    filesystem, root = storage.open_storage(location)
    edges = np.cumsum([0, *manifest.shard_rows])
    ids, moments, mirrored = [], [], []
    for number in np.unique(np.searchsorted(edges, wanted, side="right") - 1):
        shard = read_shard(filesystem, f"{root}/{manifest.shard_name(int(number))}")
        rows = wanted[(wanted >= edges[number]) & (wanted < edges[number + 1])] - edges[number]
        ids += [shard.sample_ids[row] for row in rows]
        moments.append(shard.moments[rows])
        if shard.moments_mirrored is not None:
            mirrored.append(shard.moments_mirrored[rows])
    return ids, np.concatenate(moments), np.concatenate(mirrored) if mirrored else None


def _find_images(location: str, images: str, manifest: Manifest, ids: list[str]) -> list[np.ndarray | None]:
    """The cropped images of these ids, None for one that is not there."""
    filesystem, root = storage.open_storage(location)
    source, listing = list_images(images)
    content = storage.read_bytes(filesystem, f"{root}/{INDEX}")
    index = ImageIndex.from_bytes(content, listing.sha256)
    if index is None:
        raise InputError(f"{images} holds other images than those that were encoded")
    row_of = {sample_id: row for row, sample_id in enumerate(index.entries["sample_id"].to_pylist())}
    found: list[np.ndarray | None] = []
    for sample_id in ids:
        rows = np.array([row_of[sample_id]])
        read = next(iter(ImageSlice.of(source, listing, index, rows).read()))
        found.append(None if isinstance(read, Exception) else decode_image(read, manifest.recipe.image_size))
    return found


def _decode(vae: AutoencoderKL, moments: np.ndarray) -> np.ndarray:
    """The images uint8 (N, H, W, 3) of the posterior's means."""
    normalization = LatentNormalization.from_vae_config(vae.config)
    stored = torch.from_numpy(moments.astype(np.float32))
    nothing = torch.zeros_like(stored.chunk(2, dim=1)[0])
    latents = sample_latents(stored, nothing, normalization)
    return np.concatenate([decode_latents(vae, latent[None]).numpy() for latent in latents])


def _psnr(ours: np.ndarray, real: np.ndarray | None) -> float | None:
    return None if real is None else peak_signal_to_noise(torch.from_numpy(ours), torch.from_numpy(real))


def draw(rows: list[tuple[str, list[np.ndarray | None]]], titles: list[str], path: Path) -> None:
    """Writes a picture: rows of images under a title for each column."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(rows), len(titles), figsize=(1.7 * len(titles) + 0.9, 1.85 * len(rows)), layout="constrained", squeeze=False
    )
    for axis_row, (name, images) in zip(axes, rows, strict=True):
        for axis, image in zip(axis_row, images, strict=True):
            axis.set(xticks=[], yticks=[])
            if image is not None:
                axis.imshow(image, interpolation="nearest")
        axis_row[0].set_ylabel(name)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_samples(job: CheckJob, manifest: Manifest, vae: AutoencoderKL, notes: list[str]) -> float | None:
    count = min(job.num_pictures, manifest.num_samples)
    ids, moments, mirrored = _find_rows(job.data, manifest, np.arange(count) * manifest.num_samples // count)
    decoded = _decode(vae, moments)
    images: list[np.ndarray | None] = [None] * count
    try:
        images = _find_images(job.data, job.images or manifest.source, manifest, ids)
    except (InputError, OSError) as error:
        notes.append(f"no images beside the decoded latents: {error}; say where they are with --images")
    values = [_psnr(ours, real) for ours, real in zip(decoded, images, strict=True)]
    known = [value for value in values if value is not None]
    rows = [("image", images), ("decoded", list(decoded))]
    if mirrored is not None:
        rows.append(("mirrored,\ndecoded", list(_decode(vae, mirrored))))
    titles = [
        sample_id.rsplit("/", 1)[-1][-22:] + ("" if value is None else f"\n{value:.1f} dB")
        for sample_id, value in zip(ids, values, strict=True)
    ]
    draw(rows, titles, job.picture)
    return float(np.mean(known)) if known else None


def check(job: CheckJob) -> CheckReport:
    """Reads all of a dataset and says what is wrong with it. Raises InputError where there is none."""
    manifest = read_manifest(job.data)
    vae = open_autoencoder(job.data)
    problems, classes, statistics = _read_everything(job.data, manifest)
    if len(manifest.shard_rows) != len(manifest.shard_sha256) or sum(manifest.shard_rows) != manifest.num_samples:
        problems.append("the manifest disagrees with itself on the number of samples")
    notes = _unlikely_statistics(manifest, vae, statistics)
    empty = int((classes == 0).sum())
    if empty:
        notes.append(f"{empty} of {len(classes)} classes have no samples")
    psnr = None if problems else _draw_samples(job, manifest, vae, notes)
    return CheckReport(problems, notes, int(classes.sum()), classes, statistics, psnr)


def describe(report: CheckReport, manifest: Manifest, normalization: LatentNormalization) -> str:
    """The report as text."""
    lines = [
        f"{report.num_samples} samples of {len(report.classes)} classes ({report.classes.min()} to "
        f"{report.classes.max()} each), {manifest.num_rejected} images rejected",
        "",
        "channel   raw mean    raw std   mean, std as a network sees them   sd-vae-ft-mse on ImageNet, raw",
    ]
    raw, seen = report.statistics.raw(), report.statistics.normalized(normalization)
    knows = len(raw[0]) == len(SD_VAE_FT_MSE_MEAN) and manifest.recipe.vae_id == "stabilityai/sd-vae-ft-mse"
    for channel in range(len(raw[0])):
        known = f"{SD_VAE_FT_MSE_MEAN[channel]:12.3f} {SD_VAE_FT_MSE_STD[channel]:10.3f}" if knows else ""
        lines.append(
            f"{channel:7d} {raw[0][channel]:10.3f} {raw[1][channel]:10.3f} {seen[0][channel]:15.3f} "
            f"{seen[1][channel]:10.3f}       {known}".rstrip()
        )
    lines.append("")
    if report.psnr is not None:
        lines.append(f"decoded latents against their images: {report.psnr:.1f} dB PSNR")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"PROBLEM: {problem}" for problem in report.problems]
    lines.append("problems: none" if not report.problems else f"problems: {len(report.problems)}")
    return "\n".join(lines)


def main() -> None:
    """The command. Exit code 1 where something is wrong."""
    job = parse_command_line(CheckJob, __doc__)
    report = check(job)
    normalization = LatentNormalization.from_vae_config(open_autoencoder(job.data).config)
    print(describe(report, read_manifest(job.data), normalization))
    if not report.problems:
        print(f"picture: {job.picture}")
    raise SystemExit(1 if report.problems else 0)


if __name__ == "__main__":
    run_command(main)
