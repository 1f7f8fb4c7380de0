"""Measures how much an image depends on the other images of its batch, in float32 and bfloat16.

    python tests/benchmarks/batch_independence.py --json batch.json

An image should depend only on the weights, class, seed and number of steps. Compares 16 images generated one by one with
the same images generated in one batch, in 1 and 4 steps, with a randomly initialized DiT-S/2 and the demo's autoencoder.
Differences are in 8-bit levels (0 to 255).
"""

import argparse

import torch
from _harness import main

from meanflow_core.autoencoder import load_autoencoder
from meanflow_core.generator import build_pipeline
from meanflow_core.networks.building import build_network
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.presets.meanflow import dit_network
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER

NUM_IMAGES, NUM_CLASSES = 16, 10
BOUNDS = {"float32_1_steps_largest_levels": ("<=", 1.0), "float32_4_steps_largest_levels": ("<=", 1.0)}


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """The largest and mean absolute difference over all pixels."""
    torch.manual_seed(0)
    network = build_network(dit_network("S", 2), sample_size=8, in_channels=4, num_classes=NUM_CLASSES)
    with torch.no_grad():  # a freshly initialized network returns zero for every input
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    pipeline = build_pipeline(network.eval(), load_autoencoder(str(SHIPPED_AUTOENCODER)), []).to(arguments.device)
    figures = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        pipeline.transformer.to(dtype)
        for steps in (1, 4):
            difference = batch_difference(pipeline, steps)
            figures[f"{name}_{steps}_steps_largest_levels"] = float(difference.max())
            figures[f"{name}_{steps}_steps_mean_levels"] = float(difference.mean())
    return figures


def batch_difference(pipeline: MeanFlowPipeline, steps: int) -> torch.Tensor:
    """Absolute differences between images generated in one batch and one by one."""
    labels, seeds = [index % NUM_CLASSES for index in range(NUM_IMAGES)], list(range(NUM_IMAGES))
    batched = pipeline.images_from_seeds(labels, seeds, steps)
    single = [pipeline.images_from_seeds([label], [seed], steps) for label, seed in zip(labels, seeds, strict=True)]
    assert batched.float().std() > 10.0, "the images must not be uniform"
    return (batched.int() - torch.cat(single).int()).abs().float()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    main(measure, BOUNDS, parser)
