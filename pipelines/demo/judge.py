"""Trains the demo's judge, a small classifier, on synthetic images that neither the autoencoder nor the generator uses.

The repository ships the trained judge in pipelines/demo/judge_weights/, so that every demo run is measured with the same
one. `python -m pipelines.demo.judge --output DIR` reproduces it.
"""

import logging
import time
from pathlib import Path

from pipelines import storage
from pipelines.command_line import parse_command_line, run_command
from pipelines.demo.job import JudgeTraining
from pipelines.progress import format_seconds

logger = logging.getLogger(__name__)

SHIPPED_JUDGE = Path(__file__).parent / "judge_weights"


def main() -> None:
    """Runs the command."""
    config = parse_command_line(JudgeTraining, __doc__)
    from pipelines.demo.train_judge import model_card, train  # imports torch

    storage.output_location(str(config.output), "--output")
    began = time.monotonic()
    judge, held_out = train(config)
    seconds = time.monotonic() - began
    judge.save_pretrained(config.output)
    (config.output / "README.md").write_text(model_card(config, judge, held_out, seconds))
    logger.info(
        "held-out accuracy %.4f, explained variance of the images' factors %.3f, after %s; wrote %s",
        held_out.accuracy, held_out.explained, format_seconds(seconds), config.output,
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
