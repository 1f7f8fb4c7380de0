import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs

from meanflow_core.autoencoder import encode_moments, load_autoencoder
from pipelines.command_line import run_command
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.encode import run as encode_run
from pipelines.encode.job import EncodeJob
from pipelines.encode.stages import EncodeShard, choose_batch_size, decode_shard, write_shard
from pipelines.errors import InputError
from pipelines.images.decoding import decode_image
from pipelines.images.sources import ImageSlice, find_images
from pipelines.latents.cache import open_latents
from pipelines.latents.manifest import read_manifest, shard_name
from pipelines.latents.shards import read_shard
from tests.support.image_forms import as_samples, images_of, write_parquet, write_tar
from tests.support.latents import assert_same, by_stem, encode_in_process, read_shards


def job(images, output, **options):
    return EncodeJob(images=str(images), output=str(output), vae=str(SHIPPED_AUTOENCODER), image_size=64, **options)


@pytest.fixture
def without_ray(monkeypatch):
    """Runs the stages of the encode in this process."""
    monkeypatch.setattr(encode_run, "_encode_shards", encode_in_process)
    monkeypatch.setattr(encode_run, "_map_on_cluster", map)
    monkeypatch.setattr(encode_run, "start_ray", lambda needed_cpus: None)


def test_latents_are_the_moments_of_image_and_mirror_image(image_root, tmp_path, without_ray):
    manifest = encode_run.encode(job(image_root / "train", tmp_path / "latents", rows_per_shard=25))
    assert manifest.num_samples == 60
    assert manifest.shard_rows == [25, 25, 10]
    shards = read_shards(tmp_path / "latents")
    _, listing, index = find_images(str(image_root / "train"))
    ids = [sample_id for shard in shards for sample_id in shard.sample_ids]
    assert ids == index.entries["sample_id"].to_pylist()
    labels = [label for shard in shards for label in shard.labels.tolist()]
    assert labels == index.entries["label"].to_pylist()
    assert [shard.content_sha256() for shard in shards] == manifest.shard_sha256

    row = 7
    pixels = torch.from_numpy(decode_image((image_root / "train" / listing.files[row]).read_bytes(), 64))[None]
    vae = load_autoencoder(str(tmp_path / "latents" / "vae"))
    for stored, image in ((shards[0].moments, pixels), (shards[0].moments_mirrored, pixels.flip(2))):
        assert stored.dtype == np.float16
        torch.testing.assert_close(
            torch.from_numpy(stored[row].astype(np.float32)), encode_moments(vae, image)[0], rtol=2e-3, atol=2e-3
        )
    assert not np.allclose(shards[0].moments[row], shards[0].moments_mirrored[row])


def test_folders_parquet_and_webdataset_give_the_same_latents(image_root, tmp_path, without_ray):
    images = images_of(image_root / "val")
    rows = [(name.split("/")[1], label, content) for name, label, content in images]
    write_parquet(tmp_path / "parquet/train-0.parquet", rows[:23])
    write_parquet(tmp_path / "parquet/train-1.parquet", rows[23:])
    for part, chunk in enumerate((images[:11], images[11:])):
        write_tar(tmp_path / f"tars/train-{part}.tar", as_samples(chunk))
    encode_run.encode(job(image_root / "val", tmp_path / "folders_out", rows_per_shard=9))
    encode_run.encode(job(tmp_path / "parquet", tmp_path / "parquet_out", rows_per_shard=13))
    encode_run.encode(job(tmp_path / "tars", tmp_path / "tars_out", rows_per_shard=40))
    assert len(by_stem(tmp_path / "folders_out")) == 40
    for output in ("parquet_out", "tars_out"):
        assert_same(tmp_path / output, tmp_path / "folders_out")


def test_mirror_images_may_be_left_out(image_root, tmp_path, without_ray):
    manifest = encode_run.encode(job(image_root / "val", tmp_path / "latents", mirror=False))
    assert not manifest.recipe.mirrored
    store = open_latents(str(tmp_path / "latents"), str(tmp_path / "cache"))
    assert store.moments_mirrored is None
    moments, _ = store.rows(np.arange(40), np.ones(40, bool))
    np.testing.assert_array_equal(moments, np.concatenate(store.moments))


