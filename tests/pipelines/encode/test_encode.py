import random
import shutil
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from meanflow_core.autoencoder import decode_latents, encode_moments, load_autoencoder
from meanflow_core.latents import LatentNormalization
from pipelines.command_line import run_command
from pipelines.encode import run as encode_run
from pipelines.encode.__main__ import main
from pipelines.encode.job import EncodeJob
from pipelines.encode.run import encode
from pipelines.errors import InputError
from pipelines.images.decoding import decode_image
from pipelines.images.sources import find_images
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.cache import open_latents
from pipelines.latents.manifest import MANIFEST, read_manifest, shard_name
from tests.support.counted_storage import count_storage
from tests.support.image_formats import (
    IDX_LABELS,
    IDX_PIXELS,
    images_of,
    webdataset_members,
    write_idx,
    write_parquet,
    write_tar,
)
from tests.support.latents import (
    assert_same,
    by_stem,
    encode_job,
    encode_shards_without_ray,
    encode_without_ray,
    read_shards,
)


@pytest.fixture(scope="module")
def encoded(image_root, tmp_path_factory):
    """The dataset of the 40 held-out images in three shards. Tests must not change it."""
    output = tmp_path_factory.mktemp("encoded") / "latents"
    encode_without_ray(encode_job(image_root / "val", output, images_per_shard=16))
    return output


@pytest.fixture
def copied(image_root, encoded, tmp_path):
    """The job of a copy of `encoded`, which tests may damage."""
    shutil.copytree(encoded, tmp_path / "latents")
    return encode_job(image_root / "val", tmp_path / "latents", images_per_shard=16)


def test_shards_contain_the_moments_of_images_and_mirror_images(image_root, encoded):
    manifest, shards = read_manifest(str(encoded)), read_shards(encoded)
    assert manifest.shard_num_samples == [16, 16, 8]
    _, listing, index = find_images(str(image_root / "val"))
    assert [name for shard in shards for name in shard.sample_ids] == index.entries["sample_id"].to_pylist()
    assert np.concatenate([shard.labels for shard in shards]).tolist() == index.entries["label"].to_pylist()
    assert [shard.content_sha256() for shard in shards] == manifest.shard_sha256

    row = 7
    pixels = torch.from_numpy(decode_image((image_root / "val" / listing.files[row]).read_bytes(), 64))[None]
    vae = load_autoencoder(str(encoded / "vae"))
    for stored, image in ((shards[0].moments, pixels), (shards[0].moments_mirrored, pixels.flip(2))):
        assert stored.dtype == np.float16
        expected = encode_moments(vae, image)[0]
        torch.testing.assert_close(torch.from_numpy(stored[row].astype(np.float32)), expected, rtol=2e-3, atol=2e-3)
    assert not np.allclose(shards[0].moments[row], shards[0].moments_mirrored[row])


def test_folders_parquet_and_webdataset_give_the_same_latents(image_root, encoded, tmp_path):
    images = images_of(image_root / "val")
    rows = [(name.split("/")[1], label, content) for name, label, content in images]
    write_parquet(tmp_path / "parquet/train-0.parquet", rows[:23])
    write_parquet(tmp_path / "parquet/train-1.parquet", rows[23:])
    for part, chunk in enumerate((images[:11], images[11:])):
        write_tar(tmp_path / f"tars/train-{part}.tar", webdataset_members(chunk))
    encode_without_ray(encode_job(tmp_path / "parquet", tmp_path / "parquet_out", images_per_shard=13))
    encode_without_ray(encode_job(tmp_path / "tars", tmp_path / "tars_out", images_per_shard=40))
    assert len(by_stem(encoded)) == 40
    for output in ("parquet_out", "tars_out"):
        assert_same(tmp_path / output, encoded)


def test_limit_selects_images_of_all_classes_and_mirror_images_are_optional(image_root, tmp_path):
    job = encode_job(image_root / "train", tmp_path / "latents", limit=20, images_per_shard=8, mirror=False)
    manifest = encode_without_ray(job)
    assert (manifest.num_samples, manifest.class_names[8], manifest.recipe.mirrored) == (20, "star", False)
    latents = open_latents(str(tmp_path / "latents"), str(tmp_path / "cache"))
    assert sorted(set(latents.labels.tolist())) == list(range(10))
    assert latents.moments_mirrored is None
    moments, _ = latents.read(np.arange(20), np.ones(20, bool))
    np.testing.assert_array_equal(moments, np.concatenate(latents.moments))


