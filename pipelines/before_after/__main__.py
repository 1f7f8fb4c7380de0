"""The command `meanflow before-after`."""

from pipelines.before_after.job import DESCRIPTION, BeforeAfterJob
from pipelines.command_line import parse_command_line, run_command


def main() -> None:
    """Parses the command line, measures both generators and prints the table."""
    job = parse_command_line(BeforeAfterJob, DESCRIPTION)
    from pipelines.before_after.run import before_after  # imports Ray and torch, which --help does not need

    print(before_after(job))
    print(f"report: {job.output}")


if __name__ == "__main__":
    run_command(main)
