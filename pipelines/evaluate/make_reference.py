"""Computes a reference file from images, or from the decoded images of a latent dataset."""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipelines import storage
from pipelines.errors import InputError
from pipelines.evaluate.chunks import Chunk, Kept, decoded_chunks, image_file_chunks
from pipelines.evaluate.job import ReferenceJob
from pipelines.evaluate.measuring import WorkerConfig
from pipelines.evaluate.sources import UINT8_RULE
from pipelines.evaluate.sums import SetSums
from pipelines.evaluate.workers import measure_sets, start_cluster
from pipelines.extractors.opening import absolute_extractor, open_extractor
from pipelines.extractors.reference import MOMENT_NAMES, reference_protocol
from pipelines.images.sources import find_images
from pipelines.latents.manifest import read_manifest

logger = logging.getLogger(__name__)


def make_reference(job: ReferenceJob) -> dict[str, Any]:
    """Measures the images, writes the file, and returns its protocol. Raises InputError for invalid input."""
    storage.output_location(job.output.rpartition("/")[0] or ".", "--output")
    job = replace(
        job,
        output=storage.absolute(job.output),
        images=None if job.images is None else storage.absolute(job.images),
        data=None if job.data is None else storage.absolute(job.data),
        extractor=absolute_extractor(job.extractor),
        extractor_weights=None if job.extractor_weights is None else job.extractor_weights.absolute(),
    )
    identity = open_extractor(job.extractor, job.extractor_weights, "cpu").identity
    chunks, source, image_size, class_names = _plan(job)
    num_images = sum(chunk.num_images for chunk in chunks)
    logger.info("computing %s features of %d images (%d pixels)", identity["name"], num_images, image_size)
    workers = start_cluster(job)
    sums = measure_sets(chunks, WorkerConfig(options=job, autoencoder=job.data), workers)["reference"]
    if sums.num_unreadable:
        logger.warning("skipped %d of %d images, because they could not be read", sums.num_unreadable, num_images)
    if sums.num_images < 2:
        raise InputError(
            f"a reference requires at least 2 readable images, but {job.images or job.data} has {sums.num_images}"
        )
    protocol = reference_protocol(identity, source, image_size, sums.num_images)
    filesystem, path = storage.open_storage(job.output)
    storage.write_bytes(filesystem, path, reference_bytes(sums, protocol, class_names))
    return protocol


def _plan(job: ReferenceJob) -> tuple[list[Chunk], dict[str, str], int, Sequence[str]]:
    """Returns the chunks to measure, the identity of their source, the image size in pixels, and the class names."""
    if job.images is not None:
        images = find_images(job.images)
        chunks = image_file_chunks("reference", images, job.image_size, Kept(features=job.num_features))
        return chunks, {"images": job.images, "sha256": images[1].sha256}, job.image_size, images[2].class_names
    assert job.data is not None
    manifest = read_manifest(job.data)
    chunks = decoded_chunks("reference", job.data, manifest, Kept(features=job.num_features))
    source = {
        "latents": job.data,
        "sha256": manifest.content_sha256,
        "autoencoder_sha256": manifest.recipe.vae_sha256,
        "uint8": UINT8_RULE,
    }
    return chunks, source, manifest.recipe.image_size, manifest.class_names


def reference_bytes(sums: SetSums, protocol: Mapping[str, Any], class_names: Sequence[str] | None = None) -> bytes:
    """Serializes sums, protocol and the names of the labels as the content of a reference file."""
    mean, covariance = MOMENT_NAMES[0]
    statistics = sums.statistics
    arrays = {
        mean: statistics.mean.numpy(),
        covariance: statistics.covariance.numpy(),
        "protocol": np.array(json.dumps(protocol)),
    }
    if sums.spatial is not None:
        arrays |= {"mu_s": sums.spatial.mean.numpy(), "sigma_s": sums.spatial.covariance.numpy()}
    if sums.features:
        arrays["features"] = torch.cat(sums.features).numpy()
    if sums.feature_labels:
        arrays["feature_labels"] = torch.cat(sums.feature_labels).numpy()
    if class_names is not None:
        arrays["class_names"] = np.array(class_names, dtype=np.str_)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
