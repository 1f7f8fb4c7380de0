"""Reference statistics: what real images measure in an extractor's features, computed on every device.

    python -m pipelines.reference --images ILSVRC/Data/CLS-LOC/train --output imagenet256.npz --extractor inception
    python -m pipelines.reference --data latents --output decoded.npz --extractor inception

An .npz of plain arrays, never a pickle: mu and sigma, as ADM's and everybody's tools read them (--layout meanflow writes
ref_mu and ref_sigma, the authors' names), mu_s and sigma_s where the extractor gives spatial features, features for
precision and recall, and `protocol`, a JSON text saying how all that was made.
"""

import hashlib
import io
import itertools
import json
import logging
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pyarrow import fs

from meanflow_core.metrics import FeatureStatistics, Gaussian
from pipelines import storage
from pipelines.cluster import Device, choose_gpus, num_gpus, start_ray
from pipelines.command_line import parse_command_line, run_command
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.errors import InputError
from pipelines.evaluate import measuring
from pipelines.evaluate.extractors import DINOV2, INCEPTION, describe, open_extractor
from pipelines.images.center_crop import CROP
from pipelines.images.formats import Format
from pipelines.images.index import ImageIndex, Listing
from pipelines.images.sources import ImageSlice, find_images
from pipelines.latents.manifest import Manifest, read_manifest, shard_name

logger = logging.getLogger(__name__)

UINT8_RULE = "clamp(127.5 x + 128, 0, 255), truncated"
KEYS = {"adm": ("mu", "sigma"), "meanflow": ("ref_mu", "ref_sigma")}


@dataclass(frozen=True, kw_only=True)
class ReferenceJob:
    """Compute reference statistics of real images, or of a latent dataset's decoded ones."""

    output: str
    """File to write, .npz: a path or a URI."""
    images: str | None = None
    """Images in any form that pipelines.encode reads."""
    data: str | None = None
    """Latent dataset, in place of images: what the autoencoder makes of them, the best that a generator can reach."""
    format: Format | None = None
    """Of the images; told by looking unless named."""
    image_size: int = 256
    """Side of the square that images are cropped to; a latent dataset has its own."""
    extractor: str = str(SHIPPED_JUDGE)
    """inception, dinov2-vit-l-14 (extra `fid`), a TorchScript file, or a judge's folder: the demo's unless given."""
    extractor_weights: Path | None = None
    """File of the extractor's weights, where it is not to be downloaded."""
    num_features: int = 10_000
    """Features to keep for precision and recall, of images spread over the source; 0 for none."""
    layout: Literal["adm", "meanflow"] = "adm"
    """Names of mean and covariance: mu, sigma; or ref_mu, ref_sigma."""
    batch_size: int = 50
    """Images per call of the extractor."""
    num_workers: int | None = None
    """Processes; one per GPU, or one per CPU of a machine without."""
    device: Device = "auto"
    """Compute on GPUs; where the cluster has some, unless said."""
    cpu_threads: int = 1
    """Threads of a process on a CPU."""

    def __post_init__(self) -> None:
        if (self.images is None) == (self.data is None):
            raise ValueError("give either --images or --data")
        if self.num_features < 0 or min(self.image_size, self.batch_size, self.cpu_threads) < 1:
            raise ValueError("num_features must be at least 0, and image_size, batch_size and cpu_threads 1")


@dataclass(frozen=True)
class Reference:
    """Statistics of real images, from a file or just measured."""

    moments: Gaussian | FeatureStatistics
    spatial: Gaussian | FeatureStatistics | None
    """For sFID."""
    features: torch.Tensor | None
    """(M, D): for precision and recall."""
    protocol: Mapping[str, Any] | None
    """How it was made; None for a file of somebody else, which does not say."""
    where: str
    """For messages."""
    sha256: str
    """Of the file's content."""
    has_images: bool = False
    """Whether the file holds images (arr_0) for precision and recall in place of features, as ADM's do."""


