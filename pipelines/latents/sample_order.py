"""Which samples form a step: a pure function of (seed, step, global batch size, number of samples)."""

import functools

import numpy as np


def samples_of_step(seed: int, step: int, global_batch_size: int, num_samples: int) -> np.ndarray:
    """Indices of the samples that form a 0-based step: int64 (global_batch_size,).

    Each epoch is a random permutation of all samples. The permutations are concatenated and cut into batches, so a batch
    may span two epochs.
    """
    positions = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    epochs, offsets = np.divmod(positions, num_samples)
    indices = np.empty(global_batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        mask = epochs == epoch
        indices[mask] = _permutation(seed, int(epoch), num_samples)[offsets[mask]]
    return indices


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)
