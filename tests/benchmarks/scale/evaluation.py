"""Evaluate: the sums of features of 50,000 samples, which workers merge to one per jackknife group."""

import pickle

import torch
from results import Experiment, Timing, fractions, scaled, timed

from meanflow_core.metrics import FeatureStatistics, ScoreSums
from pipelines.evaluate.chunks import CHUNK_SIZE, spans
from pipelines.evaluate.sums import NUM_GROUPS, SetSums, add_sums
from pipelines.evaluate.workers import FAN_IN

NUM_FEATURES, NUM_SPATIAL, NUM_LOGITS = 2048, 2023, 1008  # Inception's


def experiments(num_images: int) -> dict[str, Experiment]:
    """The experiments of this part."""
    num_samples = scaled(50_000, num_images, 500)
    return {
        "sums": Experiment(
            measure=measure_sums, sizes=fractions(num_samples), unit="samples",
            simulated="the workers, any number of them: one chunk's sums stand for all",
        )
    }  # fmt: skip


def measure_sums(num_samples: int) -> dict[str, Timing]:
    """Receives the sums as `measure_sets` does, and merges them."""
    timings: dict[str, Timing] = {}
    features = torch.rand(CHUNK_SIZE, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
    statistics, spatial = FeatureStatistics.of(features), FeatureStatistics.of(features[:, :NUM_SPATIAL])
    scores = ScoreSums.of(features[:, :NUM_LOGITS])
    message = pickle.dumps(SetSums("samples", {0: statistics}, {0: scores}, spatial, num_images=CHUNK_SIZE))
    received, num_chunks = SetSums("samples"), len(spans(num_samples))
    with timed(timings, "a worker's task: add 8 chunks") as notes:
        add_sums(*(pickle.loads(message) for _ in range(FAN_IN)))
        notes.append(f"{num_chunks} chunks in all")
    with timed(timings, "driver: receive and merge one sum per group") as notes:
        for group in range(NUM_GROUPS):
            sums: SetSums = pickle.loads(message)
            sums.groups, sums.scores = {group: sums.groups[0]}, {group: sums.scores[0]}
            received.add(sums)
        num_bytes = len(message) * NUM_GROUPS
        notes.append(f"{NUM_GROUPS} messages of {len(message) / 1e6:.0f} MB, {num_bytes / 1e9:.1f} GB in all")
    with timed(timings, "statistics of the whole set"):
        assert received.statistics.count == received.num_images
    return timings
