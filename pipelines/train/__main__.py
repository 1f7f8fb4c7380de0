"""The train command: `python -m pipelines.train`."""

import sys

from pipelines.command_line import run_command
from pipelines.train.job import parse_arguments


def main() -> None:
    """Parses the command line, trains and prints where the generator is."""
    preset, job = parse_arguments(sys.argv[1:])
    from pipelines.train import run  # imports Ray, torch and MLflow, which --help does not need

    if job.dry_run:
        print(run.dry_run(preset, job))
        return
    result = run.train(preset, job)
    print(f"generator: {result.generator}")
    print(f"model: {result.model}")
    print(f"tracking: {result.tracking_uri}")


if __name__ == "__main__":
    run_command(main)
