import json
import pickle

import numpy as np
import pytest
import torch

from meanflow_core.autoencoder import reconstruct
from meanflow_core.metrics import FeatureStatistics, frechet_distance
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.encode.job import EncodeJob
from pipelines.errors import InputError
from pipelines.evaluate import make_reference
from pipelines.evaluate.job import ReferenceJob
from pipelines.evaluate.make_reference import reference_bytes
from pipelines.evaluate.measuring import Measurer
from pipelines.evaluate.real_images import read_evenly
from pipelines.evaluate.sums import SetSums
from pipelines.extractors.reference import read_reference, reference_protocol, require_same_protocol
from pipelines.images.sources import find_images
from pipelines.judge.network import load_judge
from tests.support.latents import encode_without_ray

EXTRACTOR = {"name": "judge", "weights_sha256": "abc"}


def normal(count, seed):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sums():
    parts = normal(60, 0).split(20)
    groups = {group: FeatureStatistics.of(part) for group, part in enumerate(parts)}
    return SetSums("x", groups, spatial=FeatureStatistics.of(normal(60, 1)), features=list(parts[:2]), num_images=60)


def test_a_reference_file_has_standard_names_and_no_pickles(sums, tmp_path):
    path = tmp_path / "reference.npz"
    protocol = reference_protocol(EXTRACTOR, {"images": "here"}, 64, 60)
    path.write_bytes(reference_bytes(sums, protocol))
    with np.load(path, allow_pickle=False) as arrays:
        assert set(arrays.files) == {"mu", "sigma", "mu_s", "sigma_s", "features", "protocol"}
        np.testing.assert_allclose(arrays["mu"], normal(60, 0).double().mean(0), rtol=1e-6)
    reference = read_reference(str(path))
    assert frechet_distance(sums.statistics, reference.moments) == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(reference.spatial.covariance, sums.spatial.covariance)
    assert reference.features.shape == (40, 5)
    assert reference.protocol == json.loads(json.dumps(protocol))


def test_files_of_adm_and_of_the_authors_are_read(tmp_path):
    mu, sigma = np.zeros(5, np.float32), np.eye(5, dtype=np.float32)
    np.savez(
        tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu, sigma_s=2 * sigma, arr_0=np.zeros((4, 8, 8, 3), np.uint8)
    )
    adm = read_reference(str(tmp_path / "adm.npz"))
    assert (adm.protocol, adm.has_images, adm.features) == (None, True, None)
    assert adm.moments.mean.dtype == torch.float64
    assert float(adm.spatial.covariance.trace()) == 10.0
    np.savez(tmp_path / "authors.npz", ref_mu=mu + 1, ref_sigma=sigma)
    authors = read_reference(str(tmp_path / "authors.npz"))
    assert (authors.spatial, authors.has_images) == (None, False)
    assert authors.moments.mean.tolist() == [1.0] * 5


def test_missing_and_invalid_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no reference .*missing.npz; make one with `meanflow reference`"):
        read_reference(str(tmp_path / "missing.npz"))
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    with pytest.raises(InputError, match="must have the arrays mu, sigma or ref_mu, ref_sigma, but .* has mu"):
        read_reference(str(tmp_path / "half.npz"))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"must be \(D,\) and \(D, D\), but are \(3,\) and \(3, 2\)"):
        read_reference(str(tmp_path / "shapes.npz"))
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], dtype=object), sigma=np.zeros(3))
    with pytest.raises(InputError, match="must be an .npz of arrays without pickles"):
        read_reference(str(tmp_path / "pickle.npz"))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(InputError, match="must be an .npz of arrays without pickles"):
        read_reference(str(tmp_path / "torn.npz"))


def test_references_of_another_protocol_are_refused(sums, tmp_path):
    path = tmp_path / "reference.npz"
    path.write_bytes(reference_bytes(sums, reference_protocol(EXTRACTOR, {}, 64, 60)))
    reference = read_reference(str(path))
    require_same_protocol(reference, EXTRACTOR, 64, 5)
    with pytest.raises(InputError, match="weights_sha256: abc in the reference, other here"):
        require_same_protocol(reference, {**EXTRACTOR, "weights_sha256": "other"}, 64, 5)
    with pytest.raises(InputError, match="image size: 64 in the reference, 256 here"):
        require_same_protocol(reference, EXTRACTOR, 256, 5)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(5), sigma=np.eye(5))
    other_tool = read_reference(str(tmp_path / "adm.npz"))
    require_same_protocol(other_tool, EXTRACTOR, 256, 5)  # has no protocol to compare
    with pytest.raises(InputError, match="has 5 features, but the extractor .* has 2048"):
        require_same_protocol(other_tool, EXTRACTOR, 256, 2048)


def test_a_reference_job_requires_exactly_one_source():
    for sources in ({}, {"images": "a", "data": "b"}):
        with pytest.raises(ValueError, match="either --images or --data"):
            ReferenceJob(output="x.npz", **sources)


def measure_here(chunks, config, workers):
    """Replaces measure_sets, without a cluster."""
    worker = Measurer(config, "cpu")
    sums = SetSums("reference")
    for chunk in chunks:
        sums.add(worker.measure(pickle.loads(pickle.dumps(chunk))))
    return {"reference": sums}


def test_references_are_computed_from_images_or_latents_on_any_storage(image_root, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(make_reference, "measure_sets", measure_here)
    monkeypatch.setattr(make_reference, "start_cluster", lambda options: None)
    options = {"extractor": str(SHIPPED_JUDGE), "image_size": 64, "num_features": 12}
    val = str(image_root / "val")
    job = ReferenceJob(output="memory://made/images.npz", images=val, **options)
    protocol = make_reference.make_reference(job)
    assert (protocol["num_images"], protocol["image_size"], protocol["extractor"]["name"]) == (40, 64, "judge")
    reference = read_reference(job.output)
    assert reference.protocol == protocol
    pixels, _ = read_evenly(find_images(val), 64, 40)
    judge = load_judge(SHIPPED_JUDGE)
    expected = judge.predict(pixels).features.double()
    torch.testing.assert_close(reference.moments.mean, expected.mean(0), atol=1e-4, rtol=1e-4)
    assert len(reference.features) == 12

    latents = str(tmp_path / "latents")
    encode_without_ray(
        EncodeJob(
            images=val, output=latents, vae=str(SHIPPED_AUTOENCODER), image_size=64, images_per_shard=9,
            precision="float32",
        )
    )  # fmt: skip
    protocol = make_reference.make_reference(
        ReferenceJob(output=str(tmp_path / "decoded.npz"), data=latents, **options)
    )
    assert (protocol["num_images"], protocol["image_size"]) == (40, 64)
    assert set(protocol["source"]) == {"latents", "sha256", "autoencoder_sha256", "uint8"}
    reference = read_reference(str(tmp_path / "decoded.npz"))
    expected = judge.predict(reconstruct(vae, pixels)).features.double()
    torch.testing.assert_close(reference.moments.mean, expected.mean(0), atol=0.03, rtol=0.01)
    assert len(reference.features) == 12
    assert not (tmp_path / "memory:").exists()
