"""The refine command: `meanflow refine`."""

import sys

from pipelines.command_line import run_command
from pipelines.refine.job import parse_arguments


def main() -> None:
    """Parses the command line, refines and prints where the generator is."""
    preset, job = parse_arguments(sys.argv[1:])
    from pipelines.refine import run  # imports Ray, torch and MLflow, which --help does not need

    if job.dry_run:
        print(run.dry_run(preset, job))
        return
    record = run.refine(preset, job)
    assert record.published is not None
    print(f"generator: {record.published.generator}")
    print(f"model: {record.published.model}")
    print(f"tracking: {record.tracking_uri}")


if __name__ == "__main__":
    run_command(main)
