"""Trains the demo's judge."""

from dataclasses import dataclass

import numpy as np
import torch

from meanflow_core.autoencoder import to_float_images
from pipelines.demo import images
from pipelines.demo.job import JudgeTraining
from pipelines.judge.job import JudgeFit
from pipelines.judge.network import Judge
from pipelines.judge.training import fit_judge
from pipelines.progress import format_seconds


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
    fit = JudgeFit(num_steps=config.num_steps, batch_size=config.batch_size, learning_rate=config.learning_rate)
    judge = fit_judge(judge, pixels, labels, fit, factors)
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
