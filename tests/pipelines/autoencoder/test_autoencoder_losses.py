"""The loss, the learning rate and the moving average, as pure functions."""

import pytest
import torch

from pipelines.autoencoder.features import BLOCKS, EfficientNetFeatures
from pipelines.autoencoder.losses import AutoencoderLoss, kl_divergence, perceptual_distance
from pipelines.autoencoder.network import learning_rate_factor, update_average
from pipelines.efficientnet import load_efficientnet


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def average_pools(images):
    """Stands for a network of features."""
    return [torch.nn.functional.avg_pool2d(images, size) for size in (2, 4)]


def test_kl_divergence_equals_that_of_torchs_normal_distributions():
    mean, logvar = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    ).mean()
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)
    assert kl_divergence(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)) == 0.0


def test_perceptual_distance_is_zero_for_equal_images_and_has_a_gradient_for_others():
    images = random(2, 3, 8, 8)
    assert perceptual_distance(average_pools(images), average_pools(images)) == 0.0
    changed = (images + 0.1 * random(2, 3, 8, 8, seed=1)).requires_grad_()
    distance = perceptual_distance(average_pools(changed), average_pools(images))
    assert 0.0 < distance.item() < 4.0
    distance.backward()
    assert changed.grad.abs().sum() > 0


def test_perceptual_distance_ignores_the_length_of_a_feature_vector():
    features, targets = random(2, 5, 4, 4), random(2, 5, 4, 4, seed=1)
    expected = perceptual_distance([features], [targets])
    torch.testing.assert_close(perceptual_distance([features * 7.0], [targets]), expected)
    opposite = perceptual_distance([features], [-features])
    torch.testing.assert_close(opposite, torch.tensor(4.0))


def test_perceptual_gradient_is_finite_where_all_features_are_zero():
    features = torch.zeros(1, 3, 2, 2, requires_grad=True)
    perceptual_distance([features], [random(1, 3, 2, 2)]).backward()
    assert features.grad.isfinite().all()


def test_perceptual_distance_of_different_networks_is_refused():
    with pytest.raises(ValueError, match="equally many maps, but got 1 and 2"):
        perceptual_distance([random(1, 3, 2, 2)], average_pools(random(1, 3, 8, 8)))


def test_loss_is_the_weighted_sum_of_its_terms():
    images, reconstruction = random(2, 3, 8, 8), random(2, 3, 8, 8, seed=1)
    mean, logvar = random(2, 4, 2, 2, seed=2), random(2, 4, 2, 2, seed=3)
    losses = AutoencoderLoss(kl_weight=0.5, perceptual_weight=0.25, features=average_pools)(
        images, reconstruction, mean, logvar
    )
    assert losses.perceptual > 0
    torch.testing.assert_close(losses.l1, (images - reconstruction).abs().mean())
    torch.testing.assert_close(losses.squared, (images - reconstruction).square().mean())
    torch.testing.assert_close(losses.total, losses.l1 + 0.25 * losses.perceptual + 0.5 * losses.kl)
    with pytest.raises(ValueError, match="requires a network of features"):
        AutoencoderLoss(kl_weight=0.0, perceptual_weight=1.0)


def test_learning_rate_rises_linearly_and_falls_to_zero():
    rates = [learning_rate_factor(step, 100, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert learning_rate_factor(0, 1, 0) == 1.0


def test_moving_average_forgets_the_initialisation_and_then_follows_slowly():
    average, module = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    start = average.weight.clone()
    update_average(average, module, 0.999, step=1)
    torch.testing.assert_close(average.weight, start + (module.weight - start) * 9 / 11)
    start = average.weight.clone()
    update_average(average, module, 0.999, step=1_000_000)
    torch.testing.assert_close(average.weight, start + (module.weight - start) * 0.001)
    update_average(average, module, 0.0, step=10)
    torch.testing.assert_close(average.weight, module.weight)


def test_efficientnet_features_have_four_sizes_and_a_gradient():
    network = EfficientNetFeatures()
    assert not any(parameter.requires_grad for parameter in network.parameters())
    images = random(1, 3, 64, 64).requires_grad_()
    maps = network(images)
    assert [feature_map.shape[-1] for feature_map in maps] == [32, 16, 8, 4]
    whole, expected = load_efficientnet(), []
    for number in BLOCKS:
        whole._blocks[number].register_forward_hook(lambda module, inputs, output: expected.append(output))
    whole.extract_features((images.detach() * 127.5 + 127.5 - 127.0) / 128.0)
    for found, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    perceptual_distance(maps, network(torch.zeros(1, 3, 64, 64))).backward()
    assert images.grad.abs().sum() > 0
