"""Trains the demo's judge, a small classifier, on drawn images that neither the autoencoder nor the generator uses.

The repository ships the result in pipelines/demo/judge_weights/, so that figures stay comparable;
`python -m pipelines.demo.judge --output DIR` reproduces it.
"""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from meanflow_core.autoencoder import to_float_images
from pipelines import storage
from pipelines.command_line import parse_command_line, run_command
from pipelines.demo import images
from pipelines.evaluate.judge import Judge
from pipelines.progress import Progress, format_seconds

logger = logging.getLogger(__name__)

SHIPPED_JUDGE = Path(__file__).parent / "judge_weights"


@dataclass(frozen=True, kw_only=True)
class JudgeTraining:
    """Train the demo's judge."""

    output: Path
    """Folder to write."""
    num_images: int = 20_000
    """Drawn training images."""
    num_steps: int = 1_200
    """Optimiser steps."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW, with cosine decay to zero."""
    num_held_out: int = 1_000
    """Held-out images for the accuracy."""
    seed: int = 0
    """Seed of the initialisation and the order."""


def _factors(split: str, count: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([images.factors(split, index).as_targets() for index in range(count)]))


@dataclass(frozen=True)
class HeldOut:
    """Performance of a judge on held-out images."""

    accuracy: float
    """Fraction of correct classes."""
    explained: float
    """Fraction of the factors' variance that it explains."""


def train(config: JudgeTraining) -> tuple[Judge, HeldOut]:
    """Trains the judge; returns it and its performance on held-out images."""
    torch.manual_seed(config.seed)
    pixels, labels = (torch.from_numpy(array) for array in images.draw_many("judge", 0, config.num_images))
    factors = _factors("judge", config.num_images)
    judge = Judge(class_names=images.CLASS_NAMES, image_size=images.IMAGE_SIZE, num_factors=factors.shape[1])
    judge = judge.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=config.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / config.num_steps))
    )
    progress = Progress(logger, "judge:", "steps", config.num_steps, interval_seconds=10.0)
    for step in range(config.num_steps):
        rows = torch.randint(len(pixels), (config.batch_size,))
        x = to_float_images(pixels[rows]).to(memory_format=torch.channels_last)
        # A little noise keeps it from learning the artefacts of JPEG and of the decoder.
        _, logits, guesses = judge(x + 0.03 * torch.randn_like(x))
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05) + F.mse_loss(guesses, factors[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(step + 1, f"loss {loss.item():.3f}")
    judge = judge.to(memory_format=torch.contiguous_format).eval()
    held_out, expected = (torch.from_numpy(array) for array in images.draw_many("val", 0, config.num_held_out))
    targets = _factors("val", config.num_held_out)
    with torch.no_grad():
        _, logits, guesses = judge(to_float_images(held_out))
    accuracy = float((logits.argmax(dim=1) == expected).double().mean())
    return judge, HeldOut(accuracy, 1.0 - float((guesses - targets).square().mean() / targets.var(dim=0).mean()))


def main() -> None:
    """Runs the command."""
    config = parse_command_line(JudgeTraining, __doc__)
    storage.output_location(str(config.output), "--output")
    began = time.monotonic()
    judge, held_out = train(config)
    seconds = time.monotonic() - began
    judge.save_pretrained(config.output)
    num_parameters = sum(parameter.numel() for parameter in judge.parameters())
    (config.output / "README.md").write_text(f"""# The demo's judge

A small classifier of this project's synthetic demo images, which also predicts their factors of variation (position, size,
rotation, colours, gradients); {num_parameters:,} parameters. Its 64 features give the demo's Fréchet distance (not FID), its
predictions the class accuracy.

| | |
|---|---|
| command | `python -m pipelines.demo.judge --output DIR --num-steps {config.num_steps}` |
| trained on | {config.num_images:,} drawn images of the `judge` split, which no other stage uses |
| time | {format_seconds(seconds)} on 2 CPU cores |
| held-out accuracy | {held_out.accuracy:.4f} over {config.num_held_out:,} images of the `val` split |
| explained variance of the factors | {held_out.explained:.3f} |
| licence | Apache-2.0, as the project |
""")
    logger.info(
        "held-out accuracy %.4f, %.3f of the factors' variance, after %s; wrote %s",
        held_out.accuracy, held_out.explained, format_seconds(seconds), config.output,
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
