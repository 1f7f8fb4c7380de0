"""Train a judge on your own images: a small classifier that measures generated images of the same classes.

    meanflow judge --images photos/train --held-out-images photos/test --image-size 64 --mirror --output judge
    meanflow evaluate --extractor judge ...

Reads all images into memory, trains on the CPU, and states the accuracy on the held-out images in the folder's model card.
"""

from pipelines.command_line import parse_command_line, run_command
from pipelines.judge.job import JudgeJob


def main() -> None:
    """Trains the judge, and prints its held-out accuracy."""
    job = parse_command_line(JudgeJob, __doc__)
    from pipelines.judge.run import train_judge  # after parsing, to keep --help fast

    trained = train_judge(job)
    print(f"judge: {job.output}, held-out accuracy {trained.held_out_accuracy:.4f}")


if __name__ == "__main__":
    run_command(main)
