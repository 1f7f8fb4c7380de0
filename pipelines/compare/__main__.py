"""Compares training methods: presets, trained alike by `meanflow train` and measured alike by `meanflow evaluate`.

    meanflow compare --data demo/latents --train-images demo/train --held-out-images demo/val \\
        --judge pipelines/demo/judge_weights --output comparison

Trains each method with several seeds, for equal steps and for equal training FLOPs, and measures it at several numbers of
function evaluations (NFE). Run the same command again to do what is missing. Distances are Fréchet distances in the features
of a small classifier (the judge), not FID.
"""

from pipelines.command_line import parse_command_line, run_command
from pipelines.compare.job import CompareJob


def main() -> None:
    """Runs the command."""
    job = parse_command_line(CompareJob, __doc__)
    from pipelines.compare.report import table
    from pipelines.compare.run import compare  # imports torch and Ray

    print(table(compare(job)), end="")
    print(f"report: {job.output}")


if __name__ == "__main__":
    run_command(main)
