import io
import json
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs

from meanflow_core.autoencoder import encode_moments, load_autoencoder
from pipelines import encode, latent_store
from pipelines.command import InputError, run_command
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.encode import EncodeJob, EncodeShard, decode_shard
from pipelines.image_reading import find_images


def job(images, output, **options):
    return EncodeJob(images=str(images), output=str(output), vae=str(SHIPPED_AUTOENCODER), image_size=64, **options)


@pytest.fixture
def without_ray(monkeypatch):
    """Runs both stages of the encode in this process: the same two callables, without a cluster between them."""

    def run(job, recipe, folder, vae, shards):
        worker = EncodeShard(dict(vae.config), vae.state_dict(), recipe.moments_shape, job.output, job.batch_size)
        rows = recipe.rows_per_shard
        for shard in shards:
            part = slice(shard * rows, (shard + 1) * rows)
            batch = {"shard": np.array([shard]), "paths": [folder.paths[part]], "labels": [folder.labels[part]]}
            worker(decode_shard(batch, filesystem=fs.LocalFileSystem(), root=folder.root, image_size=64))

    monkeypatch.setattr(encode, "_encode_shards", run)
    monkeypatch.setattr(encode, "start_ray", lambda needed_cpus: None)


def test_latents_are_the_moments_of_image_and_mirror_image(image_root, tmp_path, without_ray):
    manifest = encode.encode(job(image_root / "train", tmp_path / "latents", rows_per_shard=25))
    assert manifest.num_samples == 60
    assert manifest.shard_rows == [25, 25, 10]
    tables = [pq.read_table(path) for path in sorted((tmp_path / "latents" / "shards").iterdir())]
    ids = [sample_id for table in tables for sample_id in table["sample_id"].to_pylist()]
    _, folder = find_images(str(image_root / "train"))
    assert ids == [folder.sample_id(index) for index in range(60)]
    assert [label for table in tables for label in table["label"].to_pylist()] == folder.labels

    row = 7
    from pipelines.image_reading import decode_image

    pixels = torch.from_numpy(decode_image((image_root / "train" / folder.paths[row]).read_bytes(), 64))[None]
    vae = load_autoencoder(str(tmp_path / "latents" / "vae"))
    for column, image in (("moments", pixels), ("moments_mirrored", pixels.flip(2))):
        stored = torch.from_numpy(tables[0][column].combine_chunks().to_numpy_ndarray()[row].copy())
        assert stored.dtype == torch.float16
        torch.testing.assert_close(stored.float(), encode_moments(vae, image)[0], rtol=2e-3, atol=2e-3)
    assert not torch.allclose(
        *(
            torch.from_numpy(tables[0][name].combine_chunks().to_numpy_ndarray()[row])
            for name in tables[0].column_names[:2]
        )
    )


def test_unreadable_images_are_listed_and_the_rest_is_encoded(image_root, tmp_path, without_ray):
    shutil.copytree(image_root / "train", tmp_path / "train")
    victims = sorted((tmp_path / "train").rglob("*.JPEG"))
    victims[0].write_bytes(victims[0].read_bytes()[:300])
    victims[1].write_bytes(b"")
    victims[2].write_text("this is text")
    manifest = encode.encode(job(tmp_path / "train", tmp_path / "latents", rows_per_shard=3))
    assert (manifest.num_samples, manifest.num_rejected) == (57, 3)
    assert manifest.shard_rows[0] == 0  # a shard of which nothing is left
    rejected = pq.read_table(tmp_path / "latents" / "rejected.parquet").to_pylist()
    assert {row["sample_id"] for row in rejected} == {f"d0000000/{path.stem}" for path in victims[:3]}
    assert all(row["reason"] for row in rejected)
    assert len(latent_store.LatentDataset.open(str(tmp_path / "latents"), tmp_path / "cache")) == 57


def test_an_interrupted_job_goes_on_and_a_finished_one_does_nothing(image_root, tmp_path, without_ray, monkeypatch):
    output = tmp_path / "latents"
    encode.encode(job(image_root / "train", output, rows_per_shard=20))
    shards = sorted((output / "shards").iterdir())
    contents = [path.read_bytes() for path in shards]
    (output / "manifest.json").unlink()  # as if the job had been killed before its last two writes
    shards[1].unlink()
    done = []
    run = encode._encode_shards
    monkeypatch.setattr(encode, "_encode_shards", lambda *arguments: (done.append(arguments[-1]), run(*arguments)))
    manifest = encode.encode(job(image_root / "train", output, rows_per_shard=20))
    assert done == [[1]]
    assert [path.read_bytes() for path in shards] == contents
    assert encode.encode(job(image_root / "train", output, rows_per_shard=20)) == manifest
    assert done == [[1]]


