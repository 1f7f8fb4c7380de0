from dataclasses import replace

import numpy as np
import pytest
import torch

from meanflow_core.presets.demo import debug
from pipelines.latents.dataset import LatentDataset
from pipelines.latents.sample_order import samples_of_step
from pipelines.train.batches import BatchSource, Prefetcher
from tests.support.objectives import draw_record
from tests.support.training_jobs import small_manifest


@pytest.fixture(scope="module")
def dataset():
    """Fifty samples. Sample i has moments i, mirrored moments -i and label i mod 7."""
    moments = np.arange(50, dtype=np.float16)[:, None, None, None] + np.zeros((8, 8, 8), np.float16)
    return LatentDataset(small_manifest(50), [moments], [-moments], np.arange(50) % 7)


def source_of(dataset, config, rank=0, world_size=1, samples_per_pass=None):
    return BatchSource(
        dataset, config, rank=rank, world_size=world_size, device=torch.device("cpu"), samples_per_pass=samples_per_pass
    )


@pytest.mark.parametrize(("samples_per_pass", "num_passes"), [(None, 1), (3, 2), (1, 5)])
def test_shares_of_all_workers_concatenate_to_the_global_batch(dataset, samples_per_pass, num_passes):
    [whole] = source_of(dataset, debug()).batches(step=2)  # within the first epoch
    parts = [
        batch for rank in range(3) for batch in source_of(dataset, debug(), rank, 3, samples_per_pass).batches(step=2)
    ]
    assert len(parts) == 3 * num_passes
    assert torch.equal(torch.cat([part.moments for part in parts]), whole.moments)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert torch.equal(torch.cat([part.record.draws.noise for part in parts]), whole.record.draws.noise)
    values = whole.moments[:, 0, 0, 0]
    assert torch.equal(values < 0, whole.record.mirrored & (values != 0))
    assert torch.equal(whole.labels, values.abs().long() % 7)
    assert len(values.abs().unique()) == 16


@pytest.mark.parametrize(("seed", "step"), [(0, 2), (4, 2), (0, 5)])
def test_samples_and_draws_are_a_function_of_seed_and_step(dataset, seed, step):
    config = replace(debug(), seed=seed, guidance_after_steps=3)
    [batch] = source_of(dataset, config).batches(step)
    loss = config.loss_at(step)
    expected = draw_record(loss, seed=seed, step=step, num_rows=16, latent_shape=(4, 8, 8))
    for part in ("draws", "weights", "plan"):
        for name, value in vars(getattr(expected, part)).items():
            assert value is None or torch.equal(getattr(getattr(batch.record, part), name), value), name
    assert batch.labels.tolist() == [index % 7 for index in samples_of_step(seed, step, 16, 50)]


def test_prefetcher_returns_the_sources_batches_and_stops_at_the_last_step(dataset, monkeypatch):
    source = source_of(dataset, debug())
    expected = {step: source.batches(step)[0] for step in (3, 4, 9)}
    computed, original = [], source.batches
    monkeypatch.setattr(source, "batches", lambda step: computed.append(step) or original(step))
    prefetcher = Prefetcher(source, num_steps=10)
    for step in (3, 4, 9):  # 9 is not the prefetched step
        [batch] = prefetcher.batches(step)
        assert torch.equal(batch.moments, expected[step].moments)
        assert torch.equal(batch.record.draws.noise, expected[step].record.draws.noise)
    prefetcher._executor.shutdown(wait=True)
    assert sorted(computed) == [3, 4, 5, 9]
