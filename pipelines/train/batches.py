"""A worker's rows of any step, cut into the passes that it makes over them, and made while the device is at work."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from meanflow_core.config import TrainingConfig
from meanflow_core.draws import draw_step_record
from meanflow_core.training import Batch, contiguous_share, num_passes
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.sample_order import samples_of_step


class BatchSource:
    """A worker's contiguous rows of any step: which they are depends on (seed, step) and on nothing that came before."""

    def __init__(
        self,
        dataset: LatentDataset,
        config: TrainingConfig,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        rows_per_pass: int | None = None,
    ) -> None:
        self._dataset = dataset
        self._config = config
        self._start, self._stop = contiguous_share(config.global_batch_size, rank, world_size)
        self._num_passes = num_passes(config.global_batch_size, world_size, rows_per_pass)
        self._device = device

    def batches(self, step: int) -> list[Batch]:
        """The share of 0-based step `step`: one batch a pass, on the device."""
        config, num_rows = self._config, self._config.global_batch_size
        loss, latent_shape = config.loss_at(step), self._dataset.manifest.latent_shape
        indices = samples_of_step(config.seed, step, num_rows, len(self._dataset))
        record = draw_step_record(loss, seed=config.seed, step=step, num_rows=num_rows, latent_shape=latent_shape)
        batches = []
        for number in range(self._num_passes):
            first, last = contiguous_share(self._stop - self._start, number, self._num_passes)
            start, stop = self._start + first, self._start + last
            share = record.rows(start, stop, loss)
            moments, labels = self._dataset.read(indices[start:stop], share.mirrored.numpy())
            batches.append(
                Batch(
                    moments=torch.from_numpy(moments).to(self._device, non_blocking=True),
                    labels=torch.from_numpy(labels).to(self._device, non_blocking=True),
                    record=share.to(self._device),
                )
            )
        return batches


class Prefetcher:
    """Makes the next step's batches while the device is at work on this one's; none past the last step."""

    def __init__(self, source: BatchSource, num_steps: int) -> None:
        self._source = source
        self._num_steps = num_steps
        self._maker = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def batches(self, step: int) -> list[Batch]:
        """As BatchSource has them; begins those of the step after it."""
        made = (
            self._next[1].result() if self._next is not None and self._next[0] == step else self._source.batches(step)
        )
        self._next = None
        if step + 1 < self._num_steps:
            self._next = (step + 1, self._maker.submit(self._source.batches, step + 1))
        return made