def test_output_of_another_autoencoder_or_source_is_refused_and_kept(image_root, tmp_path, without_ray, vae):
    output = tmp_path / "latents"
    encode.encode(job(image_root / "val", output))
    before = (output / "manifest.json").read_text()
    with pytest.raises(InputError, match="was begun in another way .*source_sha256"):
        encode.encode(job(image_root / "train", output))

    other = load_autoencoder(str(SHIPPED_AUTOENCODER))
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    other.save_pretrained(tmp_path / "other_vae")
    wanted = EncodeJob(
        images=str(image_root / "val"), output=str(output), vae=str(tmp_path / "other_vae"), image_size=64
    )
    with pytest.raises(InputError, match="was begun in another way .*vae_sha256"):
        encode.encode(wanted)
    assert (output / "manifest.json").read_text() == before
    assert json.loads(before)["num_samples"] == 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": "nowhere"}, "image folder .*/nowhere does not exist"),
        ({"vae": "no/such-autoencoder-here/at-all"}, "cannot load an autoencoder"),
        ({"image_size": 60}, "must be a multiple of 8"),
    ],
)
def test_unfit_jobs_are_refused_and_nothing_is_written(image_root, tmp_path, options, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = {"images": str(image_root / "val"), "output": str(tmp_path / "out"), "vae": str(SHIPPED_AUTOENCODER)}
    with pytest.raises(InputError, match=words):
        encode.encode(EncodeJob(**{**settings, "image_size": 64, **options}))
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file_is_refused(image_root, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file, but a folder is wanted"):
        encode.encode(job(image_root / "val", tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_shard_metadata_is_read_from_the_footer(tmp_path):
    rejected = [{"sample_id": "a", "reason": "torn"}]
    empty = np.zeros((0, 8, 2, 2), np.float16)
    (tmp_path / "s.parquet").write_bytes(latent_store.shard_bytes(empty, empty, np.zeros(0), [], rejected))
    summary = latent_store.shard_summary(fs.LocalFileSystem(), str(tmp_path / "s.parquet"))
    assert (summary.num_rows, summary.rejected) == (0, rejected)
    assert len(summary.sha256) == 64
    assert pq.read_table(io.BytesIO(latent_store.rejected_bytes([]))).num_rows == 0


@pytest.mark.parametrize("images", ["missing", "empty", "file"])
def test_unfit_folders_end_the_command_in_one_line(tmp_path, monkeypatch, capsys, images):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    arguments = [
        "--images",
        str(tmp_path / images),
        "--output",
        str(tmp_path / "out"),
        "--vae",
        str(SHIPPED_AUTOENCODER),
    ]
    monkeypatch.setattr(sys, "argv", ["encode", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command(encode.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert str(tmp_path / images) in error
    assert not (tmp_path / "out").exists()


def test_storage_that_fails_fails_the_task_and_rejects_no_image(image_root, monkeypatch):
    def broken(filesystem, path):
        raise OSError("connection reset")

    monkeypatch.setattr(encode.storage, "read_bytes", broken)
    batch = {"shard": np.array([0]), "paths": [["d0000000/d0000000_0.JPEG"]], "labels": [[0]]}
    with pytest.raises(OSError, match="connection reset"):
        decode_shard(batch, filesystem=fs.LocalFileSystem(), root=str(image_root / "train"), image_size=64)


def test_images_that_changed_in_place_make_another_dataset(image_root, tmp_path, without_ray):
    shutil.copytree(image_root / "val", tmp_path / "val")
    before = encode.encode(job(tmp_path / "val", tmp_path / "first"))
    path = sorted((tmp_path / "val").rglob("*.JPEG"))[0]
    shutil.copy(sorted((image_root / "train").rglob("*.JPEG"))[-1], path)
    after = encode.encode(job(tmp_path / "val", tmp_path / "second"))
    assert before.content_sha256 != after.content_sha256
    assert before.recipe.source_sha256 != after.recipe.source_sha256


def test_nothing_readable_is_an_error_and_can_be_mended(image_root, tmp_path, without_ray):
    shutil.copytree(image_root / "val", tmp_path / "val")
    paths = sorted((tmp_path / "val").rglob("*.JPEG"))
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(b"\0" * len(content))
    with pytest.raises(InputError, match="none of the 40 images"):
        encode.encode(job(tmp_path / "val", tmp_path / "latents"))
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert encode.encode(job(tmp_path / "val", tmp_path / "latents")).num_samples == 40


def test_relative_output_is_refused_in_a_submitted_job(image_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(InputError, match="--output latents is relative, and a submitted job works in a temporary copy"):
        encode.encode(job(image_root / "val", "latents"))