def test_limit_takes_images_of_all_classes(image_root, tmp_path, without_ray):
    manifest = encode_run.encode(job(image_root / "train", tmp_path / "latents", limit=20, rows_per_shard=8))
    assert manifest.num_samples == 20
    labels = np.concatenate([shard.labels for shard in read_shards(tmp_path / "latents")])
    assert sorted(set(labels.tolist())) == list(range(10))
    assert manifest.class_names[8] == "star"
    assert encode_run.encode(job(image_root / "val", tmp_path / "more", limit=1000)).num_samples == 40


def test_bfloat16_is_near_float32_and_another_recipe(image_root, tmp_path, without_ray):
    encode_run.encode(job(image_root / "val", tmp_path / "exact"))
    encode_run.encode(job(image_root / "val", tmp_path / "rough", precision="bfloat16"))
    exact, rough = (read_shards(tmp_path / name)[0].moments.astype(np.float64) for name in ("exact", "rough"))
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 2e-2
    with pytest.raises(InputError, match="was begun in another way .*precision tf32 there, float16 now"):
        encode_run.encode(job(image_root / "val", tmp_path / "exact", precision="float16"))


def test_too_many_unreadable_images_fail_at_the_end_and_the_work_is_kept(
    image_root, tmp_path, without_ray, monkeypatch
):
    shutil.copytree(image_root / "val", tmp_path / "val")
    for path in sorted((tmp_path / "val").rglob("*.JPEG"))[:2]:
        path.write_text("this is text")
    wanted = (
        r"2 of 40 images \(5\.00%\) cannot be read, more than --max-rejected-fraction 0\.001 .*2 UnidentifiedImageError"
    )
    with pytest.raises(InputError, match=wanted):
        encode_run.encode(job(tmp_path / "val", tmp_path / "latents"))
    assert len(pq.read_table(tmp_path / "latents/rejected.parquet")) == 2
    with pytest.raises(InputError, match=r"no manifest\.json"):
        read_manifest(str(tmp_path / "latents"))
    monkeypatch.setattr(encode_run, "_encode_shards", None)  # nothing is left to encode
    manifest = encode_run.encode(job(tmp_path / "val", tmp_path / "latents", max_rejected_fraction=0.05))
    assert (manifest.num_samples, manifest.num_rejected) == (38, 2)


def test_image_whose_moments_float16_cannot_hold_is_rejected(tmp_path):
    moments = np.ones((3, 8, 2, 2), np.float16)
    mirrored = moments.copy()
    mirrored[1, 0, 0, 0] = np.inf
    batch = {
        "shard": np.zeros(3, int), "label": np.arange(3), "sample_id": np.array(list("abc"), object),
        "error": np.array(["", "", ""], object), "moments": moments, "moments_mirrored": mirrored,
    }  # fmt: skip
    counts = write_shard(batch, output=str(tmp_path))
    assert (counts["images"][0], counts["rejected"][0]) == (2, 1)
    shard = read_shard(fs.LocalFileSystem(), str(tmp_path / shard_name(0)))
    assert shard.sample_ids == ["a", "c"]
    assert shard.summary.rejected[0]["sample_id"] == "b"


def test_shard_that_is_there_stays_as_it_is(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / shard_name(0)).write_bytes(b"whole")
    moments = np.ones((1, 8, 2, 2), np.float16)
    write_shard(
        {"shard": np.zeros(1, int), "label": np.zeros(1, int), "sample_id": np.array(["a"], object),
         "error": np.array([""], object), "moments": moments}, output=str(tmp_path),
    )  # fmt: skip
    assert (tmp_path / shard_name(0)).read_bytes() == b"whole"


def test_device_that_runs_out_of_memory_goes_on_with_smaller_batches(image_root, tmp_path, without_ray, monkeypatch):
    sizes = []

    def tight(vae, images):
        sizes.append(len(images))
        if len(images) > 4:
            raise torch.OutOfMemoryError("too large")
        return encode_moments(vae, images)

    monkeypatch.setattr(encode_run, "encode_moments", tight)
    assert encode_run.encode(job(image_root / "val", tmp_path / "latents", batch_size=16)).num_samples == 40
    assert sizes[:3] == [16, 8, 4]
    assert max(sizes[2:]) == 4


