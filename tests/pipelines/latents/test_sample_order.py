import numpy as np

from pipelines.latents.sample_order import samples_of_step


def test_every_epoch_contains_every_sample_once():
    epochs = np.concatenate([samples_of_step(7, step, 4, 10) for step in range(5)]).reshape(2, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_samples_depend_on_seed_and_step_only():
    np.testing.assert_array_equal(samples_of_step(1, 9, 16, 100), samples_of_step(1, 9, 16, 100))
    assert samples_of_step(1, 9, 16, 100).tolist() != samples_of_step(2, 9, 16, 100).tolist()


def test_batch_larger_than_the_dataset_spans_epochs():
    assert np.bincount(samples_of_step(0, 0, 25, 10), minlength=10).tolist().count(0) == 0
    assert len(samples_of_step(0, 0, 25, 10)) == 25
