from dataclasses import replace

import pytest
import yaml

from meanflow_core.presets import PRESETS
from pipelines.train.model_card import write_card
from tests.support.manifests import make_manifest

LETTERS = make_manifest([5], moments_shape=(8, 32, 32), image_size=256)
IMAGENET = replace(
    LETTERS,
    class_names=[f"class {label}" for label in range(1000)],
    wnids=[f"n{label:08d}" for label in range(1000)],
)


def card_of(folder, manifest, preset="xl2", init_from=None, data="s3://b/latents"):
    write_card(
        folder,
        name="mine",
        preset=preset,
        step=1200,
        config=PRESETS[preset](),
        manifest=manifest,
        data=data,
        init_from=init_from,
        run_id="0a1b",
    )
    return (folder / "README.md").read_text()


def test_a_card_says_what_the_generator_was_made_of(tmp_path):
    card = card_of(tmp_path, LETTERS)
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "diffusers"
    assert "license" not in yaml.safe_load(header)  # it is not ours to say
    for words in ("# mine", "2 classes (a, b) at 256 pixels, in one network call", "preset xl2, 1,200 steps of\n  256 images",
                  "5 images from here; latent dataset s3://b/latents", LETTERS.content_sha256, "some/vae",
                  "**Begun from** nothing", "MLflow run 0a1b"):  # fmt: skip
        assert words in text, words
    assert "what the training began from" not in text


def test_flow_matching_takes_many_calls_and_a_beginning_keeps_its_licence(tmp_path):
    card = card_of(tmp_path, LETTERS, preset="fm_xl2", init_from="models:/sit/1")
    assert "in many network calls" in card
    assert "images_from_seeds([0], [7], 50)" in card
    assert "**Begun from** models:/sit/1" in card
    assert "publisher's licence, and so does what the training began from." in card


def test_no_key_of_an_address_gets_into_a_card(tmp_path):
    place = "s3://AKIA:SECRET@b/images?endpoint_override=somewhere"
    card = card_of(tmp_path, replace(LETTERS, source=place), data="s3://AKIA:SECRET@b/latents", init_from=place)
    assert card.count("s3://b/images") == 2
    assert "s3://b/latents" in card
    assert "SECRET" not in card
    assert "endpoint_override" not in card


@pytest.mark.parametrize(("manifest", "is_told"), [(IMAGENET, True), (LETTERS, False)])
def test_imagenets_terms_stand_in_the_card_of_what_was_trained_on_it(tmp_path, manifest, is_told):
    card = card_of(tmp_path, manifest)
    assert ("The training images are ImageNet's" in card) == is_told
    assert ("rights of the training images, which are not known here" in card) != is_told
