"""Trains the demo's judge on drawn images that neither the autoencoder nor the generator sees.

The result lies in pipelines/demo/judge_weights/ in the repository, fixed, so that figures of different days compare;
`python -m pipelines.demo.judge --output DIR` makes it again.
"""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from meanflow_core.autoencoder import to_float_images
from pipelines import storage
from pipelines.command import parse_command_line, run_command
from pipelines.demo import images
from pipelines.judge import Judge
from pipelines.progress import Progress, format_seconds

logger = logging.getLogger(__name__)

SHIPPED_JUDGE = Path(__file__).parent / "judge_weights"


@dataclass(frozen=True, kw_only=True)
class JudgeTraining:
    """How the demo's judge is trained."""

    output: Path
    """Folder to write."""
    num_images: int = 20_000
    """Drawn training images."""
    num_steps: int = 1_200
    """Optimiser steps."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 2e-3
    """Peak of AdamW's rate, with a cosine down to zero."""
    num_held_out: int = 1_000
    """Held-out images for the accuracy."""
    seed: int = 0
    """Of the initialisation and the order."""


def train(config: JudgeTraining) -> tuple[Judge, float]:
    """Trains and returns the judge and its held-out accuracy."""
    torch.manual_seed(config.seed)
    pixels, labels = (torch.from_numpy(array) for array in images.draw_many("judge", 0, config.num_images))
    judge = Judge(class_names=images.CLASS_NAMES, image_size=images.IMAGE_SIZE).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=config.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / config.num_steps))
    )
    progress = Progress(logger, "judge:", "steps", config.num_steps, interval_seconds=10.0)
    for step in range(config.num_steps):
        rows = torch.randint(len(pixels), (config.batch_size,))
        x = to_float_images(pixels[rows]).to(memory_format=torch.channels_last)
        _, logits = judge(
            x + 0.03 * torch.randn_like(x)
        )  # a little noise, or it would read JPEG's and decoders' traces
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(step + 1, f"loss {loss.item():.3f}")
    judge = judge.to(memory_format=torch.contiguous_format).eval()
    held_out, truth = (torch.from_numpy(array) for array in images.draw_many("val", 0, config.num_held_out))
    return judge, float((judge.look_at(held_out).predictions == truth).double().mean())


def main() -> None:
    """The command."""
    config = parse_command_line(JudgeTraining, __doc__)
    storage.output_location(str(config.output), "--output")
    began = time.monotonic()
    judge, accuracy = train(config)
    seconds = time.monotonic() - began
    judge.save_pretrained(config.output)
    num_parameters = sum(parameter.numel() for parameter in judge.parameters())
    (config.output / "README.md").write_text(f"""# The demo's judge

A classifier of this project's synthetic demo images, {num_parameters:,} parameters. Its 64 features measure a Frechet
distance on the demo (not FID), its answers a class accuracy.

| | |
|---|---|
| made by | `python -m pipelines.demo.judge --output DIR --num-steps {config.num_steps}` |
| trained on | {config.num_images:,} drawn images of the `judge` split, which no other stage sees |
| time | {format_seconds(seconds)} on 2 CPU cores |
| held-out accuracy | {accuracy:.4f} over {config.num_held_out:,} images of the `val` split |
| licence | Apache-2.0, as the project |
""")
    logger.info("held-out accuracy %.4f after %s; wrote %s", accuracy, format_seconds(seconds), config.output)


if __name__ == "__main__":
    run_command(main)
