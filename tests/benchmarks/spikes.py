"""Shows which guard of the loss holds against spikes, on a MeanFlow training that is made to spike.

    python tests/benchmarks/spikes.py --latents build/compare/latents --figure docs/images/spikes.png --json spikes.json

The comparison's network trains with a learning rate that is too large and without warm-up, on the plain squared error, and at
times close to 1 (logit mean 2): the error rises by a factor of ten within the first steps. Each run has another guard.
Reports the largest of the steps' mean squared errors at t >= 0.9 (samples with r < t and with r = t), and the step from which
that error, averaged over ten steps, stays below RECOVERED. Medians over the seeds. `make compare` writes the latents.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from _harness import main

from meanflow_core.config import GuardConfig, MeanFlowConfig, OptimizerConfig, TimeSamplingConfig, TrainingConfig
from meanflow_core.latents import LatentNormalization
from meanflow_core.objectives.interface import build_objective
from meanflow_core.presets.demo import COMPARISON_GUIDANCE, comparison
from meanflow_core.training import build_train_state, read_means, train_step
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.cache import open_latents
from pipelines.train.batches import BatchSource

GUARDS = {
    "none": GuardConfig(),
    "target_clamped_to_4": GuardConfig(max_target=4.0),
    "error_clamped_to_1": GuardConfig(max_error=1.0),
    "error_normalized": GuardConfig(normalize_error=True),
}


RECOVERED = 300.0  # before training, the error is about 500; after it, 200


def spiking(guards: GuardConfig, seed: int, arguments: argparse.Namespace) -> TrainingConfig:
    """The training that is made to spike."""
    times = TimeSamplingConfig(logit_mean=2.0, logit_std=1.0, fraction_r_below_t=0.5)
    return replace(
        comparison(MeanFlowConfig(times=times, guidance=COMPARISON_GUIDANCE, norm_p=arguments.norm_p, guards=guards)),
        optimizer=OptimizerConfig(learning_rate=arguments.learning_rate),
        num_steps=arguments.steps,
        seed=seed,
    )


def squared_errors(config: TrainingConfig, latents: str) -> tuple[list[float], list[float]]:
    """The mean squared error of the samples with t >= 0.9 at each step, and the share of samples that a guard changed."""
    dataset = open_latents(latents, "none")
    normalization = LatentNormalization.from_vae_config(open_autoencoder(latents).config)
    device = torch.device("cpu")
    state = build_train_state(config, **dataset.manifest.network_sizes, device=device)
    source = BatchSource(dataset, config, rank=0, world_size=1, device=device)
    names = build_objective(config.loss).metric_names
    errors, touched = [], []
    for step in range(config.num_steps):
        metrics = train_step(state, state.network, source.batches(step), normalization, config)
        means = read_means(names, metrics.sums)
        errors.append(means["squared_error_by_t/0.9"])  # at these times, most samples of a step
        touched.append(means.get("guarded_share", 0.0))
    return errors, touched


def recovery_step(errors: list[float]) -> int:
    """The step from which the average over ten steps stays below RECOVERED; the number of steps if it never does."""
    averages = np.convolve(errors, np.ones(10) / 10, mode="valid")
    above = np.flatnonzero(averages >= RECOVERED)
    return int(above[-1]) + 10 if len(above) else 0


def plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Squared errors against the step, one panel per guard and one curve per seed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(curves), figsize=(3.2 * len(curves), 3.2), layout="constrained", sharey=True
    )
    for axis, (name, seeds) in zip(panels, curves.items(), strict=True):
        for curve in seeds:
            axis.plot(curve, lw=0.8)
        axis.set(title=name.replace("_", " "), xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("mean squared error at t ≥ 0.9")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Trains with each guard and seed."""
    torch.set_num_threads(1)
    curves: dict[str, list[list[float]]] = {}
    figures: dict[str, float] = {}
    for name, guards in GUARDS.items():
        runs = [squared_errors(spiking(guards, seed, arguments), arguments.latents) for seed in range(arguments.seeds)]
        curves[name] = [errors for errors, _ in runs]
        figures |= {
            f"{name}_largest_squared_error": statistics.median(max(errors) for errors, _ in runs),
            f"{name}_recovery_step": statistics.median(recovery_step(errors) for errors, _ in runs),
            f"{name}_share_of_samples_changed": statistics.fmean(statistics.fmean(touched) for _, touched in runs),
        }
    if arguments.figure is not None:
        plot(curves, arguments.figure)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--latents", default="build/compare/latents")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=2e-2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--norm-p", type=float, default=0.0)
    main(measure, {}, parser)
