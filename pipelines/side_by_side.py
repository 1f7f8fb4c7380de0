"""Compare evaluations: one table and one plot of several reports made with the same protocol.

    meanflow side-by-side --reports build/first/report build/second/report --output build/both
    meanflow side-by-side --reports models:/meanflow-b2@champion runs:/3f6c0e --output both

A report is a folder written by `meanflow evaluate`, or a model or MLflow run whose report `meanflow evaluate` logged.
Writes side_by_side.md, side_by_side.json and side_by_side.png.
"""

from pipelines.command_line import parse_command_line, run_command
from pipelines.evaluate.job import SideBySideJob


def main() -> None:
    """Compares the reports and prints the table."""
    job = parse_command_line(SideBySideJob, __doc__)
    from pipelines.evaluate.side_by_side import compare  # after parsing, to keep --help fast

    print(compare(job), end="")
    print(f"written to {job.output}")


if __name__ == "__main__":
    run_command(main)
