import itertools
import sys

import numpy as np
import pytest
import torch

from meanflow_core.presets import PRESETS
from pipelines import train
from pipelines.command import InputError, run_command
from pipelines.train import parse_arguments, sample_grid, share_of_rows

REQUIRED = ["--data", "d", "--storage", "s", "--run-name", "r"]


def test_shares_are_contiguous_and_cover_the_batch():
    for world_size in (1, 2, 3, 7):
        shares = [share_of_rows(16, rank, world_size) for rank in range(world_size)]
        assert shares[0][0] == 0
        assert shares[-1][1] == 16
        assert all(first[1] == second[0] for first, second in itertools.pairwise(shares))


def test_every_number_of_a_preset_can_be_overridden_by_its_dotted_name():
    preset, job = parse_arguments(
        ["demo", *REQUIRED, "--num-workers", "3", "--loss.guidance.kappa", "0.9", "--num-steps", "7"]
    )
    assert preset == "demo"
    assert job.num_workers == 3
    assert job.config.loss.guidance.kappa == 0.9
    assert job.config.num_steps == 7
    assert job.config.network == PRESETS["demo"]().network


def test_unknown_preset_is_one_line_that_lists_the_known(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "x12"])
    with pytest.raises(SystemExit) as stop:
        run_command(train.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: unknown preset 'x12'; known: b4, b2, m2, l2, xl2, demo, debug\n"


def test_help_lists_presets_with_what_they_are(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    assert "FID 3.43" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--loss.guidance.kappa", "1.5", "kappa must lie in"), ("--num-steps", "0", "num_steps must be at least 1")],
)
def test_impossible_override_is_refused(option, value, words, capsys):
    with pytest.raises((SystemExit, ValueError)) as stop:
        parse_arguments(["debug", *REQUIRED, option, value])
    output = capsys.readouterr()
    assert words in output.err + output.out + str(stop.value)


def test_missing_dataset_is_refused_before_anything_is_written(tmp_path):
    _, job = parse_arguments(
        ["debug", "--data", str(tmp_path / "none"), "--storage", str(tmp_path / "runs"), "--run-name", "r"]
    )
    with pytest.raises(InputError, match="latent dataset .* does not exist"):
        train.train("debug", job)
    assert not (tmp_path / "runs").exists()


def test_grid_of_samples_has_a_row_per_class(pipeline):
    picture = sample_grid(pipeline)
    assert picture.dtype == np.uint8
    assert picture.shape == (10 * 66 - 2, 8 * 66 - 2, 3)
    expected = pipeline.images_from_seeds([0], [0], 1)[0]
    assert (torch.from_numpy(picture[:64, :64]).int() - expected.int()).abs().max() <= 1
