"""Evaluate: the sums of features of 50,000 samples, merged to one set."""

import pickle

import torch
from results import Experiment, Timing, scaled, timed

from meanflow_core.metrics import FeatureStatistics, ScoreSums
from pipelines.evaluate.chunks import CHUNK_SIZE, Span, spans
from pipelines.evaluate.sums import SetSums

NUM_FEATURES, NUM_SPATIAL, NUM_LOGITS = 2048, 2023, 1008  # Inception's


def experiments(num_images: int) -> dict[str, Experiment]:
    """The experiments of this part."""
    num_samples = scaled(50_000, num_images, 500)
    return {
        "sums": Experiment(
            measure=lambda num_workers: measure_sums(num_workers, num_samples), sizes=(8, 64, 512), unit="workers",
            simulated=f"the workers and their {num_samples:,} samples: one chunk's sums stand for all",
        )
    }  # fmt: skip


def messages(num_workers: int, num_samples: int) -> list[Span]:
    """What the driver receives sums for: one message per chunk, whatever the number of workers."""
    return spans(num_samples)


def measure_sums(num_workers: int, num_samples: int) -> dict[str, Timing]:
    """Receives the sums as `measure_sets` does, and merges them."""
    timings: dict[str, Timing] = {}
    features = torch.rand(CHUNK_SIZE, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    statistics, spatial = FeatureStatistics.of(features), FeatureStatistics.of(features[:, :NUM_SPATIAL])
    scores = ScoreSums.of(features[:, :NUM_LOGITS])
    message = pickle.dumps(SetSums("samples", {0: statistics}, {0: scores}, spatial, num_images=CHUNK_SIZE))
    received, spans_received = SetSums("samples"), messages(num_workers, num_samples)
    with timed(timings, "receive and merge all sums") as notes:
        for span in spans_received:
            sums: SetSums = pickle.loads(message)
            sums.groups, sums.scores = {span.group: sums.groups[0]}, {span.group: sums.scores[0]}
            received.add(sums)
        num_bytes = len(message) * len(spans_received)
        notes.append(f"{len(spans_received)} messages of {len(message) / 1e6:.0f} MB, {num_bytes / 1e9:.1f} GB in all")
    with timed(timings, "statistics of the whole set"):
        assert received.statistics.count == received.num_images
    return timings
