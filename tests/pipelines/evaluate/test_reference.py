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
from pipelines.evaluate import measuring, reference
from pipelines.evaluate.judge import load_judge
from pipelines.evaluate.reference import (
    ReferenceJob,
    absolute_extractor,
    disagreements,
    make_reference,
    protocol_of,
    read_reference,
    reference_bytes,
    require_same_rules,
)
from pipelines.evaluate.run import read_evenly
from pipelines.images.sources import find_images
from tests.support.latents import encode_here

EXTRACTOR = {"name": "judge", "weights_sha256": "abc"}


def normal(count, seed):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def measured():
    parts = normal(60, 0).split(20)
    groups = {group: FeatureStatistics.of(rows) for group, rows in enumerate(parts)}
    spatial = FeatureStatistics.of(normal(60, 1))
    return measuring.Measured("reference", groups=groups, spatial=spatial, features=list(parts[:2]), num_rows=60)


@pytest.mark.parametrize(("layout", "keys"), [("adm", {"mu", "sigma"}), ("meanflow", {"ref_mu", "ref_sigma"})])
def test_file_holds_the_field_s_names_and_no_pickles(measured, tmp_path, layout, keys):
    protocol = protocol_of(EXTRACTOR, {"images": "here"}, 64, 60)
    (tmp_path / "reference.npz").write_bytes(reference_bytes(measured, protocol, layout))
    with np.load(tmp_path / "reference.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == keys | {"mu_s", "sigma_s", "features", "protocol"}
        np.testing.assert_allclose(arrays[min(keys)], normal(60, 0).double().mean(0), rtol=1e-6)
    opened = read_reference(str(tmp_path / "reference.npz"))
    assert frechet_distance(measured.statistics, opened.moments) == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(opened.spatial.covariance, measured.spatial.covariance)
    assert opened.features.shape == (40, 5)
    assert opened.protocol == json.loads(json.dumps(protocol))


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


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no reference .*missing.npz: python -m pipelines.reference writes one"):
        read_reference(str(tmp_path / "missing.npz"))
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    with pytest.raises(InputError, match="holds mu, but a reference holds mu, sigma or ref_mu, ref_sigma"):
        read_reference(str(tmp_path / "half.npz"))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"must be \(D,\) and \(D, D\), but are \(3,\) and \(3, 2\)"):
        read_reference(str(tmp_path / "shapes.npz"))
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], dtype=object), sigma=np.zeros(3))
    with pytest.raises(InputError, match="is no .npz of plain arrays"):
        read_reference(str(tmp_path / "pickle.npz"))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(InputError, match="is no .npz of plain arrays"):
        read_reference(str(tmp_path / "torn.npz"))


def test_reference_of_other_rules_is_refused_and_one_that_says_nothing_is_not(measured, tmp_path):
    path = tmp_path / "reference.npz"
    path.write_bytes(reference_bytes(measured, protocol_of(EXTRACTOR, {}, 64, 60)))
    opened = read_reference(str(path))
    require_same_rules(opened, EXTRACTOR, 64, 5)
    with pytest.raises(InputError, match="weights_sha256: abc in the reference, other here"):
        require_same_rules(opened, {**EXTRACTOR, "weights_sha256": "other"}, 64, 5)
    with pytest.raises(InputError, match="image size: 64 in the reference, 256 here"):
        require_same_rules(opened, EXTRACTOR, 256, 5)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(5), sigma=np.eye(5))
    silent = read_reference(str(tmp_path / "adm.npz"))
    assert disagreements(silent, EXTRACTOR, 256) == []
    with pytest.raises(InputError, match="is of 5 features, but the extractor .* has 2048"):
        require_same_rules(silent, EXTRACTOR, 256, 2048)


def test_job_wants_one_source():
    with pytest.raises(ValueError, match="either --images or --data"):
        ReferenceJob(output="x.npz")
    with pytest.raises(ValueError, match="either --images or --data"):
        ReferenceJob(output="x.npz", images="a", data="b")


def test_known_extractors_are_no_folders_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("inception", "judge"):
        (tmp_path / name).mkdir()
    assert absolute_extractor("inception") == "inception"
    assert absolute_extractor("judge") == str(tmp_path / "judge")


def measure_here(chunks, plan, **_):
    """In place of `measuring.measure_sets`: the same callable, without a cluster."""
    worker = measuring.Measurer(plan, "cpu")
    whole = measuring.Measured("reference")
    for chunk in chunks:
        whole.add(worker.measure(pickle.loads(pickle.dumps(chunk))))
    return {"reference": whole}


def test_references_of_images_and_of_their_latents_on_any_storage(image_root, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "measure_sets", measure_here)
    monkeypatch.setattr(reference, "start_ray", lambda needed_cpus: None)
    monkeypatch.setattr(reference, "choose_gpus", lambda *_: False)
    source = {"image_size": 64, "num_workers": 1, "num_features": 12}
    made = make_reference(ReferenceJob(output="memory://made/images.npz", images=str(image_root / "val"), **source))
    assert (made["num_images"], made["image_size"], made["extractor"]["name"]) == (40, 64, "judge")
    opened = read_reference("memory://made/images.npz")
    assert opened.protocol == made
    pixels, _ = read_evenly(find_images(str(image_root / "val")), 64, 40)
    judge = load_judge(SHIPPED_JUDGE)
    torch.testing.assert_close(
        opened.moments.mean, judge.look_at(pixels).features.double().mean(0), atol=1e-4, rtol=1e-4
    )
    assert len(opened.features) == 12

    encoding = EncodeJob(
        images=str(image_root / "val"), output=str(tmp_path / "latents"), vae=str(SHIPPED_AUTOENCODER), image_size=64,
        rows_per_shard=9, precision="float32",
    )  # fmt: skip
    encode_here(encoding)
    made = make_reference(ReferenceJob(output=str(tmp_path / "decoded.npz"), data=str(tmp_path / "latents"), **source))
    assert (made["num_images"], made["image_size"]) == (40, 64)
    assert set(made["source"]) == {"latents", "sha256", "autoencoder_sha256", "uint8"}
    opened = read_reference(str(tmp_path / "decoded.npz"))
    rebuilt = judge.look_at(reconstruct(vae, pixels)).features.double()
    torch.testing.assert_close(opened.moments.mean, rebuilt.mean(0), atol=0.03, rtol=0.01)
    assert len(opened.features) == 12
    assert not (tmp_path / "memory:").exists()