@pytest.mark.parametrize(("name", "max_read"), [("parquet", 6 * 7), ("tars", 10)])
def test_limited_job_reads_few_images_besides_its_own(tmp_path, monkeypatch, name, max_read):
    # 5 classes of 12 incompressible images of 250 kB, sorted by class, in 9 row groups
    images = [(str(row), row // 12, random.Random(row).randbytes(250_000)) for row in range(60)]
    write_parquet(tmp_path / "parquet/train-0.parquet", images)
    write_tar(tmp_path / "tars/train-0.tar", webdataset_members(images))
    counted = count_storage(monkeypatch)

    def read(job, plan, shards, **options):
        slices = [plan.images(shard) for shard in shards]
        counted.num_bytes = 0
        assert sum(isinstance(content, bytes) for images in slices for content in images.read()) == 10
        assert counted.num_bytes < max_read * 251_000
        labels = [label for images in slices for label in images.entries["label"].to_pylist()]
        assert labels == [label for label in range(5) for _ in range(2)]
        encode_shards_without_ray(job, plan, shards, **options)

    with pytest.raises(InputError, match="none of the 10 images"):  # they are not real ones
        encode_without_ray(encode_job(tmp_path / name, tmp_path / "latents", limit=10, images_per_shard=4), read)


def test_limit_above_the_number_of_images_is_ignored(image_root, tmp_path):
    job = encode_job(image_root / "val", tmp_path / "latents", limit=1000, images_per_shard=16)
    assert encode_without_ray(job).shard_num_samples == [16, 16, 8]


def test_interrupted_job_encodes_the_missing_shards_only(copied, tmp_path):
    output = tmp_path / "latents"
    complete, before = read_manifest(copied.output), [path.read_bytes() for path in sorted(output.glob("shards/*"))]
    (output / MANIFEST).unlink()
    (output / shard_name(1)).unlink()
    (output / "shards/shard-00001.arrow.0123.partial").write_bytes(b"half")
    encoded_shards = []

    def record(job, plan, shards, **options):
        encoded_shards.append(shards)
        encode_shards_without_ray(job, plan, shards, **options)

    assert encode_without_ray(copied, record) == complete
    assert encoded_shards == [[1]]
    assert [path.read_bytes() for path in sorted(output.glob("shards/*"))] == before
    assert encode_without_ray(copied, record) == complete  # nothing is missing
    assert encoded_shards == [[1]]


def test_damaged_index_is_written_again(copied, tmp_path):
    complete, index = read_manifest(copied.output), tmp_path / "latents/index.parquet"
    content = index.read_bytes()
    index.write_bytes(content[:-9])
    (tmp_path / "latents" / MANIFEST).unlink()
    assert encode_without_ray(copied, encode_shards=None) == complete
    assert index.read_bytes() == content


def test_too_many_unreadable_images_fail_and_repeating_with_a_larger_fraction_completes(image_root, tmp_path):
    images, output = tmp_path / "val", tmp_path / "latents"
    shutil.copytree(image_root / "val", images)
    unreadable = sorted(images.rglob("*.JPEG"))[:3]
    unreadable[0].write_bytes(unreadable[0].read_bytes()[:300])
    unreadable[1].write_bytes(b"")
    unreadable[2].write_text("this is text")
    message = (
        r"3 of 40 images \(7\.50%\) cannot be used, more than --max-rejected-fraction 0\.001 .*UnidentifiedImageError"
        r".*by --max-rejected-fraction 0\.075$"
    )
    with pytest.raises(InputError, match=message):
        encode_without_ray(encode_job(images, output, images_per_shard=3))
    rejected = pq.read_table(output / "rejected.parquet").to_pylist()
    assert {image["sample_id"] for image in rejected} == {f"d0000000/{path.stem}" for path in unreadable}
    assert all(image["reason"] for image in rejected)
    with pytest.raises(InputError, match=r"no manifest\.json"):
        read_manifest(str(output))

    job = encode_job(images, output, images_per_shard=3, max_rejected_fraction=0.075)  # as the message says
    manifest = encode_without_ray(job, encode_shards=None)  # no shard is missing
    assert (manifest.num_samples, manifest.num_rejected) == (37, 3)
    assert manifest.shard_num_samples[0] == 0
    assert len(open_latents(str(output), str(tmp_path / "cache"))) == 37


def test_two_unreadable_images_are_left_out_of_a_set_of_any_size(image_root, tmp_path):
    images, output = tmp_path / "val", tmp_path / "latents"
    shutil.copytree(image_root / "val", images)
    for path in sorted(images.rglob("*.JPEG"))[:2]:
        path.write_bytes(b"")
    manifest = encode_without_ray(encode_job(images, output, images_per_shard=3))
    assert (manifest.num_samples, manifest.num_rejected) == (38, 2)


@pytest.mark.parametrize(("kind", "free", "is_told"), [("CPU", 1.5, True), ("GPU", 0.0, True), ("CPU", 3.0, False)])
def test_a_busy_cluster_is_named(kind, free, is_told, monkeypatch, caplog):
    monkeypatch.setattr(encode_run.ray, "available_resources", lambda: {kind: free} if free else {})
    encode_run._warn_if_busy(kind, 3)
    assert (f"encoding needs 3 {kind}s, but only {free:g} are free" in caplog.text) == is_told


def test_images_are_read_again_after_none_could_be_read(image_root, tmp_path):
    images = tmp_path / "val"
    shutil.copytree(image_root / "val", images)
    contents = {path: path.read_bytes() for path in images.rglob("*.JPEG")}
    for path, content in contents.items():
        path.write_bytes(bytes(len(content)))
    job = encode_job(images, tmp_path / "latents", limit=4)
    with pytest.raises(InputError, match="none of the 4 images"):
        encode_without_ray(job)
    for path, content in contents.items():
        path.write_bytes(content)
    assert encode_without_ray(job).num_samples == 4


def test_damaged_shard_is_replaced_as_the_error_of_a_node_says(copied, tmp_path):
    output, complete = tmp_path / "latents", read_manifest(copied.output)
    (output / shard_name(1)).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"shard-00001\.arrow .*delete it and manifest\.json and run `meanflow encode"):
        open_latents(str(output), str(tmp_path / "cache"))
    (output / shard_name(1)).unlink()
    (output / MANIFEST).unlink()
    assert encode_without_ray(copied) == complete
    assert len(open_latents(str(output), str(tmp_path / "cache"))) == 40


def test_damaged_manifest_is_written_again_after_deleting_it(copied, tmp_path):
    complete = read_manifest(copied.output)
    (tmp_path / "latents" / MANIFEST).write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is damaged .*; delete it and run `meanflow encode` again"):
        encode_without_ray(copied)
    (tmp_path / "latents" / MANIFEST).unlink()
    assert encode_without_ray(copied, encode_shards=None) == complete


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.copy(path.with_name("shard-00002.arrow"), path), "has 8 images instead of 16"),
        (lambda path: path.write_bytes(b""), "is damaged"),
    ],
    ids=["another size", "empty"],
)
def test_invalid_shard_prevents_the_manifest(copied, tmp_path, damage, message):
    (tmp_path / "latents" / MANIFEST).unlink()
    damage(tmp_path / "latents" / shard_name(1))
    with pytest.raises(InputError, match=rf"shard-00001\.arrow {message}.*; delete it and run again"):
        encode_without_ray(copied)


