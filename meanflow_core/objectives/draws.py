"""The random draws of a training step: times, noise, dropped labels and guidance.

Times, labels and guidance are few numbers, so every worker draws those of the global batch. Noise is drawn by row, so
each worker draws only its own rows.

# B batch, C channels, H W latent size
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from meanflow_core.config import GuidanceSamplingConfig, ImprovedMeanFlowConfig, LossConfig, TimeSamplingConfig
from meanflow_core.networks.interface import Conditioning, TensorFields

GUIDANCE_INPUTS = ("omega", "guidance_interval_start", "guidance_interval_end")
VECTORS = ("t", "r", "label_dropped", "mirrored", *GUIDANCE_INPUTS)


@dataclass(frozen=True, kw_only=True)
class StepDraws(TensorFields):
    """All random draws of some samples of a step."""

    t: torch.Tensor
    """(B,) float32 in [0, 1]."""
    r: torch.Tensor
    """(B,) float32 in [0, t]."""
    noise: torch.Tensor
    """(B, C, H, W) float32, standard normal: e in z_t."""
    posterior_noise: torch.Tensor
    """(B, C, H, W) float32, standard normal: for sampling latents from moments."""
    label_dropped: torch.Tensor
    """(B,) bool: whether the null class replaces the sample's label."""
    mirrored: torch.Tensor
    """(B,) bool: whether to use the moments of the horizontally flipped image."""
    omega: torch.Tensor | None = None
    """(B,) float32, at least 1: guidance scale, for improved MeanFlow."""
    guidance_interval_start: torch.Tensor | None = None
    """(B,) float32 in [0, 1], for improved MeanFlow."""
    guidance_interval_end: torch.Tensor | None = None
    """(B,) float32 in [guidance_interval_start, 1], for improved MeanFlow."""

    def rows(self, start: int, stop: int) -> "StepDraws":
        """The draws of samples start to stop - 1, for one worker or one micro-batch."""
        return self.map(lambda value: value[start:stop])

    def conditioning(self, labels: torch.Tensor, null_label: int) -> Conditioning:
        """The network's inputs besides z_t. labels: int64 (B,), before null_label replaces the dropped ones."""
        guidance = {name: getattr(self, name) for name in GUIDANCE_INPUTS}
        classes = torch.where(self.label_dropped, null_label, labels)
        return Conditioning(t=self.t, r=self.r, labels=classes, **guidance)


@dataclass(frozen=True, kw_only=True)
class DrawnStep:
    """The draws of a step's global batch, as `rows` gives them."""

    vectors: dict[str, torch.Tensor]
    """The fields of StepDraws without noise, each (B,)."""
    seed: int
    step: int
    latent_shape: tuple[int, int, int]
    """(C, H, W)."""

    def rows(self, start: int, stop: int) -> StepDraws:
        """The draws of samples start to stop - 1, for one worker or one micro-batch."""
        return StepDraws(
            **{name: values[start:stop] for name, values in self.vectors.items()},
            noise=self._noise(0, start, stop),
            posterior_noise=self._noise(1, start, stop),
        )

    def _noise(self, purpose: int, start: int, stop: int) -> torch.Tensor:
        return row_noise(self.seed, purpose, self.step, start, stop, self.latent_shape)


def row_noise(
    seed: int, purpose: int, step: int, start: int, stop: int, latent_shape: tuple[int, int, int]
) -> torch.Tensor:
    """Standard normal noise of rows start to stop - 1, float32 (b, C, H, W): row i is a function of (seed, step, i).

    purpose: separates draws of the same step.
    """
    noise = np.empty((stop - start, *latent_shape), np.float32)
    for row, values in enumerate(noise, start=start):
        # A counter-based generator: every row of every step has 2^64 blocks of numbers of its own.
        bits = np.random.Philox(key=[seed, purpose], counter=[0, row, step, 0])
        np.random.Generator(bits).standard_normal(dtype=np.float32, out=values)
    return torch.from_numpy(noise)


def check_draws(draws: StepDraws) -> None:
    """Raises ValueError for mismatched shapes, non-finite noise, or times that violate 0 <= r <= t <= 1.

    The draws must be on the CPU, because their values are read.
    """
    vectors = {name: value for name in VECTORS if (value := getattr(draws, name)) is not None}
    t, r, noise = draws.t, draws.r, draws.noise
    shapes = [tuple(value.shape) for value in vectors.values()]
    if t.dim() != 1 or set(shapes) != {tuple(t.shape)} or noise.dim() != 4 or len(noise) != len(t):
        raise ValueError(
            f"{', '.join(vectors)} must have shape (B,) and noise (B, C, H, W), but got "
            f"{', '.join(map(str, shapes))} and {tuple(noise.shape)}"
        )
    if draws.posterior_noise.shape != noise.shape:
        raise ValueError(
            f"posterior_noise must have noise's shape {tuple(noise.shape)}, but got {tuple(draws.posterior_noise.shape)}"
        )
    is_valid = (r >= 0) & (r <= t) & (t <= 1)
    if not bool(is_valid.all()):
        row = int(is_valid.int().argmin())
        raise ValueError(
            f"times must satisfy 0 <= r <= t <= 1 in every row, but row {row} has r = {r[row]:g}, t = {t[row]:g}"
        )
    if not bool(torch.isfinite(noise).all()):
        raise ValueError("noise must be finite")


