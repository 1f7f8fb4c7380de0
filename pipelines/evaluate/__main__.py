"""Stage 3: draw samples from a generator and measure their quality, on every device of a cluster.

    meanflow evaluate --model models:/meanflow-demo@candidate --tracking-uri sqlite:////runs/mlflow.db \\
        --train-images demo/train --held-out-images demo/val --extractor pipelines/demo/judge_weights \\
        --num-samples 1000 --output report
    meanflow evaluate --model runs/xl2/generator --reference VIRTUAL_imagenet256_labeled.npz \\
        --labels random --steps 1 2 --output report

Computes the Frechet distance with its standard error (FID if the extractor is inception), Inception Score, precision,
recall and sFID. Given held-out images, also scores them for comparison. Given training images as well, computes the
diversity of the samples and their distance to the nearest training images, in pixels and in features; nearest.png shows
these. An extractor that does not know the classes gives the accuracy of a linear probe. Writes report.json, table.md and
plots, and logs them to the MLflow run that trained the model.
"""

from pipelines.command_line import parse_command_line, run_command
from pipelines.evaluate.job import EvaluateJob


def main() -> None:
    """Runs the evaluation that the command line describes, and prints its table."""
    job = parse_command_line(EvaluateJob, __doc__)
    from pipelines.evaluate.run import evaluate  # after parsing, to keep --help fast
    from pipelines.evaluate.table import report_table

    report = evaluate(job)
    print(report_table(report), end="")
    print(f"report: {job.output}")


if __name__ == "__main__":
    run_command(main)