def test_batch_size_of_a_cpu_shrinks_with_the_images(vae):
    sizes = {side: choose_batch_size(vae, torch.zeros(1, side, side, 3)) for side in (64, 256, 512, 1024)}
    assert sizes == {64: 64, 256: 8, 512: 2, 1024: 1}


def test_leftovers_of_killed_writers_are_deleted_in_the_end(image_root, tmp_path, without_ray):
    output = tmp_path / "latents"
    (output / "shards").mkdir(parents=True)
    torn = output / "shards" / "shard-00000.arrow.0123.partial"
    torn.write_bytes(b"half")
    assert encode_run.encode(job(image_root / "val", output)).num_samples == 40
    assert not torn.exists()


def test_shard_of_another_number_of_images_is_no_part_of_the_dataset(image_root, tmp_path, without_ray):
    output = tmp_path / "latents"
    encode_run.encode(job(image_root / "val", output, rows_per_shard=16))
    (output / "manifest.json").unlink()
    shutil.copy(output / shard_name(2), output / shard_name(1))
    with pytest.raises(InputError, match=r"shard-00001\.arrow is of 8 images, but of 16 in the plan"):
        encode_run.encode(job(image_root / "val", output, rows_per_shard=16))
    (output / shard_name(1)).write_bytes(b"")
    with pytest.raises(InputError, match=r"shard-00001\.arrow is damaged .*; delete it and run again"):
        encode_run.encode(job(image_root / "val", output, rows_per_shard=16))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"torn")], ids=["missing", "torn"])
def test_what_a_node_says_of_a_corrupt_shard_mends_the_dataset(image_root, tmp_path, without_ray, damage):
    output, wanted = tmp_path / "latents", job(image_root / "val", tmp_path / "latents", rows_per_shard=16)
    whole = encode_run.encode(wanted)
    damage(output / shard_name(1))
    with pytest.raises(
        InputError, match=r"shard-00001\.arrow .*delete it and manifest\.json and run pipelines\.encode"
    ):
        open_latents(str(output), str(tmp_path / "cache"))
    kept = (output / shard_name(0)).stat().st_mtime_ns
    (output / shard_name(1)).unlink(missing_ok=True)
    (output / "manifest.json").unlink()
    assert encode_run.encode(wanted) == whole
    assert (output / shard_name(0)).stat().st_mtime_ns == kept
    assert len(open_latents(str(output), str(tmp_path / "cache"))) == 40


