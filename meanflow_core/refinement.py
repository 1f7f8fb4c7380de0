"""One step of a refinement: the generator is trained by the Frechet loss of its own images' features.

Every worker generates its share of the global batch and sums the features. One all-reduce of these sums gives all workers
the global moments, from which each computes the exact gradient by its own images' features (`frechet.loss_gradient`). With
several passes, the images are generated twice: for the features of the whole batch, and for the gradient of each pass. So
the global batch does not depend on the memory.

    # B global batch, b images of a pass, C channels, H W latent size, D features, S image side
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed

from meanflow_core.autoencoder import Autoencoder
from meanflow_core.config import RefineConfig
from meanflow_core.frechet import FrechetReference, RawMoments, loss_gradient
from meanflow_core.latents import LatentNormalization
from meanflow_core.metrics import FeatureStatistics, merged
from meanflow_core.networks.interface import Conditioning, Network
from meanflow_core.objectives.draws import row_noise
from meanflow_core.sampling import time_grid
from meanflow_core.training import StepMetrics, TrainState, apply_gradients

# Purposes of noise, beside training's 0 and 1.
_NOISE_OF_STEP, _NOISE_OF_MEASUREMENT = 2, 3


Extract = Callable[[torch.Tensor], torch.Tensor]
"""Maps float pixels (b, 3, S, S) in [0, 255] to features (b, D), with a gradient."""


@dataclass(frozen=True, kw_only=True)
class RefineBatch:
    """The inputs of a pass, on one device."""

    noise: torch.Tensor
    """(b, C, H, W) float32: z at t = 1."""
    labels: torch.Tensor
    """(b,) int64."""


@dataclass(frozen=True, kw_only=True)
class FrechetTerm:
    """An extractor of the loss."""

    name: str
    features: Extract
    reference: FrechetReference
    moments: RawMoments
    """The moving moments, changed in place."""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Turns noise into pixels as the generator does, but with a gradient."""

    vae: Autoencoder
    num_inference_steps: int
    guidance_scale: float = 1.0
    """For networks with guidance inputs, as are the interval's ends."""
    guidance_interval_start: float = 0.0
    guidance_interval_end: float = 1.0

    def latents(self, network: Network, batch: RefineBatch) -> torch.Tensor:
        """Normalised latents (b, C, H, W) at t = 0: z_r = z_t - (t - r) u(z_t, r, t) in equal steps."""
        z = batch.noise
        ones = torch.ones(len(z), device=z.device)
        for t, r in itertools.pairwise(time_grid(self.num_inference_steps)):
            conditioning = Conditioning(
                t=t * ones,
                r=r * ones,
                labels=batch.labels,
                omega=self.guidance_scale * ones,
                guidance_interval_start=self.guidance_interval_start * ones,
                guidance_interval_end=self.guidance_interval_end * ones,
            )
            z = z - (t - r) * network(z, conditioning).average_velocity.float()
        return z

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents to pixels, float32 (b, 3, S, S) in [0, 255], within half a level of `decode_latents`.

        Not rounded: a rounding error of the network must not become a level of a pixel.
        """
        raw = LatentNormalization.from_vae_config(self.vae.config).denormalize(latents)
        return (self.vae.decode(raw.to(self.vae.dtype)).sample.float() * 127.5 + 127.5).clamp(0, 255)


def draw_batch(
    config: RefineConfig, class_counts: Sequence[int], step: int, start: int, stop: int, shape: tuple[int, int, int]
) -> RefineBatch:
    """Rows start to stop - 1 of the global batch of step `step`, on the CPU: a function of (seed, step, row).

    class_counts: images of each class in the data; labels are drawn in these proportions. shape: (C, H, W).
    """
    labels = _draw_labels(config.seed, _NOISE_OF_STEP, step, class_counts, config.global_batch_size)[start:stop]
    return RefineBatch(noise=row_noise(config.seed, _NOISE_OF_STEP, step, start, stop, shape), labels=labels)


def draw_measurement(
    config: RefineConfig, class_counts: Sequence[int], start: int, stop: int, shape: tuple[int, int, int]
) -> RefineBatch:
    """Samples start to stop - 1 of a measurement, on the CPU: the same in every measurement."""
    labels = _draw_labels(config.seed, _NOISE_OF_MEASUREMENT, 0, class_counts, config.measure_samples)[start:stop]
    return RefineBatch(noise=row_noise(config.seed, _NOISE_OF_MEASUREMENT, 0, start, stop, shape), labels=labels)


def _draw_labels(seed: int, purpose: int, step: int, class_counts: Sequence[int], num_rows: int) -> torch.Tensor:
    edges = np.cumsum(class_counts)
    images = np.random.default_rng([seed, purpose, step]).integers(int(edges[-1]), size=num_rows)
    return torch.from_numpy(np.searchsorted(edges, images, side="right"))


def refine_step(
    state: TrainState,
    render: Renderer,
    terms: Sequence[FrechetTerm],
    batches: Sequence[RefineBatch],
    config: RefineConfig,
    *,
    may_skip: bool = False,
) -> StepMetrics:
    """Takes one step on this worker's share of the global batch, in one pass per batch. Collective.

    The first `config.fill_steps` steps only add to the moving moments. may_skip: as in `train_step`. The metrics are the
    distances of the blended moments, one for each term.
    """
    state.network.zero_grad(set_to_none=True)
    is_filling = state.step < config.fill_steps
    extractors = [term.features for term in terms]
    # With one pass, the features of the first forward have the graph already.
    has_graph = len(batches) == 1 and not is_filling
    with torch.set_grad_enabled(has_graph):
        features = [_features(state.network, render, extractors, batch, config) for batch in batches]
    sums = [
        all_reduced(merged([_sums(of_pass[number].detach()) for of_pass in features])) for number in range(len(terms))
    ]
    share = 1.0 / (state.step + 1) if is_filling else 1.0 - config.moments_decay
    blended = [
        term.moments.blended(RawMoments.of(term_sums), share) for term, term_sums in zip(terms, sums, strict=True)
    ]
    if not all(bool(torch.isfinite(moments.second).all()) for moments in blended):
        # Generated images were nonfinite: the same on all workers, after the reduction.
        state.step += 1
        state.num_skipped += may_skip
        nonfinite = torch.full((), math.nan, device=batches[0].noise.device)
        return StepMetrics(
            sums=_metric_sums(terms, [math.nan] * len(terms), nonfinite), gradient_norm=nonfinite, skipped=may_skip
        )
    gradients = [
        loss_gradient(moments, term.reference, share, config.global_batch_size)
        for term, moments in zip(terms, blended, strict=True)
    ]
    if is_filling:
        state.step += 1
        gradient_norm, skipped = torch.zeros((), device=batches[0].noise.device), False
    else:
        for number, batch in enumerate(batches):
            outputs = features[number] if has_graph else _features(state.network, render, extractors, batch, config)
            by_outputs = [
                term.weight * gradient.by_features(output.detach())
                for term, gradient, output in zip(terms, gradients, outputs, strict=True)
            ]
            torch.autograd.backward(outputs, by_outputs)
        _all_reduce_gradients(state)
        gradient_norm, skipped = apply_gradients(state, config, may_skip=may_skip)
    if not skipped:
        for term, moments in zip(terms, blended, strict=True):
            term.moments.copy_(moments)
    return StepMetrics(
        sums=_metric_sums(terms, [g.distance for g in gradients], gradient_norm),
        gradient_norm=gradient_norm,
        skipped=skipped,
    )


def _features(
    network: Network,
    render: Renderer,
    extractors: Sequence[Extract],
    batch: RefineBatch,
    config: RefineConfig,
    *,
    as_levels: bool = False,
) -> list[torch.Tensor]:
    """Features (b, D) of every extractor, float32. as_levels: of the pixels rounded as `decode_latents` does."""
    device = batch.noise.device.type
    with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
        latents = render.latents(network, batch)
    with torch.autocast(device, torch.bfloat16, enabled=config.frozen_precision == "bfloat16"):
        pixels = render.pixels(latents)
        pixels = (pixels + 0.5).floor().clamp(max=255.0) if as_levels else pixels
        return [extract(pixels).float() for extract in extractors]


def _sums(features: torch.Tensor) -> FeatureStatistics:
    """Like `FeatureStatistics.of`, but nonfinite features pass: they must reach all workers, which then act alike."""
    values = features.double()
    return FeatureStatistics(len(values), values.sum(dim=0), values.T @ values)


def all_reduced(statistics: FeatureStatistics) -> FeatureStatistics:
    """The sum over all workers, in one reduction. Collective."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return statistics
    count = torch.tensor([float(statistics.count)], dtype=torch.float64, device=statistics.total.device)
    flat = torch.cat([count, statistics.total, statistics.outer.flatten()])
    distributed.all_reduce(flat)
    size = len(statistics.total)
    return FeatureStatistics(round(float(flat[0])), flat[1 : 1 + size], flat[1 + size :].view(size, size))