def r_below_t_mask(num_rows: int, fraction: float) -> torch.Tensor:
    """Selects the rows of a batch with r < t, bool (B,): row i if floor((i + 1) rho) > floor(i rho).

    These are floor(B rho) rows, spread evenly: each contiguous share of the batch has the same fraction of them, to
    within one row.
    """
    # limit_denominator undoes binary rounding: Fraction(0.7) is below 7/10 and would lose a row.
    rho = Fraction(fraction).limit_denominator(10_000)
    edges = torch.arange(num_rows + 1) * rho.numerator // rho.denominator
    return edges[1:] > edges[:-1]


def draw_two_times(
    num_rows: int, config: TimeSamplingConfig, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws t and r, float32 (B,), 0 <= r <= t <= 1.

    t is the larger of two logit-normal times. r is the smaller one in the rows of `r_below_t_mask`, and t in the others.
    Source: Geng et al. 2025, Section 4.3 and Tables 1a, 1d.
    """
    logits = config.logit_mean + config.logit_std * torch.randn(2, num_rows, generator=generator)
    times = torch.sigmoid(logits)
    t, r = times.amax(dim=0), times.amin(dim=0)
    return t, torch.where(r_below_t_mask(num_rows, config.fraction_r_below_t), r, t)


def draw_omega(num_rows: int, config: GuidanceSamplingConfig, generator: torch.Generator) -> torch.Tensor:
    """Draws guidance scales, float32 (B,) in [1, omega_max], with density proportional to omega^-beta.

    Method: inverts the distribution function F(w) = (w^b - 1) / (omega_max^b - 1) with b = 1 - beta, or
    F(w) = log w / log omega_max for beta = 1.
    """
    uniform = torch.rand(num_rows, generator=generator)
    exponent, log_max = 1.0 - config.omega_power, math.log(config.omega_max)
    if exponent == 0.0:
        return torch.exp(uniform * log_max)
    return torch.exp(torch.log1p(uniform * math.expm1(exponent * log_max)) / exponent)


def draw_guidance_interval(
    below: torch.Tensor, config: GuidanceSamplingConfig, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the start and the end of each guidance interval, float32 (B,), uniformly on either side of the split.

    Rows with r = t get the interval [0, 1]. below: (B,) bool, the rows with r < t.
    """
    start, end = torch.rand(2, len(below), generator=generator)
    start = torch.where(below, start * config.interval_split, 0.0)
    end = torch.where(below, config.interval_split + end * (1.0 - config.interval_split), 1.0)
    return start, end


def draw_step(
    config: LossConfig,
    draw_times: Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]],
    *,
    fraction_r_below_t: float,
    seed: int,
    step: int,
    num_rows: int,
    latent_shape: tuple[int, int, int],
) -> DrawnStep:
    """Draws the *global* batch of B = num_rows samples, on the CPU, as a pure function of (seed, step).

    draw_times: maps (B, generator) to t and r, each float32 (B,), with r < t in the rows of `r_below_t_mask`.
    latent_shape: (C, H, W).

    Let p be label_drop_probability and rho be fraction_r_below_t. As in the authors' code, labels are dropped only on
    rows with r = t, each with probability p / (1 - rho). If p > 1 - rho, there are too few such rows, and labels are
    dropped on all rows with probability p.
    """
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state) % 2**63)
    t, r = draw_times(num_rows, generator)
    uniform = torch.rand(num_rows, generator=generator)
    probability, rho = config.label_drop_probability, fraction_r_below_t
    below = r_below_t_mask(num_rows, rho)
    if probability <= 1.0 - rho + 1e-9:  # in floating point, 1 - 0.9 is slightly below 0.1
        label_dropped = ~below & (uniform * (1.0 - rho) < probability)
    else:
        label_dropped = uniform < probability
    mirrored = torch.rand(num_rows, generator=generator) < 0.5
    guidance: dict[str, torch.Tensor] = {}
    if isinstance(config, ImprovedMeanFlowConfig):
        omega = draw_omega(num_rows, config.guidance_sampling, generator)
        interval = draw_guidance_interval(below, config.guidance_sampling, generator)
        guidance = dict(zip(GUIDANCE_INPUTS, (omega, *interval), strict=True))
    vectors = {"t": t, "r": r, "label_dropped": label_dropped, "mirrored": mirrored, **guidance}
    return DrawnStep(vectors=vectors, seed=seed, step=step, latent_shape=latent_shape)