def test_a_damaged_manifest_is_made_again_once_it_is_deleted(image_root, tmp_path, without_ray):
    output, wanted = tmp_path / "latents", job(image_root / "val", tmp_path / "latents")
    whole = encode_run.encode(wanted)
    (output / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is damaged .*; delete it and run pipelines\.encode again"):
        encode_run.encode(wanted)
    (output / "manifest.json").unlink()
    assert encode_run.encode(wanted) == whole


def test_unreadable_images_are_listed_and_the_rest_is_encoded(image_root, tmp_path, without_ray):
    shutil.copytree(image_root / "train", tmp_path / "train")
    victims = sorted((tmp_path / "train").rglob("*.JPEG"))
    victims[0].write_bytes(victims[0].read_bytes()[:300])
    victims[1].write_bytes(b"")
    victims[2].write_text("this is text")
    manifest = encode_run.encode(
        job(tmp_path / "train", tmp_path / "latents", rows_per_shard=3, max_rejected_fraction=0.05)
    )
    assert (manifest.num_samples, manifest.num_rejected) == (57, 3)
    assert manifest.shard_rows[0] == 0  # a shard of which nothing is left
    rejected = pq.read_table(tmp_path / "latents" / "rejected.parquet").to_pylist()
    assert {row["sample_id"] for row in rejected} == {f"d0000000/{path.stem}" for path in victims[:3]}
    assert all(row["reason"] for row in rejected)
    assert len(open_latents(str(tmp_path / "latents"), str(tmp_path / "cache"))) == 57


def test_an_interrupted_job_goes_on_and_a_finished_one_does_nothing(image_root, tmp_path, without_ray, monkeypatch):
    output = tmp_path / "latents"
    encode_run.encode(job(image_root / "train", output, rows_per_shard=20))
    shards = sorted((output / "shards").iterdir())
    contents = [path.read_bytes() for path in shards]
    (output / "manifest.json").unlink()  # as if the job had been killed before its last two writes
    shards[1].unlink()
    done = []
    run = encode_run._encode_shards
    monkeypatch.setattr(encode_run, "_encode_shards", lambda *arguments: (done.append(arguments[-1]), run(*arguments)))
    manifest = encode_run.encode(job(image_root / "train", output, rows_per_shard=20))
    assert done == [[1]]
    assert [path.read_bytes() for path in shards] == contents
    assert encode_run.encode(job(image_root / "train", output, rows_per_shard=20)) == manifest
    assert done == [[1]]


def test_output_of_another_autoencoder_or_source_is_refused_and_kept(image_root, tmp_path, without_ray, vae):
    output = tmp_path / "latents"
    encode_run.encode(job(image_root / "val", output))
    before = (output / "manifest.json").read_text()
    with pytest.raises(InputError, match="was begun in another way .*source_sha256"):
        encode_run.encode(job(image_root / "train", output))

    other = load_autoencoder(str(SHIPPED_AUTOENCODER))
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    other.save_pretrained(tmp_path / "other_vae")
    wanted = EncodeJob(
        images=str(image_root / "val"), output=str(output), vae=str(tmp_path / "other_vae"), image_size=64
    )
    with pytest.raises(InputError, match="was begun in another way .*vae_sha256"):
        encode_run.encode(wanted)
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
        encode_run.encode(EncodeJob(**{**settings, "image_size": 64, **options}))
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file_is_refused(image_root, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file, but must be a folder"):
        encode_run.encode(job(image_root / "val", tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


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
        run_command(encode_run.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert str(tmp_path / images) in error
    assert not (tmp_path / "out").exists()


def test_storage_that_fails_fails_the_task_and_rejects_no_image(image_root, monkeypatch):
    def broken(filesystem, path):
        raise OSError("connection reset")

    images = pickle.dumps(ImageSlice.of(*find_images(str(image_root / "val")), np.arange(3)))
    monkeypatch.setattr("pipelines.storage.read_bytes", broken)
    with pytest.raises(OSError, match="connection reset"):
        decode_shard({"shard": np.array([0]), "images": [images]}, image_size=64)


def test_images_that_changed_in_place_make_another_dataset(image_root, tmp_path, without_ray):
    shutil.copytree(image_root / "val", tmp_path / "val")
    before = encode_run.encode(job(tmp_path / "val", tmp_path / "first"))
    path = sorted((tmp_path / "val").rglob("*.JPEG"))[0]
    shutil.copy(sorted((image_root / "train").rglob("*.JPEG"))[-1], path)
    after = encode_run.encode(job(tmp_path / "val", tmp_path / "second"))
    assert before.content_sha256 != after.content_sha256
    assert before.recipe.source_sha256 != after.recipe.source_sha256


def test_nothing_readable_is_an_error_and_can_be_mended(image_root, tmp_path, without_ray):
    shutil.copytree(image_root / "val", tmp_path / "val")
    paths = sorted((tmp_path / "val").rglob("*.JPEG"))
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(b"\0" * len(content))
    with pytest.raises(InputError, match="none of the 40 images"):
        encode_run.encode(job(tmp_path / "val", tmp_path / "latents"))
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert encode_run.encode(job(tmp_path / "val", tmp_path / "latents")).num_samples == 40


def test_relative_output_is_refused_in_a_submitted_job(image_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(InputError, match="--output latents is relative, and a submitted job works in a temporary copy"):
        encode_run.encode(job(image_root / "val", "latents"))


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor wants a C++ compiler, and g++ is not here")
def test_compiled_autoencoder_gives_the_same_moments(image_root, tmp_path, without_ray):
    encode_run.encode(job(image_root / "val", tmp_path / "plain"))
    encoder = EncodeShard(str(tmp_path / "plain"), "cpu", compiled=True, batch_size=16)
    images = ImageSlice.of(*find_images(str(image_root / "val")))
    batch = encoder(decode_shard({"shard": np.array([0]), "images": [pickle.dumps(images)]}, image_size=64))
    shard = read_shards(tmp_path / "plain")[0]
    for name in ("moments", "moments_mirrored"):
        np.testing.assert_allclose(batch[name], getattr(shard, name), rtol=4e-3, atol=1e-3)