def test_output_of_another_recipe_is_refused_and_kept(copied, image_root, tmp_path):
    before = (tmp_path / "latents" / MANIFEST).read_text()
    other_vae = load_autoencoder(copied.vae)
    with torch.no_grad():
        next(other_vae.parameters()).add_(0.1)
    other_vae.save_pretrained(tmp_path / "other_vae")
    for name, options in {
        "source_sha256": {"images": str(image_root / "train")},
        "vae_sha256": {"vae": str(tmp_path / "other_vae")},
        "precision is tf32, not float16": {"precision": "float16"},
    }.items():
        with pytest.raises(InputError, match=f"contains another encoding .*{name}"):
            encode_without_ray(replace(copied, **options))
    assert (tmp_path / "latents" / MANIFEST).read_text() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "nowhere"}, "image folder .*/nowhere does not exist"),
        ({"vae": "no/such-autoencoder-here/at-all"}, "cannot load an autoencoder"),
        ({"image_size": 60}, "must be a multiple of 8"),
    ],
)
def test_invalid_job_is_refused_and_nothing_is_written(image_root, tmp_path, options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=message):
        encode(encode_job(**{"images": image_root / "val", "output": tmp_path / "out", **options}))
    assert not (tmp_path / "out").exists()


def test_output_must_be_a_folder_and_absolute_in_a_submitted_job(image_root, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="is a file, but must be a folder"):
        encode(encode_job(image_root / "val", tmp_path / "out"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(InputError, match="--output latents is relative, but a submitted job"):
        encode(encode_job(image_root / "val", "latents"))


def test_command_reports_invalid_input_in_one_line(tmp_path, monkeypatch, capsys):
    arguments = ["--images", str(tmp_path / "missing"), "--output", str(tmp_path / "out"), "--vae", "none"]
    monkeypatch.setattr(sys, "argv", ["encode", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert str(tmp_path / "missing") in error


def test_pixels_of_idx_files_are_stored_exactly_and_normalized_by_the_images(tmp_path):
    write_idx(tmp_path / "fashion", compressed=True)
    job = EncodeJob(
        images=str(tmp_path / "fashion"), output=str(tmp_path / "latents"), vae="pixels", image_size=20, mirror=False
    )
    manifest = encode_without_ray(job)
    assert (manifest.latent_shape, manifest.num_samples) == ((1, 20, 20), len(IDX_LABELS))
    [shard] = read_shards(job.output)
    assert shard.labels.tolist() == IDX_LABELS.tolist()
    vae = open_autoencoder(job.output)
    cropped = IDX_PIXELS[:, :, 4:-4]
    levels = cropped.astype(np.float64) / 127.5 - 1.0
    assert vae.config.latents_mean == [pytest.approx(levels.mean())]
    assert vae.config.latents_std == [pytest.approx(levels.std())]
    mean = torch.from_numpy(shard.moments[:, :1].astype(np.float32))
    images = decode_latents(vae, LatentNormalization.from_vae_config(vae.config).normalize(mean))
    np.testing.assert_array_equal(images.numpy(), np.repeat(cropped[..., None], 3, axis=3))
    # Other images with the autoencoder of the first dataset keep its normalization.
    (tmp_path / "grey/a").mkdir(parents=True)
    Image.new("L", (28, 28), 90).save(tmp_path / "grey/a/b.png")
    images_dataset = EncodeJob(
        images=str(tmp_path / "grey"), output=str(tmp_path / "more"), vae=f"{job.output}/vae", image_size=20
    )
    encode_without_ray(images_dataset)
    assert open_autoencoder(images_dataset.output).config.latents_std == vae.config.latents_std


def test_image_with_colours_is_rejected_from_a_grey_dataset(tmp_path):
    for name, colour in (("grey", (90, 90, 90)), ("light", (200, 200, 200)), ("red", (200, 90, 90))):
        (tmp_path / "images/a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"images/a/{name}.png")
    options = {"vae": "pixels", "grey": True, "pixel_factor": 2, "image_size": 8, "max_rejected_fraction": 0.5}
    job = encode_job(tmp_path / "images", tmp_path / "latents", **options)
    manifest = encode_without_ray(job)
    assert (manifest.latent_shape, manifest.num_samples, manifest.num_rejected) == ((4, 4, 4), 2, 1)
    [rejected] = pq.read_table(tmp_path / "latents/rejected.parquet").to_pylist()
    assert rejected == {
        "sample_id": "a/red",
        "reason": "the image has colours, but the dataset is grey; encode without --grey",
    }


def test_invalid_options_of_pixels_are_refused(tmp_path, image_root):
    with pytest.raises(ValueError, match="pixel_factor and grey need --vae pixels, but the autoencoder is "):
        encode_job(image_root / "val", tmp_path / "latents", pixel_factor=2)
    with pytest.raises(ValueError, match="--vae pixels requires --image-size, such as 28 for MNIST"):
        encode_job(image_root / "val", tmp_path / "latents", vae="pixels", image_size=None)
    with pytest.raises(InputError, match="--image-size must be a multiple of 3 for this autoencoder, but got 64"):
        encode_without_ray(encode_job(image_root / "val", tmp_path / "latents", vae="pixels", pixel_factor=3))
    (tmp_path / "white/a").mkdir(parents=True)
    for name in "bc":
        Image.new("L", (8, 8), 255).save(tmp_path / f"white/a/{name}.png")
    with pytest.raises(InputError, match="all pixels in .*white are equal"):
        encode_without_ray(encode_job(tmp_path / "white", tmp_path / "white-latents", vae="pixels", image_size=8))
