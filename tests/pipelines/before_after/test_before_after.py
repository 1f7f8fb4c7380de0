"""A refined generator beside the original, in several extractors."""

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from meanflow_core.generator import save_generator
from meanflow_core.generator_folder import write_provenance
from pipelines.before_after.job import BeforeAfterJob
from pipelines.before_after.run import before_after
from pipelines.demo import images
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.errors import InputError
from pipelines.extractors.opening import open_extractor
from pipelines.judge.network import Judge
from tests.conftest import perturbed


@pytest.fixture
def job(pipeline, image_root, tmp_path):
    save_generator(pipeline, tmp_path / "before")
    perturbed(pipeline.transformer)
    save_generator(pipeline, tmp_path / "after")
    identity = open_extractor(str(SHIPPED_JUDGE), None, "cpu").identity
    write_provenance(tmp_path / "after", {"refined_on": [identity], "refined_from": str(tmp_path / "before")})
    torch.manual_seed(1)
    Judge(images.CLASS_NAMES).save_pretrained(tmp_path / "other")
    return BeforeAfterJob(
        model=str(tmp_path / "after"),
        extractors=(str(SHIPPED_JUDGE), str(tmp_path / "other")),
        train_images=str(image_root / "train"),
        held_out_images=str(image_root / "val"),
        output=tmp_path / "report",
        num_samples=40,
        device="cpu",
    )


def test_a_trained_on_distance_is_not_printed_alone(job, tmp_path):
    alone = BeforeAfterJob(**{**vars(job), "extractors": job.extractors[:1]})
    with pytest.raises(
        InputError, match="trained on all of --extractors .*; add an extractor that it was not trained on"
    ):
        before_after(alone)
    original = BeforeAfterJob(**{**vars(job), "model": str(tmp_path / "before")})
    with pytest.raises(InputError, match="must be a generator of `meanflow refine`, but it was not refined"):
        before_after(original)
    assert not job.output.exists()


@pytest.mark.cluster
@pytest.mark.soak
def test_both_generators_are_measured_in_every_extractor(job):
    try:
        text = before_after(job)
    finally:
        ray.shutdown()
    assert text.count("Fréchet distance (judge), trained on") == 1
    assert text.count("Fréchet distance (judge), held out") == 1
    assert text.count("| before | 1 step |") == text.count("| after | 1 step |") == 2
    assert (job.output / "table.md").read_text() == text
    picture = np.asarray(Image.open(job.output / "before_after.png"))
    width = picture.shape[1]
    halves = picture[14:, : width // 2 - 7], picture[14:, width // 2 + 7 :]
    assert halves[0].shape == halves[1].shape
    assert not np.array_equal(*halves)


def test_references_must_be_as_many_as_extractors(job):
    with pytest.raises(ValueError, match="references must be as many as extractors, 2, but got 1"):
        BeforeAfterJob(**{**vars(job), "references": ("judge.npz",)})
