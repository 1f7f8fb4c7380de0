"""Noise and times of sampling, as pure functions of seeds and numbers of steps."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

MAX_SEED = 2**63 - 1


def noise_from_seeds(seeds: Sequence[int], latent_shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal noise, float32 (B, C, H, W) on the CPU: sample i depends on seed i only.

    Raises ValueError if there are no seeds, or one is outside [0, 2^63 - 1].
    """
    if not seeds:
        raise ValueError("seeds must contain at least one seed, but got none")
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seeds must lie in [0, {MAX_SEED}], but got {seed}")
    return torch.stack([torch.randn(latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def noise_between(start: torch.Tensor, end: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Interpolates between two noise tensors (B, C, H, W), with one weight in [0, 1] per image: 0 is `start`, 1 is `end`.

    Returns cos(w pi / 2) start + sin(w pi / 2) end. For independent standard normals the result is standard normal
    too; linear interpolation would halve the variance at the midpoint.
    Raises ValueError if the shapes differ, or if a weight is missing or outside [0, 1].
    """
    if start.shape != end.shape or len(weights) != len(start):
        raise ValueError(
            f"start and end must have the same shape, and one weight per image, but got {tuple(start.shape)}, "
            f"{tuple(end.shape)} and {len(weights)} weights"
        )
    if not all(0.0 <= weight <= 1.0 for weight in weights):
        raise ValueError(f"weights must lie in [0, 1], but got {list(weights)}")
    angle = torch.tensor(weights, dtype=torch.float64, device=start.device).mul(math.pi / 2.0).view(-1, 1, 1, 1)
    return angle.cos().to(start.dtype) * start + angle.sin().to(start.dtype) * end


def time_grid(num_inference_steps: int, timesteps: Sequence[float] | None = None) -> list[float]:
    """The times of the sampling steps, from 1 to 0: `timesteps` if given, else num_inference_steps equal steps.

    Raises ValueError for fewer than one step, or for times that do not decrease from 1 to 0.
    """
    if timesteps is None:
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, but got {num_inference_steps}")
        return torch.linspace(1.0, 0.0, num_inference_steps + 1, dtype=torch.float64).tolist()
    times = [float(time) for time in timesteps]
    decreases = all(later < earlier for earlier, later in itertools.pairwise(times))
    if len(times) < 2 or times[0] != 1.0 or times[-1] != 0.0 or not decreases:
        raise ValueError(f"timesteps must decrease from 1.0 to 0.0, both included, but got {times}")
    return times


def has_equal_steps(times: Sequence[float]) -> bool:
    """Whether the times from 1 to 0 are equally spaced, but for rounding."""
    return bool(np.allclose(times, time_grid(len(times) - 1), rtol=0.0, atol=1e-6))


def fresh_noise(noise: torch.Tensor, step: int) -> torch.Tensor:
    """Further standard normal noise, float32 (B, C, H, W) on the CPU, for multi-step consistency sampling.

    Sample i is a function of noise[i], the noise at t = 1, and the 0-based step, and so of (seed, step).
    """
    keys = noise.to("cpu", torch.float32).flatten(1)[:, :4].contiguous().view(torch.int32).tolist()
    rows = []
    for key in keys:
        sequence = np.random.SeedSequence([step, *(number % 2**32 for number in key)])
        seed = int(sequence.generate_state(1, np.uint64)[0]) % 2**63
        rows.append(torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)