def _all_reduce_gradients(state: TrainState) -> None:
    """Adds up the gradients of all workers."""
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        gradients = [value.grad for value in state.network.parameters() if value.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        )


def _metric_sums(terms: Sequence[FrechetTerm], distances: Sequence[float], gradient_norm: torch.Tensor) -> torch.Tensor:
    """`StepMetrics.sums`: the weighted mean distance's share of this worker, then for each term its distance and 1."""
    num_workers = distributed.get_world_size() if distributed.is_initialized() else 1
    weights = [term.weight for term in terms]
    mean = sum(weight * distance for weight, distance in zip(weights, distances, strict=True)) / sum(weights)
    pairs = itertools.chain.from_iterable((distance, 1.0) for distance in distances)
    return torch.tensor([mean / num_workers, *pairs], device=gradient_norm.device)


@torch.no_grad()
def measure(
    network: Network,
    render: Renderer,
    extractors: Sequence[Extract],
    batches: Iterable[RefineBatch],
    config: RefineConfig,
) -> list[FeatureStatistics]:
    """Sums of every extractor's features over all batches of all workers. Collective."""
    sums: list[FeatureStatistics] = []
    for batch in batches:
        features = _features(network, render, extractors, batch, config, as_levels=True)
        of_batch = [_sums(of_extractor) for of_extractor in features]
        sums = [total + part for total, part in zip(sums, of_batch, strict=True)] if sums else of_batch
    return [all_reduced(total) for total in sums]
