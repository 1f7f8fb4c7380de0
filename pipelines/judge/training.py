"""Trains a judge on pixels in memory.

B images of a batch, N images, H W image size, F factors of variation.
"""

import logging
import math

import torch
import torch.nn.functional as F

from meanflow_core.autoencoder import to_float_images
from pipelines.judge.job import JudgeFit
from pipelines.judge.network import Judge
from pipelines.progress import Progress

logger = logging.getLogger(__name__)

LABEL_SMOOTHING = 0.05
WEIGHT_DECAY = 0.05


def augment(pixels: torch.Tensor, *, mirror: bool, max_shift: int) -> torch.Tensor:
    """Mirrors half of the images, and shifts each by up to `max_shift` pixels down and right, or up and left.

    pixels: (B, H, W, C) of any dtype. Returns a tensor of the same shape and dtype, with pixels repeated at the edges.
    Draws from torch's global generator, and draws nothing for an augmentation that is off.
    """
    count, height, width, _ = pixels.shape
    rows, columns = torch.arange(height).expand(count, -1), torch.arange(width).expand(count, -1)
    if mirror:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)  # (B, W)
    if max_shift:
        down, right = torch.randint(-max_shift, max_shift + 1, (2, count, 1))
        rows, columns = (rows - down).clamp(0, height - 1), (columns - right).clamp(0, width - 1)
    if not mirror and not max_shift:
        return pixels
    return pixels[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def fit_judge(
    judge: Judge, pixels: torch.Tensor, labels: torch.Tensor, fit: JudgeFit, factors: torch.Tensor | None = None
) -> Judge:
    """Trains a judge in place on the CPU, and returns it in evaluation mode.

    pixels: uint8 (N, H, W, 3). labels: int64 (N,). factors: float32 (N, F), regression targets; None regresses nothing.
    The caller seeds torch, because the seed also determines the judge's initialisation.
    """
    judge = judge.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=fit.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / fit.num_steps))
    )
    progress = Progress(logger, "judge:", "steps", fit.num_steps, interval_seconds=10.0)
    for step in range(fit.num_steps):
        indices = torch.randint(len(pixels), (fit.batch_size,))
        batch = augment(pixels[indices], mirror=fit.mirror, max_shift=fit.max_shift)
        x = to_float_images(batch).to(memory_format=torch.channels_last)
        _, logits, guesses = judge(x + fit.noise * torch.randn_like(x))
        loss = F.cross_entropy(logits, labels[indices], label_smoothing=LABEL_SMOOTHING)
        if factors is not None:
            loss = loss + F.mse_loss(guesses, factors[indices])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(step + 1, f"loss {loss.item():.3f}")
    return judge.to(memory_format=torch.contiguous_format).eval()


def held_out_accuracy(judge: Judge, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Fraction of uint8 images (N, H, W, 3) whose predicted class equals the label (N,)."""
    return float((judge.predict(pixels).labels == labels).double().mean())
