"""Pairs (value, tangent): a network written on them gives its directional derivative in the pass that gives its output.

A value has a graph where gradients are on; a tangent never has one. A tangent belongs to the *first b rows* of its
value, b <= B: the MeanFlow objective wants du/dt on some rows only, and the others pay nothing for it. `None` means
that no row has a tangent, and every function here is then the plain one.

Why not `torch.func.jvp` of the whole network: stock forward-mode AD multiplies by a zero weight tangent in every linear
layer (three products where the mathematics has two), computes again the values that the graded pass has, has no
formula for fused attention (pytorch#165530), and cannot pass through DDP (pytorch#102197). Here a linear layer's
tangent is one product, fused attention stays in the graded pass, and the derivative is an ordinary output.

    # B batch, b rows with a tangent, N tokens, D width
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Dual(NamedTuple):
    """A value and the derivative of its first rows. A tuple, so that hooks and checkpointing see its tensors."""

    value: torch.Tensor
    """(B, ...), with a graph where gradients are on."""
    tangent: torch.Tensor | None = None
    """(b, ...), without a graph; of the value's first b rows. None where no row has one."""


def lift(
    function: Callable[..., torch.Tensor], *arguments: Dual, derivative: Callable[..., torch.Tensor] | None = None
) -> Dual:
    """`function` of the values, row by row, and its derivative along the tangents; all arguments have one, or none has.

    For what has no large products: norms, activations, gates. The function may close over parameters.
    derivative(*primals, *tangents) is for the functions that run at every token: `torch.func.jvp`, which serves for
    the others, computes their values again, by several operations each. A function without one takes no views of its
    arguments: compilers cannot trace them there.
    """
    value = function(*(argument.value for argument in arguments))
    tangents = [argument.tangent for argument in arguments if argument.tangent is not None]
    if not tangents:
        return Dual(value)
    assert len(tangents) == len(arguments), "every argument of a lifted function needs a tangent, or none"
    primals = tuple(argument.value[: len(tangents[0])] for argument in arguments)
    with torch.no_grad():
        if derivative is not None:
            return Dual(value, derivative(*primals, *tangents))
        return Dual(value, torch.func.jvp(function, primals, tuple(tangents))[1])


def lift_linear(function: Callable[[torch.Tensor], torch.Tensor], argument: Dual) -> Dual:
    """A function that is linear and acts row by row, such as a view or a rotation: its own derivative."""
    if argument.tangent is None:
        return Dual(function(argument.value))
    with torch.no_grad():
        tangent = function(argument.tangent)
    return Dual(function(argument.value), tangent)


class Linear(nn.Linear):
    """torch's linear layer on duals: a tangent is multiplied by the weight, and has no bias."""

    def forward(self, x: Dual) -> Dual:  # type: ignore[override]
        """x: (B, ..., in_features) -> (B, ..., out_features)."""
        if x.tangent is None:
            return Dual(super().forward(x.value))
        with torch.no_grad():
            tangent = F.linear(x.tangent, self.weight)
        return Dual(super().forward(x.value), tangent)


def attention(query: Dual, key: Dual, value: Dual) -> Dual:
    """Softmax attention of (B, heads, N, D / heads), fused for the values.

    With P = softmax(S), S = Q K' / sqrt(d): dS = (dQ K' + Q dK') / sqrt(d); dP = P dS - P sum(P dS); dO = dP V + P dV.
    """
    output = F.scaled_dot_product_attention(query.value, key.value, value.value)
    if query.tangent is None or key.tangent is None or value.tangent is None:
        assert query.tangent is key.tangent is value.tangent, "attention needs three tangents, or none"
        return Dual(output)
    with torch.no_grad():
        scale, rows = query.value.shape[-1] ** -0.5, len(query.tangent)
        q, k, v = query.value[:rows] * scale, key.value[:rows], value.value[:rows]
        weights = (q @ k.mT).softmax(dim=-1)  # (b, heads, N, N)
        tangent = weights * ((query.tangent * scale) @ k.mT + q @ key.tangent.mT)
        tangent = torch.addcmul(tangent, weights, tangent.sum(dim=-1, keepdim=True), value=-1.0)
        return Dual(output, tangent @ v + weights @ value.tangent)
