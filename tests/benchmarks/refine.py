"""Measures the cost of a refinement's step relative to a MeanFlow training step of the same network and batch.

    python tests/benchmarks/refine.py --json refine.json
    python tests/benchmarks/refine.py --json refine.json --extractor efficientnet-lite0 --batch-size 16

The demo's generator with its decoder, random weights, one process. The prediction is the ratio of the FLOPs that the dry
runs of both stages count. The preset xl2 is predicted only, with an autoencoder of Stable Diffusion's size at 256 px.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, even if another copy is installed

import torch
from _harness import interleaved_medians, main, write_demo_generator

from meanflow_core.config import RefineConfig, TrainingConfig
from meanflow_core.frechet import FrechetReference, RawMoments
from meanflow_core.generator import build_pipeline, save_generator
from meanflow_core.latents import LatentNormalization
from meanflow_core.metrics import FeatureStatistics
from meanflow_core.networks.building import build_network
from meanflow_core.objectives.interface import build_objective
from meanflow_core.presets import PRESETS, refinement
from meanflow_core.refinement import FrechetTerm, draw_batch, refine_step
from meanflow_core.training import Batch, build_train_state, new_train_state, train_step
from pipelines.demo.judge import SHIPPED_JUDGE
from pipelines.extractors.interface import Extractor
from pipelines.extractors.opening import EFFICIENTNET, open_extractor
from pipelines.extractors.reference import Reference
from pipelines.plan.cost import step_flops
from pipelines.refine.costs import image_cost
from pipelines.refine.inputs import Generator, Metric, open_generator
from pipelines.refine.job import RefineJob
from tests.benchmarks.serve import build_sd_autoencoder

DEMO_SIZES = {"sample_size": 8, "in_channels": 4, "num_classes": 10}
XL2_SIZES = {"sample_size": 32, "in_channels": 4, "num_classes": 1000}
MINIMUM_IMAGES = 200  # of the reference; its moments do not change the cost of a step


def new_job(generator: Path, config: RefineConfig) -> RefineJob:
    """A job whose files are not read, except the generator."""
    unused = {"references": ("none",), "held_out_references": ("none",), "held_out_extractors": ("none",)}
    return RefineJob(
        model=str(generator), extractors=("none",), storage="none", run_name="none", config=config, **unused
    )


def new_metric(extractor: Extractor, image_size: int) -> Metric:
    """The extractor, with the moments of random images as its reference."""
    images = torch.rand(MINIMUM_IMAGES, 3, image_size, image_size) * 255
    with torch.inference_mode():
        features = torch.cat([extractor.pooled(part) for part in images.split(20)])
    reference = Reference(FeatureStatistics.of(features), None, None, None, "none", "none")
    return Metric("extractor", extractor, reference, weight=1.0)


def predict(
    training: TrainingConfig, sizes: dict[str, int], job: RefineJob, generator: Generator, metric: Metric
) -> float:
    """FLOPs of a refinement's step in one pass over those of a training step with as many images."""
    cost = image_cost(job, generator, [metric])
    per_image = step_flops(training, **sizes) / training.global_batch_size
    return (cost.forward_flops + cost.backward_flops) / per_image


def new_training_step(config: TrainingConfig):
    """A function that takes a MeanFlow step on random latents of the demo's size."""
    state = build_train_state(config, **DEMO_SIZES, device=torch.device("cpu"))
    rows, shape = (
        config.global_batch_size,
        (DEMO_SIZES["in_channels"], DEMO_SIZES["sample_size"], DEMO_SIZES["sample_size"]),
    )
    objective = build_objective(config.loss)
    draws = objective.draw(seed=0, step=0, num_rows=rows, latent_shape=shape)
    batch = Batch(
        moments=torch.randn(rows, 2 * shape[0], *shape[1:]).abs(),
        labels=torch.arange(rows) % DEMO_SIZES["num_classes"],
        record=objective.record(draws, 0, rows),
    )
    identity = LatentNormalization(mean=(0.0,) * shape[0], std=(1.0,) * shape[0])
    return lambda: train_step(state, state.network, [batch], identity, config)


def new_refine_step(generator: Generator, metric: Metric, config: RefineConfig):
    """A function that takes a step after the moments are filled."""
    state = new_train_state(generator.network.requires_grad_(True), config, device=torch.device("cpu"))
    term = FrechetTerm(
        name="extractor",
        features=metric.extractor.pooled,
        reference=FrechetReference.of(metric.reference.moments),
        moments=RawMoments.zeros(len(metric.reference.moments.mean)),
    )
    batch = draw_batch(config, [1] * 10, 0, 0, config.global_batch_size, generator.pipeline.latent_shape)
    renderer = generator.renderer(1)
    return lambda: refine_step(state, renderer, [term], [batch], config)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Times both steps in turns, and predicts their ratio for the demo and for XL/2."""
    torch.set_num_threads(arguments.threads)
    training = replace(PRESETS["demo"](), global_batch_size=arguments.batch_size)
    config = replace(refinement.demo(), global_batch_size=arguments.batch_size, fill_steps=1)
    extractor = open_extractor(arguments.extractor, None, "cpu")
    with tempfile.TemporaryDirectory() as name:
        job = new_job(write_demo_generator(Path(name, "demo")), config)
        generator, metric = open_generator(job), new_metric(extractor, 64)
        figures = {"predicted_over_meanflow": predict(training, DEMO_SIZES, job, generator, metric)}
        functions = {"meanflow": new_training_step(training), "refine": new_refine_step(generator, metric, config)}
        medians = interleaved_medians(functions, arguments.rounds)
        figures |= {f"{name}_seconds": seconds for name, seconds in medians.items()}
        figures["measured_over_meanflow"] = medians["refine"] / medians["meanflow"]
        if arguments.xl2:
            figures["predicted_xl2_over_meanflow"] = predict_xl2(Path(name, "xl2"))
    return figures


def predict_xl2(folder: Path) -> float:
    """The prediction for MeanFlow-XL/2 at 256 px, on EfficientNet-Lite0's features."""
    training = PRESETS["xl2"]()
    network = build_network(training.network, **XL2_SIZES).eval()
    save_generator(build_pipeline(network, build_sd_autoencoder(), [str(label) for label in range(1000)]), folder)
    # Both counts without recomputation: neither a checkpointed decoder nor a separate pass for du/dt.
    job = new_job(folder, replace(refinement.xl2(), decoder_checkpointing=False))
    metric = new_metric(open_extractor(EFFICIENTNET, None, "cpu"), 256)
    return predict(training, XL2_SIZES, job, open_generator(job), metric)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extractor", default=str(SHIPPED_JUDGE), help="extractor to train on, as in pipelines.refine")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--xl2", action="store_true", help="also predict XL/2 (needs 8 GB and EfficientNet-Lite0)")
    main(measure, {}, parser)
