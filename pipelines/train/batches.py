"""A worker's batches: the samples and random draws of each step, split into passes and prefetched."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from meanflow_core.config import TrainingConfig
from meanflow_core.objectives.interface import build_objective
from meanflow_core.training import Batch, contiguous_share, num_passes
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.sample_order import samples_of_step


class BatchSource:
    """Reads a worker's contiguous share of each step's samples and random draws. Both depend on (seed, step) only."""

    def __init__(
        self,
        dataset: LatentDataset,
        config: TrainingConfig,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        samples_per_pass: int | None = None,
    ) -> None:
        self._dataset = dataset
        self._config = config
        self._start, self._stop = contiguous_share(config.global_batch_size, rank, world_size)
        self._num_passes = num_passes(config.global_batch_size, world_size, samples_per_pass)
        self._device = device

    def batches(self, step: int) -> list[Batch]:
        """Returns the worker's share of step `step` (0-based): one batch per pass, on the device."""
        config, batch_size = self._config, self._config.global_batch_size
        objective = build_objective(config.loss_at(step))
        indices = samples_of_step(config.seed, step, batch_size, len(self._dataset))
        draws = objective.draw(
            seed=config.seed, step=step, num_rows=batch_size, latent_shape=self._dataset.manifest.latent_shape
        )
        batches = []
        for number in range(self._num_passes):
            first, last = contiguous_share(self._stop - self._start, number, self._num_passes)
            start, stop = self._start + first, self._start + last
            record = objective.record(draws, start, stop)
            moments, labels = self._dataset.read(indices[start:stop], record.mirrored.numpy())
            batches.append(
                Batch(
                    moments=torch.from_numpy(moments).to(self._device, non_blocking=True),
                    labels=torch.from_numpy(labels).to(self._device, non_blocking=True),
                    record=record.to(self._device),
                )
            )
        return batches


class Prefetcher:
    """Prepares the next step's batches in a thread while the device computes. Stops at the last step."""

    def __init__(self, source: BatchSource, num_steps: int) -> None:
        self._source = source
        self._num_steps = num_steps
        self._executor = ThreadPoolExecutor(1)
        self._prefetched: tuple[int, Future[list[Batch]]] | None = None

    def batches(self, step: int) -> list[Batch]:
        """Returns the step's batches, and starts to prepare those of the next step."""
        if self._prefetched is not None and self._prefetched[0] == step:
            batches = self._prefetched[1].result()
        else:
            batches = self._source.batches(step)
        self._prefetched = None
        if step + 1 < self._num_steps:
            self._prefetched = (step + 1, self._executor.submit(self._source.batches, step + 1))
        return batches
