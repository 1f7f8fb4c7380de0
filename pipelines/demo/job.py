"""Options of the demo, and of the training of its judge."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Draw images, then encode, train, evaluate and serve."""

    work: Path = Path("build/demo")
    """Folder for all results; replaces that of an earlier demo."""
    preset: str = "demo"
    """Training preset."""
    num_train: int = 8000
    """Training images to draw."""
    num_val: int = 1000
    """Held-out images to draw."""
    num_samples: int = 1000
    """Samples to measure."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of sampling steps to evaluate; must include 1."""
    num_workers: int | None = None
    """Training processes. Default: one per GPU, or two on a machine without GPUs."""
    port: int = 0
    """Port of the endpoint on 127.0.0.1; 0 takes a free one."""

    def __post_init__(self) -> None:
        if 1 not in self.steps:
            raise ValueError(f"steps must include 1, because the report is about one step, but got {self.steps}")


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
