"""Times of training steps and of sampling, as medians of interleaved measurements."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meanflow_core.autoencoder import decode_latents
from meanflow_core.config import TrainingConfig
from meanflow_core.generator import load_pipeline
from meanflow_core.latents import LatentNormalization
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.training import build_train_state, train_step
from pipelines.compare.measuring_trials import SamplingPoint, draw_images
from pipelines.compare.methods import build_methods
from pipelines.latents.autoencoder import open_autoencoder
from pipelines.latents.cache import open_latents
from pipelines.train.batches import BatchSource

NUM_TIMED_IMAGES = 10


@dataclass(frozen=True, kw_only=True)
class SamplingTimes:
    """Times per image."""

    by_nfe: dict[int, dict[str, float]]
    """{NFE: {method: milliseconds of network and decoder together}}."""
    decoder: float
    """Milliseconds of the decoder alone."""


def interleaved_medians(
    actions: Mapping[str, Callable[[], object]], device: torch.device, num_rounds: int
) -> dict[str, float]:
    """{name: median seconds} of actions that alternate, A B C A B C, after one warm-up round.

    Interleaving spreads any drift of the machine's speed evenly over the actions.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(num_rounds + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number > 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_training(
    methods: Sequence[str], data: str, cache_dir: str, device: torch.device, num_rounds: int
) -> dict[str, float]:
    """{method: seconds of one training step}, all on the same batch."""
    dataset = open_latents(data, cache_dir)
    normalization = LatentNormalization.from_vae_config(open_autoencoder(data).config)

    def step_of(config: TrainingConfig) -> Callable[[], object]:
        state = build_train_state(config, **dataset.manifest.network_sizes, device=device)
        batches = BatchSource(dataset, config, rank=0, world_size=1, device=device).batches(0)
        return lambda: train_step(state, state.network, batches, normalization, config)

    steps = {name: step_of(method.config) for name, method in build_methods(1000).items() if name in methods}
    return interleaved_medians(steps, device, num_rounds)


def time_sampling(
    generators: dict[str, Path], nfe: Sequence[int], device: torch.device, num_rounds: int
) -> SamplingTimes:
    """Times sampling of NUM_TIMED_IMAGES images at a time from {method: generator folder}."""
    pipelines = {name: load_pipeline(folder, device) for name, folder in generators.items()}

    def drawing(pipeline: MeanFlowPipeline, count: int) -> Callable[[], object]:
        point = SamplingPoint(solver="euler", nfe=count)
        return lambda: draw_images(pipeline, point, range(NUM_TIMED_IMAGES))

    by_nfe = {}
    for count in nfe:
        actions = {name: drawing(pipeline, count) for name, pipeline in pipelines.items()}
        seconds = interleaved_medians(actions, device, num_rounds)
        by_nfe[count] = {name: 1000.0 / NUM_TIMED_IMAGES * value for name, value in seconds.items()}
    first = next(iter(pipelines.values()))
    latents = torch.randn(NUM_TIMED_IMAGES, *first.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    decoding = interleaved_medians({"decoder": lambda: decode_latents(first.vae, latents).cpu()}, device, num_rounds)
    return SamplingTimes(by_nfe=by_nfe, decoder=1000.0 / NUM_TIMED_IMAGES * decoding["decoder"])


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """The hardware and the torch version that the times were measured with."""
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "num_cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
