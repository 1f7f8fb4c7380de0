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


def card_of(folder, manifest, preset="xl2", init_from=None):
    provenance = {
        "run_id": "0a1b", "preset": preset, "step": 1200, "ema_decay": 0.9999, "data": "s3://b/latents",
        "data_sha256": manifest.content_sha256,
    }  # fmt: skip
    config = PRESETS[preset]()
    write_card(folder, name="mine", config=config, manifest=manifest, init_from=init_from, provenance=provenance)
    return (folder / "README.md").read_text()


def test_card_describes_data_training_and_autoencoder(tmp_path):
    card = card_of(tmp_path, LETTERS)
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "diffusers"
    assert "license" not in yaml.safe_load(header)  # left to the author
    for words in (
        "# mine", "2 classes (a, b) at 256 pixels in one or a few steps", "preset xl2,\n  1,200 steps of 256 images",
        "decay 0.9999", "5 images from here; latent dataset\n  s3://b/latents", LETTERS.content_sha256, "some/vae",
        "**Initial network** random", "MLflow run 0a1b",
    ):  # fmt: skip
        assert words in text, words
    assert "the initial network" not in text


def test_card_of_flow_matching_says_many_steps_and_keeps_the_initial_networks_licence(tmp_path):
    card = card_of(tmp_path, LETTERS, preset="fm_xl2", init_from="models:/sit/1")
    assert "in many steps" in card
    assert "images_from_seeds([0], [7], 50)" in card
    assert "**Initial network** models:/sit/1" in card
    assert "publisher's licence. The initial network keeps its publisher's licence." in card


def test_card_hides_credentials_of_locations(tmp_path):
    location = "s3://AKIA:SECRET@b/images?endpoint_override=somewhere"
    card = card_of(tmp_path, replace(LETTERS, source=location), init_from=location)
    assert card.count("s3://b/images") == 2
    assert "SECRET" not in card
    assert "endpoint_override" not in card


@pytest.mark.parametrize(("manifest", "has_terms"), [(IMAGENET, True), (LETTERS, False)])
def test_card_has_imagenets_terms_if_trained_on_imagenet(tmp_path, manifest, has_terms):
    card = card_of(tmp_path, manifest)
    assert ("The training images are from ImageNet" in card) == has_terms
    assert ("training command does not know these\nrights" in card) != has_terms
