"""The linear probe."""

import pytest
import torch

from pipelines.evaluate.linear_probe import fit_probe

CENTRES = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]])


def gaussians(count, seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 6, generator=generator)
    features = torch.cat([CENTRES[labels], torch.zeros(count, 4)], dim=1) + spread * noise
    return features * torch.tensor([1.0, 100.0, 1.0, 1.0, 1e-3, 1.0]), labels


def test_separable_gaussians_of_any_scale_are_classified():
    probe = fit_probe(*gaussians(300, 0), num_classes=3)
    features, labels = gaussians(600, 1)
    assert probe.accuracy(features, labels) > 0.98
    assert probe.accuracy(features, (labels + 1) % 3) < 0.02
    assert probe.predict(features).dtype == torch.int64


def test_features_without_information_give_chance():
    features = torch.randn(600, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(600) % 3
    assert fit_probe(features[:300], labels[:300], 3).accuracy(features[300:], labels[300:]) == pytest.approx(
        1 / 3, abs=0.1
    )


def test_the_fit_is_the_minimum_of_the_regularised_loss_and_repeats_exactly():
    features, labels = gaussians(120, 0, spread=4.0)
    probe = fit_probe(features, labels, 3, l2=0.5)
    again = fit_probe(features, labels, 3, l2=0.5)
    assert torch.equal(probe.weight, again.weight)
    assert torch.equal(probe.bias, again.bias)
    x = (features.double() - features.double().mean(0)) / features.double().std(0, correction=0)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, labels) + 0.25 * weight.square().sum()
    loss.backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-4
    assert fit_probe(features, labels, 3, l2=5.0).weight.norm() < 0.5 * probe.weight.norm()


def test_constant_features_and_classes_without_images_do_no_harm():
    features, labels = gaussians(300, 0)
    features[:, 5] = 7.0
    probe = fit_probe(features, labels, num_classes=5)
    assert probe.accuracy(features, labels) > 0.98
    assert probe.predict(features).max() == 2


def test_invalid_labels_are_refused():
    features, labels = gaussians(30, 0)
    with pytest.raises(ValueError, match="one label per feature, but got 29 for 30"):
        fit_probe(features, labels[1:], 3)
    with pytest.raises(ValueError, match=r"must be in \[0, 2\), but are in \[0, 2\]"):
        fit_probe(features, labels, 2)
    with pytest.raises(ValueError, match="at least 2 classes, but got 1"):
        fit_probe(features, torch.zeros_like(labels), 3)