def read_reference(location: str) -> Reference:
    """Opens a reference: ours, ADM's (mu, sigma, mu_s, sigma_s, arr_0), or the authors' (ref_mu, ref_sigma).

    Raises InputError where it is missing, holds pickles, or has neither pair.
    """
    filesystem, path = storage.open_storage(location)
    try:
        content = storage.read_bytes(filesystem, path)
    except OSError as error:
        raise InputError(f"no reference {location}: python -m pipelines.reference writes one") from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            names = set(file.files)
            arrays = {name: file[name] for name in names - {"arr_0"}}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{location} is no .npz of plain arrays: {error}") from error

    def gaussian(mean: str, covariance: str) -> Gaussian | None:
        if mean not in arrays or covariance not in arrays:
            return None
        mu, sigma = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in (mean, covariance))
        if mu.dim() != 1 or sigma.shape != (len(mu), len(mu)):
            raise InputError(
                f"{location}: {mean} and {covariance} must be (D,) and (D, D), but are {tuple(mu.shape)} and "
                f"{tuple(sigma.shape)}"
            )
        return Gaussian(mu, sigma)

    found = [moments for names in KEYS.values() if (moments := gaussian(*names)) is not None]
    if not found:
        wanted = " or ".join(", ".join(names) for names in KEYS.values())
        raise InputError(f"{location} holds {', '.join(sorted(names)) or 'nothing'}, but a reference holds {wanted}")
    return Reference(
        moments=found[0],
        spatial=gaussian("mu_s", "sigma_s"),
        features=torch.from_numpy(arrays["features"]) if "features" in arrays else None,
        protocol=json.loads(str(arrays["protocol"])) if "protocol" in arrays else None,
        where=location,
        sha256=hashlib.sha256(content).hexdigest(),
        has_images="arr_0" in names,
    )


def reference_bytes(
    measured: measuring.Measured, protocol: Mapping[str, Any], layout: Literal["adm", "meanflow"] = "adm"
) -> bytes:
    """The content of a reference file."""
    mean, covariance = KEYS[layout]
    statistics = measured.statistics
    arrays = {
        mean: statistics.mean.numpy(),
        covariance: statistics.covariance.numpy(),
        "protocol": np.array(json.dumps(protocol)),
    }
    if measured.spatial is not None:
        arrays |= {"mu_s": measured.spatial.mean.numpy(), "sigma_s": measured.spatial.covariance.numpy()}
    if measured.features:
        arrays["features"] = torch.cat(measured.features).numpy()
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def protocol_of(extractor: Mapping[str, str], source: Mapping[str, Any], image_size: int, num_images: int) -> dict:
    """What a reference file says of itself."""
    return {
        "extractor": dict(extractor),
        "image_size": image_size,
        "crop": CROP,
        "source": dict(source),
        "num_images": num_images,
    }


def disagreements(reference: Reference, extractor: Mapping[str, str], image_size: int) -> list[str]:
    """The rules that a reference was made under and an evaluation is not, in words."""
    if reference.protocol is None:
        return []
    found = []
    theirs = reference.protocol["extractor"]
    for key in sorted({*theirs, *extractor}):
        if theirs.get(key) != extractor.get(key):
            found.append(f"extractor's {key}: {theirs.get(key)} in the reference, {extractor.get(key)} here")
    if reference.protocol["image_size"] != image_size:
        found.append(f"image size: {reference.protocol['image_size']} in the reference, {image_size} here")
    return found


def require_same_rules(reference: Reference, extractor: Mapping[str, str], image_size: int, num_features: int) -> None:
    """Raises InputError where figures against the reference would not mean what they say."""
    wrong = disagreements(reference, extractor, image_size)
    if wrong:
        raise InputError(
            f"{reference.where} was made under other rules ({'; '.join(wrong)}); make one by python -m "
            f"pipelines.reference with this extractor and size"
        )
    if len(reference.moments.mean) != num_features:
        raise InputError(
            f"{reference.where} is of {len(reference.moments.mean)} features, but the extractor {describe(extractor)} "
            f"has {num_features}"
        )


def default_workers(num_workers: int | None, device: Device) -> int:
    """As many processes as asked for, else one per GPU, else one per CPU."""
    if num_workers is not None:
        return num_workers
    return (num_gpus() if device != "cpu" else 0) or os.cpu_count() or 1


