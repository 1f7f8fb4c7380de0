import sys

import pytest

from meanflow_core.presets import PRESETS
from pipelines.command_line import run_command
from pipelines.train.__main__ import main
from pipelines.train.job import parse_arguments

REQUIRED = ["--data", "d", "--storage", "s", "--run-name", "r"]


def test_options_override_a_presets_numbers_by_dotted_names():
    preset, job = parse_arguments(
        ["demo", *REQUIRED, "--num-workers", "3", "--loss.guidance.kappa", "0.9", "--num-steps", "7"]
    )
    assert preset == "demo"
    assert job.num_workers == 3
    assert job.config.loss.guidance.kappa == 0.9
    assert job.config.num_steps == 7
    assert job.config.network == PRESETS["demo"]().network


def test_unknown_preset_is_refused_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "x12"])
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == f"error: unknown preset 'x12'; known: {', '.join(PRESETS)}, or module:function for one of your own\n"
    )


def test_help_lists_the_presets(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    assert "FID 3.43" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--num-steps", "0", "num_steps must be a whole number above 0"),
        ("--samples-per-pass", "0", "samples_per_pass must be at least 1, but got 0"),
        ("--num-workers=1 --min-workers", "2", "min_workers must be at most num_workers 1, but got 2"),
        ("--resize-interval-seconds", "0", "resize_interval_seconds must be above 0, but got 0"),
        ("--skip-nonfinite", "-1", "skip_nonfinite must be at least 0, but got -1"),
        ("--max-failures", "-2", "max_failures must be at least -1, but got -2"),
        ("--init-source", "sit", "init_source requires init_from"),
    ],
)
def test_invalid_options_are_refused(option, value, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "debug", *REQUIRED, *option.split(), value])
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_boundary_values_of_options_are_accepted():
    _, job = parse_arguments(["debug", *REQUIRED, "--num-workers", "2", "--min-workers", "2", "--max-failures", "-1"])
    assert (job.num_workers, job.min_workers, job.max_failures) == (2, 2, -1)
