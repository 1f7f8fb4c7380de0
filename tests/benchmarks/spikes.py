"""Shows which guard of the loss holds against spikes, on a MeanFlow training that is made to spike.

    python tests/benchmarks/spikes.py --latents build/compare/latents --figure docs/spikes.png --json spikes.json

The comparison's network trains with a learning rate that is too large, and times close to 1 (logit mean 2). Each run has
another guard. Reports, for the steps after the first half, the largest and the median squared error of the samples with
t > 0.9 and r < t: their ratio is the height of the spikes. `make compare` writes the latents.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import matplotlib
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


def spiking(guards: GuardConfig, arguments: argparse.Namespace) -> TrainingConfig:
    """The training that is made to spike."""
    times = TimeSamplingConfig(logit_mean=2.0, logit_std=1.0, fraction_r_below_t=0.5)
    return replace(
        comparison(MeanFlowConfig(times=times, guidance=COMPARISON_GUIDANCE, norm_p=arguments.norm_p, guards=guards)),
        optimizer=OptimizerConfig(learning_rate=arguments.learning_rate),
        num_steps=arguments.steps,
    )


def squared_errors(config: TrainingConfig, latents: str) -> tuple[list[float], list[float]]:
    """The mean squared error of the samples with t > 0.9 at each step, and the share of samples that a guard changed."""
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
        errors.append(means["squared_error_by_t/0.9"])
        touched.append(means.get("guarded_share", 0.0))
    return errors, touched


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """Squared errors against the step, one panel per guard."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(curves), figsize=(3.2 * len(curves), 3.2), layout="constrained", sharey=True
    )
    for axis, (name, curve) in zip(panels, curves.items(), strict=True):
        axis.plot(curve, lw=0.7)
        axis.set(title=name.replace("_", " "), xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("squared error at t > 0.9")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Trains once with each guard."""
    torch.set_num_threads(1)
    curves, figures = {}, {}
    for name, guards in GUARDS.items():
        curves[name], touched = squared_errors(spiking(guards, arguments), arguments.latents)
        later = curves[name][arguments.steps // 2 :]
        figures |= {
            f"{name}_median_squared_error": statistics.median(later),
            f"{name}_largest_over_median": max(later) / statistics.median(later),
            f"{name}_share_of_samples_changed": statistics.fmean(touched[arguments.steps // 2 :]),
        }
    if arguments.figure is not None:
        plot(curves, arguments.figure)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--latents", default="build/compare/latents")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=3e-2)
    parser.add_argument("--norm-p", type=float, default=0.5)
    main(measure, {}, parser)
