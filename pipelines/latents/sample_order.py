"""Which samples form a step: a pure function of (seed, step, global batch size, number of samples)."""

import functools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def rows_of_step(seed: int, step: int, global_batch_size: int, num_samples: int) -> np.ndarray:
    """Which rows make 0-based step `step`: int64 (B,), a pure function of its arguments.

    Epochs are permutations of all rows, laid end to end and cut into batches; a batch may reach into the next epoch.
    """
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    epochs, offsets = np.divmod(positions, num_samples)
    rows = np.empty(global_batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        mask = epochs == epoch
        rows[mask] = _epoch_order(seed, int(epoch), num_samples)[offsets[mask]]
    return rows
