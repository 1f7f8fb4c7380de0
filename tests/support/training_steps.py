"""Training steps of the debug presets on random moments, for tests of the core."""

import torch

from meanflow_core.config import TrainingConfig
from meanflow_core.latents import LatentNormalization
from meanflow_core.networks.interface import NetworkModel
from meanflow_core.presets.demo import debug
from meanflow_core.training import Batch, StepMetrics, TrainState, build_train_state, train_step
from tests.support.objectives import draw_record, rows_of

IDENTITY = LatentNormalization(mean=(0.0,) * 4, std=(1.0,) * 4)


def fresh_state(config: TrainingConfig | None = None, initial: NetworkModel | None = None) -> TrainState:
    """A state before its first step, on 4x8x8 latents of 10 classes."""
    return build_train_state(
        config or debug(), sample_size=8, in_channels=4, num_classes=10, device=torch.device("cpu"), initial=initial
    )


def make_batch(config: TrainingConfig, step: int = 0) -> Batch:
    """The global batch of a step: random moments and labels, and the step's record."""
    record = draw_record(
        config.loss, seed=config.seed, step=step, num_rows=config.global_batch_size, latent_shape=(4, 8, 8)
    )
    generator = torch.Generator().manual_seed(step)
    moments = torch.randn(config.global_batch_size, 8, 8, 8, generator=generator).abs()
    labels = torch.randint(10, (config.global_batch_size,), generator=generator)
    return Batch(moments=moments, labels=labels, record=record)


def part_of(batch: Batch, start: int, stop: int, config: TrainingConfig) -> Batch:
    """Rows start to stop - 1 of a batch."""
    return Batch(
        moments=batch.moments[start:stop],
        labels=batch.labels[start:stop],
        record=rows_of(batch.record, start, stop, config.loss),
    )


def broken_batch(config: TrainingConfig, step: int = 0) -> Batch:
    """A batch whose gradient is not finite."""
    batch = make_batch(config, step)
    batch.moments[3] = float("nan")
    return batch


def take_steps(state: TrainState, config: TrainingConfig, count: int) -> StepMetrics:
    """Takes `count` steps; the metrics of the last one."""
    for _ in range(count):
        metrics = train_step(state, state.network, [make_batch(config, state.step)], IDENTITY, config)
    return metrics


def parameters(module: torch.nn.Module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
