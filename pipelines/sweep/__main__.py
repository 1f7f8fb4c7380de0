"""The sweep command: `meanflow sweep`."""

import sys

from pipelines.command_line import run_command
from pipelines.sweep.grid import expand
from pipelines.sweep.job import parse_arguments


def main() -> None:
    """Parses the command line, trains and evaluates the variants, and prints their table."""
    preset, job = parse_arguments(sys.argv[1:])
    variants = expand(job.vary, job.train.config)
    if job.train.dry_run:
        print("\n".join(variant.name for variant in variants))
        return
    from pipelines.sweep.run import sweep  # imports Ray, torch and MLflow, which --help does not need

    sweep(preset, job, variants)


if __name__ == "__main__":
    run_command(main)
