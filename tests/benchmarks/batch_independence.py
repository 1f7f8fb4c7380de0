"""How much an image changes with the other images of its batch, in float32 and bfloat16.

    python tests/benchmarks/batch_independence.py --json batch.json

An image should be a function of (weights, class, seed, steps). Compares 16 images generated one by one and in one batch,
in 1 and 4 steps, with a random network of size S and the demo's autoencoder. Differences are in levels of 255.
"""

import argparse

import torch
from _harness import main

from meanflow_core.autoencoder import load_autoencoder
from meanflow_core.generator import build_pipeline
from meanflow_core.networks import build_network
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.presets import dit_network
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER

NUM_IMAGES, NUM_CLASSES = 16, 10
BOUNDS = {"float32_1_steps_largest_levels": ("<=", 1.0), "float32_4_steps_largest_levels": ("<=", 1.0)}


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Largest and mean difference of a pixel."""
    torch.manual_seed(0)
    network = build_network(dit_network("S", 2), sample_size=8, in_channels=4, num_classes=NUM_CLASSES)
    with torch.no_grad():
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
