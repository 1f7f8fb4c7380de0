"""Trains the demo's judge."""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from meanflow_core.autoencoder import to_float_images
from pipelines.demo import images
from pipelines.demo.job import JudgeTraining
from pipelines.judge.network import Judge
from pipelines.progress import Progress, format_seconds

logger = logging.getLogger(__name__)


def _factors(split: str, count: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([images.factors(split, index).as_targets() for index in range(count)]))


@dataclass(frozen=True)
class HeldOut:
    """Performance of a judge on held-out images."""

    accuracy: float
    """Fraction of correct classes."""
    explained: float
    """Fraction of the factors' variance that the judge explains."""


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
        indices = torch.randint(len(pixels), (config.batch_size,))
        x = to_float_images(pixels[indices]).to(memory_format=torch.channels_last)
        # A little noise makes the judge insensitive to the artefacts of JPEG and of the decoder, which these images lack.
        _, logits, guesses = judge(x + 0.03 * torch.randn_like(x))
        loss = F.cross_entropy(logits, labels[indices], label_smoothing=0.05) + F.mse_loss(guesses, factors[indices])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(step + 1, f"loss {loss.item():.3f}")
    judge = judge.to(memory_format=torch.contiguous_format).eval()
    val_pixels, val_labels = (torch.from_numpy(array) for array in images.draw_many("val", 0, config.num_held_out))
    val_factors = _factors("val", config.num_held_out)
    with torch.no_grad():
        _, logits, guesses = judge(to_float_images(val_pixels))
    accuracy = float((logits.argmax(dim=1) == val_labels).double().mean())
    unexplained = float((guesses - val_factors).square().mean() / val_factors.var(dim=0).mean())
    return judge, HeldOut(accuracy, 1.0 - unexplained)


def model_card(config: JudgeTraining, judge: Judge, held_out: HeldOut, seconds: float) -> str:
    """The README.md stored with the weights."""
    num_parameters = sum(parameter.numel() for parameter in judge.parameters())
    return f"""# The demo's judge

A small classifier of this project's synthetic demo images, which also predicts their factors of variation (position, size,
rotation, colours, gradients); {num_parameters:,} parameters. Its 64 features are used for the demo's Fréchet distance
(not FID), and its predictions for the class accuracy.

| | |
|---|---|
| command | `python -m pipelines.demo.judge --output DIR --num-steps {config.num_steps}` |
| trained on | {config.num_images:,} drawn images of the `judge` split, which no other stage uses |
| time | {format_seconds(seconds)} on 2 CPU cores |
| held-out accuracy | {held_out.accuracy:.4f} over {config.num_held_out:,} images of the `val` split |
| explained variance of the factors | {held_out.explained:.3f} |
| licence | Apache-2.0, like the project |
"""
