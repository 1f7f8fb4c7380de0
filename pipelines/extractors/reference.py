"""Reference files: statistics of real images in an extractor's features, as .npz."""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from meanflow_core.metrics import FeatureStatistics, Gaussian
from pipelines import storage
from pipelines.errors import InputError
from pipelines.images.center_crop import CROP

# Names of mean and covariance: in files of ADM and `meanflow reference`, and in files of MeanFlow's authors.
MOMENT_NAMES = (("mu", "sigma"), ("ref_mu", "ref_sigma"))


@dataclass(frozen=True)
class Reference:
    """Statistics of real images."""

    moments: Gaussian | FeatureStatistics
    spatial: Gaussian | FeatureStatistics | None
    """Moments of the spatial features, for sFID."""
    features: torch.Tensor | None
    """(M, D), for precision and recall."""
    protocol: Mapping[str, Any] | None
    """How the file was made. None for files of other tools, which do not record it."""
    location: str
    sha256: str
    """Hash of the file."""
    has_images: bool = False
    """Whether the file has images (arr_0) for precision and recall, like ADM's."""
    feature_labels: torch.Tensor | None = None
    """(M,) int64: classes of the features, for a linear probe. None if the file has none."""
    class_names: tuple[str, ...] | None = None
    """Name per class label. None if the file has none."""


def read_reference(location: str) -> Reference:
    """Reads a reference file of `meanflow reference`, of ADM, or of MeanFlow's authors.

    ADM's files have mu, sigma, mu_s, sigma_s and arr_0; the authors' have ref_mu and ref_sigma. Raises InputError for a
    missing file, a file with pickles, and a file without mean and covariance.
    """
    filesystem, path = storage.open_storage(location)
    try:
        content = storage.read_bytes(filesystem, path)
    except OSError as error:
        raise InputError(f"no reference {location}; make one with `meanflow reference`") from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            names = set(file.files)
            arrays = {name: file[name] for name in names - {"arr_0"}}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{location} must be an .npz of arrays without pickles, but cannot be read: {error}"
        ) from error
    moments = [gaussian for pair in MOMENT_NAMES if (gaussian := _gaussian(arrays, *pair, location)) is not None]
    if not moments:
        expected = " or ".join(", ".join(pair) for pair in MOMENT_NAMES)
        raise InputError(f"a reference must have the arrays {expected}, but {location} has {', '.join(sorted(names))}")
    return Reference(
        moments=moments[0],
        spatial=_gaussian(arrays, "mu_s", "sigma_s", location),
        features=torch.from_numpy(arrays["features"]) if "features" in arrays else None,
        feature_labels=_feature_labels(arrays, location),
        class_names=tuple(arrays["class_names"].tolist()) if "class_names" in arrays else None,
        protocol=json.loads(str(arrays["protocol"])) if "protocol" in arrays else None,
        location=location,
        sha256=hashlib.sha256(content).hexdigest(),
        has_images="arr_0" in names,
    )


def _gaussian(arrays: Mapping[str, np.ndarray], mean: str, covariance: str, location: str) -> Gaussian | None:
    if mean not in arrays or covariance not in arrays:
        return None
    mu, sigma = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in (mean, covariance))
    if mu.dim() != 1 or sigma.shape != (len(mu), len(mu)):
        raise InputError(
            f"{location}: {mean} and {covariance} must be (D,) and (D, D), but are {tuple(mu.shape)} and "
            f"{tuple(sigma.shape)}"
        )
    return Gaussian(mu, sigma)


def _feature_labels(arrays: Mapping[str, np.ndarray], location: str) -> torch.Tensor | None:
    if "features" not in arrays or "feature_labels" not in arrays:
        return None
    labels = arrays["feature_labels"]
    if labels.shape != (len(arrays["features"]),) or labels.dtype != np.int64:
        raise InputError(
            f"{location}: feature_labels must be int64 ({len(arrays['features'])},), one per feature, but are {labels.dtype} "
            f"{labels.shape}; make the file again with `meanflow reference`"
        )
    return torch.from_numpy(labels)


def reference_protocol(
    extractor: Mapping[str, str], source: Mapping[str, Any], image_size: int, num_images: int
) -> dict:
    """The `protocol` of a reference file: how the file was made."""
    return {
        "extractor": dict(extractor),
        "image_size": image_size,
        "crop": CROP,
        "source": dict(source),
        "num_images": num_images,
    }


def require_same_protocol(
    reference: Reference, extractor: Mapping[str, str], image_size: int, num_features: int
) -> None:
    """Raises InputError if the reference has another extractor, image size or number of features.

    Files of other tools state only their number of features.
    """
    theirs = extractor if reference.protocol is None else reference.protocol["extractor"]
    differences = [
        f"extractor's {key}: {theirs.get(key)} in the reference, {extractor.get(key)} here"
        for key in sorted({*theirs, *extractor})
        if theirs.get(key) != extractor.get(key)
    ]
    if reference.protocol is not None and reference.protocol["image_size"] != image_size:
        differences.append(f"image size: {reference.protocol['image_size']} in the reference, {image_size} here")
    if differences:
        raise InputError(
            f"the reference {reference.location} does not match this evaluation ({'; '.join(differences)}); make one with "
            f"the same extractor and image size by running `meanflow reference`"
        )
    if len(reference.moments.mean) != num_features:
        raise InputError(
            f"the reference {reference.location} has {len(reference.moments.mean)} features, but the extractor "
            f"{extractor['name']} has {num_features}; give the extractor that the reference was made with"
        )
