"""Compares class-conditional MeanFlow and flow matching on scikit-learn's handwritten digits, 8x8 pixels."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits

from meanflow_core.config import DiTConfig, MeanFlowConfig, OptimizerConfig, TimeSamplingConfig, TrainingConfig
from meanflow_core.generator import build_pipeline
from meanflow_core.latents import LatentNormalization
from meanflow_core.metrics import FeatureStatistics, frechet_distance
from meanflow_core.training import Batch, build_train_state, train_step
from tests.support.objectives import draw_record

IDENTITY = LatentNormalization(mean=(0.0,), std=(1.0,))
FLOW_MATCHING = TrainingConfig(
    network=DiTConfig(patch_size=2, hidden_size=64, depth=3, num_heads=4),
    loss=MeanFlowConfig(times=TimeSamplingConfig(fraction_r_below_t=0.0)),
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=100, cooldown_steps=400),
    ema_decays=(0.99,),
    global_batch_size=128,
    num_steps=1200,
)
MEANFLOW = replace(FLOW_MATCHING, loss=MeanFlowConfig(times=TimeSamplingConfig(fraction_r_below_t=0.5)))


def train(config, images, labels):
    state = build_train_state(config, sample_size=8, in_channels=1, num_classes=10, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    for step in range(config.num_steps):
        rows = torch.randint(len(images), (config.global_batch_size,), generator=generator)
        record = draw_record(config.loss, seed=0, step=step, num_rows=config.global_batch_size, latent_shape=(1, 8, 8))
        moments = torch.cat([images[rows], torch.zeros_like(images[rows])], dim=1)  # standard deviation 0
        batch = Batch(moments=moments, labels=labels[rows], record=record)
        train_step(state, state.network, [batch], IDENTITY, config)
    names = [str(digit) for digit in range(10)]
    return build_pipeline(state.ema_network, None, names, prediction=config.loss.prediction)


def distances(config, numbers_of_steps):
    """Trains on one thread, and returns the Frechet distance in pixel space for each number of sampling steps."""
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    labels = torch.tensor(digits.target)
    real = FeatureStatistics.of(images.flatten(1))
    pipeline = train(config, images, labels)

    def distance(num_steps):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
        samples = pipeline.sample_latents(labels.tolist(), noise, num_steps)
        return frechet_distance(FeatureStatistics.of(samples.flatten(1)), real)

    return [distance(num_steps) for num_steps in numbers_of_steps]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_one_step_of_meanflow_matches_sixteen_steps_of_flow_matching():
    # Two processes with one thread each, because a second thread does not speed up small matrices.
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        trainings = [processes.submit(distances, FLOW_MATCHING, (1, 16)), processes.submit(distances, MEANFLOW, (1,))]
        (one, sixteen), (ours,) = (training.result() for training in trainings)
    print(f"flow matching: {one:.3f} in 1 step, {sixteen:.3f} in 16; MeanFlow: {ours:.3f} in 1")
    assert ours <= 1.2 * sixteen
    assert ours <= 0.25 * one
