"""A linear probe: the classes of a data set, predicted from features of a network that does not know them.

N images, D features, K classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

L2 = 0.1
MAX_ITERATIONS = 200
PROBE_PROTOCOL = f"logistic regression on standardised features of the reference, L2 {L2:g}, L-BFGS"


@dataclass(frozen=True)
class LinearProbe:
    """A multinomial logistic regression on standardised features."""

    mean: torch.Tensor
    """(D,) float64, of the training features."""
    deviation: torch.Tensor
    """(D,) float64; 1 for constant features."""
    weight: torch.Tensor
    """(K, D) float64."""
    bias: torch.Tensor
    """(K,) float64."""

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """Class labels int64 (N,) of features (N, D), any float dtype."""
        return F.linear(_standardise(features, self.mean, self.deviation), self.weight, self.bias).argmax(dim=1)

    def accuracy(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        """Fraction of features (N, D) whose predicted class equals the label int64 (N,)."""
        return float((self.predict(features) == labels).double().mean())


def fit_probe(features: torch.Tensor, labels: torch.Tensor, num_classes: int, l2: float = L2) -> LinearProbe:
    """Fits a probe to features (N, D) of any float dtype, with labels int64 (N,) in [0, K).

    Minimises the mean cross-entropy plus l2 / 2 times the sum of the squared weights, without the biases. The problem is
    convex, and L-BFGS starts at zero, so equal input gives equal output. Raises ValueError for fewer than two classes among
    the labels, for labels outside [0, K), and for another number of labels than features.
    """
    if len(features) != len(labels):
        raise ValueError(f"a probe requires one label per feature, but got {len(labels)} for {len(features)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels must be in [0, {num_classes}), but are in [{labels.min()}, {labels.max()}]")
    if len(labels.unique()) < 2:
        raise ValueError(f"a probe requires features of at least 2 classes, but got {len(labels.unique())}")
    mean = features.double().mean(dim=0)
    deviation = features.double().std(dim=0, correction=0)
    deviation = torch.where(deviation > 0.0, deviation, 1.0)
    x = _standardise(features, mean, deviation)
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_ITERATIONS, history_size=10, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + 0.5 * l2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return LinearProbe(mean, deviation, weight.detach(), bias.detach())


def _standardise(features: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    return (features.double() - mean) / deviation
