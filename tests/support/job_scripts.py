"""Runs the scripts of deploy/jobs with a fake `ray` that prints its arguments, and parses what they submit."""

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from ray.scripts.scripts import cli as ray_command_line

from tests.support.readme import REPOSITORY

JOBS = REPOSITORY / "deploy" / "jobs"
STAGES = ("encode", "train", "evaluate")
STORAGE = "s3://BUCKET/imagenet"


@dataclass(frozen=True)
class Submission:
    """One `ray job submit`, as Ray's own command line parses it."""

    options: dict[str, Any]
    module: str
    arguments: list[str]
    """The module's command-line arguments."""


def submission(stage: str, *arguments: str, **environment: str) -> Submission:
    """Runs a stage's script with these arguments and environment variables. Raises CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        ray = Path(folder) / "ray"
        ray.write_text("""#!/bin/sh\nprintf '%s\\0' "$@"\n""")
        ray.chmod(0o755)
        variables = {"STORAGE": STORAGE, "PATH": f"{folder}:{os.environ['PATH']}", **environment}
        done = subprocess.run(
            [JOBS / f"{stage}.sh", *arguments],
            env=variables,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
    words = done.stdout.split("\0")[:-1]
    options = parse_with_click(ray_command_line, words).params
    python, flag, module, *rest = options.pop("entrypoint")
    assert (python, flag) == ("python", "-m")
    return Submission(options, module, list(rest))


def parse_with_click(command: click.Command, words: list[str]) -> click.Context:
    """Parses a click command line. Returns the context of the innermost subcommand, which holds its parameters."""
    name = None
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(click.Context(command), words)
    return command.make_context(name, list(words))
