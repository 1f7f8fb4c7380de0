"""Trains the demo's autoencoder: a small `AutoencoderKL` that downsamples by 8 (64x64 -> 4x8x8).

The repository ships the result in pipelines/demo/autoencoder_weights/; `python -m pipelines.demo.autoencoder --output DIR`
reproduces it. It is trained on its own split of drawn images and measured on held-out ones.
"""

import logging
import time
from pathlib import Path

from pipelines import storage
from pipelines.command_line import parse_command_line, run_command
from pipelines.demo.job import AutoencoderTraining
from pipelines.progress import format_seconds

logger = logging.getLogger(__name__)

SHIPPED_AUTOENCODER = Path(__file__).parent / "autoencoder_weights"


def main() -> None:
    """Runs the command."""
    config = parse_command_line(AutoencoderTraining, __doc__)
    from pipelines.demo.train_autoencoder import model_card, train  # imports torch

    storage.output_location(str(config.output), "--output")
    began = time.monotonic()
    vae, psnr = train(config)
    seconds = time.monotonic() - began
    vae.save_pretrained(config.output)
    (config.output / "README.md").write_text(model_card(config, vae, psnr, seconds))
    logger.info("held-out PSNR %.2f dB after %s; wrote %s", psnr, format_seconds(seconds), config.output)


if __name__ == "__main__":
    run_command(main)
