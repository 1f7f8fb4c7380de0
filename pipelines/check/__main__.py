"""Checks a latent dataset: is it complete and undamaged, and does it look like its images?

    meanflow check --data latents

Reads every shard, compares counts and hashes with the manifest, looks for invalid values, compares the statistics of the
latents with the autoencoder's normalization, and draws decoded latents below their images. The exit code is 1 if there
are problems.
"""

from pipelines.check.job import CheckJob
from pipelines.command_line import parse_command_line, run_command


def main() -> None:
    """Runs the command."""
    job = parse_command_line(CheckJob, __doc__)
    from pipelines.check.run import check, describe  # slow: it imports diffusers and matplotlib

    report = check(job)
    print(describe(report))
    if not report.problems:
        print(f"figure: {job.figure.absolute()}")
    raise SystemExit(1 if report.problems else 0)


if __name__ == "__main__":
    run_command(main)