def image_chunks(
    set_name: str,
    images: tuple[fs.FileSystem, Listing, ImageIndex],
    size: int,
    *,
    mixed: bool = False,
    num_features: int = 0,
    num_images: int = 0,
) -> list[measuring.Chunk]:
    """The chunks of a source of images, cropped to `size`; what is kept as `measuring.cut` has it.

    mixed: class folders are read in a fixed random order, so that groups are alike and not of a class each, which a
    jackknife and the splits of a score need. Parquet and tars have their own order, and are only quick to read in it.
    """
    count = len(images[2])
    order = np.random.default_rng(0).permutation(count) if mixed and images[1].format == "folders" else np.arange(count)
    return measuring.cut(
        set_name,
        measuring.spans(count),
        lambda start, stop: measuring.Read(ImageSlice.of(*images, order[start:stop]), size),
        num_features=num_features,
        num_images=num_images,
    )


def _decoded_chunks(data: str, manifest: Manifest, num_features: int) -> list[measuring.Chunk]:
    edges = np.cumsum([0, *manifest.shard_rows]).tolist()
    shards = list(itertools.pairwise(edges))
    parts = [(number * measuring.NUM_GROUPS // len(shards), start, stop) for number, (start, stop) in enumerate(shards)]
    number_of = {start: number for number, (start, _) in enumerate(shards)}
    return measuring.cut(
        "reference",
        parts,
        lambda start, _: measuring.Decoded(data, shard_name(number_of[start])),
        num_features=num_features,
    )


def make_reference(job: ReferenceJob) -> dict[str, Any]:
    """Measures, writes the file, and returns its protocol. Raises InputError for input that cannot be."""
    storage.output_location(job.output.rpartition("/")[0] or ".", "--output")
    output = storage.absolute(job.output)
    job = replace(
        job,
        images=None if job.images is None else storage.absolute(job.images),
        data=None if job.data is None else storage.absolute(job.data),
    )
    identity = open_extractor(job.extractor, job.extractor_weights, "cpu").identity
    if job.images is not None:
        found = find_images(job.images, job.format)
        chunks = image_chunks("reference", found, job.image_size, num_features=job.num_features)
        source, image_size = {"images": job.images, "sha256": found[1].sha256}, job.image_size
    else:
        assert job.data is not None
        manifest = read_manifest(job.data)
        chunks = _decoded_chunks(job.data, manifest, job.num_features)
        source = {
            "latents": job.data,
            "sha256": manifest.content_sha256,
            "autoencoder_sha256": manifest.recipe.vae_sha256,
            "uint8": UINT8_RULE,
        }
        image_size = manifest.recipe.image_size
    num_images = sum(chunk.num_rows for chunk in chunks)
    logger.info("%d images of %d pixels in the eyes of %s", num_images, image_size, describe(identity))
    start_ray(needed_cpus=(job.num_workers or os.cpu_count() or 1) + 1)
    num_workers = default_workers(job.num_workers, job.device)
    measured = measuring.measure_sets(
        chunks,
        measuring.MeasuringPlan(
            extractor=absolute_extractor(job.extractor),
            extractor_weights=None if job.extractor_weights is None else job.extractor_weights.absolute(),
            model=None,
            tracking_uri=None,
            autoencoder=job.data,
            batch_size=job.batch_size,
            cpu_threads=job.cpu_threads,
        ),
        num_workers=num_workers,
        use_gpu=choose_gpus(job.device, num_workers),
    )["reference"]
    if measured.num_unreadable:
        logger.warning("left out %d of %d images that cannot be read", measured.num_unreadable, num_images)
    if measured.num_rows < 2:
        raise InputError(f"{measured.num_rows} of {num_images} images in {job.images} can be read, but 2 are needed")
    protocol = protocol_of(identity, source, image_size, measured.num_rows)
    filesystem, path = storage.open_storage(output)
    storage.write_bytes(filesystem, path, reference_bytes(measured, protocol, job.layout))
    return protocol


def absolute_extractor(name: str) -> str:
    """An extractor's name, or its path as other processes find it."""
    is_known = name in (INCEPTION, *DINOV2)  # whatever folder of that name happens to lie here
    return str(Path(name).absolute()) if not is_known and Path(name).exists() else name


def main() -> None:
    """The command."""
    job = parse_command_line(ReferenceJob, __doc__)
    protocol = make_reference(job)
    print(f"reference: {job.output}, {protocol['num_images']} images, {describe(protocol['extractor'])}")


if __name__ == "__main__":
    run_command(main)
