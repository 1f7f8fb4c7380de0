"""Dual tensors (value, tangent): a network on them computes its output and a directional derivative in one forward.

A value has an autograd graph if gradients are enabled; a tangent never has one. A tangent belongs to the *first b rows*
of its value, b <= B, because MeanFlow needs du/dt for some samples only. With tangent None, every function here computes
the value only.

Why not `torch.func.jvp` of the whole network: torch's forward-mode AD multiplies by a zero weight tangent in every linear
layer (three products instead of two) and recomputes the values of the training forward. It supports neither fused
attention (pytorch#165530) nor DDP (pytorch#102197). Here, a linear layer's tangent is one product, the training forward
uses fused attention, and the derivative is an ordinary output.

    # B batch, b rows with a tangent, N tokens, D width
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Dual(NamedTuple):
    """A value and the tangent of its first rows. A tuple, so that hooks and checkpointing see its tensors."""

    value: torch.Tensor
    """(B, ...), with a graph if gradients are enabled."""
    tangent: torch.Tensor | None = None
    """(b, ...), without a graph: tangent of the value's first b rows, or None."""


def lift(
    function: Callable[..., torch.Tensor], *arguments: Dual, derivative: Callable[..., torch.Tensor] | None = None
) -> Dual:
    """Applies a row-wise function to the values and its derivative to the tangents. Either all arguments have tangents,
    or none.

    Use it for normalisations, activations and gates; the function may close over parameters.
    derivative: (*primals, *tangents) -> tangent. Pass it for functions that run on every token, because the default,
    `torch.func.jvp`, recomputes the value in several operations. For the default, the function must not take views of
    its arguments, because compilers cannot trace them.
    """
    value = function(*(argument.value for argument in arguments))
    tangents = [argument.tangent for argument in arguments if argument.tangent is not None]
    if not tangents:
        return Dual(value)
    assert len(tangents) == len(arguments), "either all arguments of a lifted function must have a tangent, or none"
    primals = tuple(argument.value[: len(tangents[0])] for argument in arguments)
    with torch.no_grad():
        if derivative is not None:
            return Dual(value, derivative(*primals, *tangents))
        return Dual(value, torch.func.jvp(function, primals, tuple(tangents))[1])


def lift_linear(function: Callable[[torch.Tensor], torch.Tensor], argument: Dual) -> Dual:
    """Applies a linear row-wise function, for example a view or a rotation, to value and tangent."""
    if argument.tangent is None:
        return Dual(function(argument.value))
    with torch.no_grad():
        tangent = function(argument.tangent)
    return Dual(function(argument.value), tangent)


def add_constant(argument: Dual, constant: torch.Tensor) -> Dual:
    """argument + constant. The tangent gets the sum's dtype.

    Under autocast, a float32 constant makes a bfloat16 value float32. The tangent must follow, because a network adds all
    its residuals to the two, and bfloat16 would round each time.
    """
    value = argument.value + constant
    return Dual(value, None if argument.tangent is None else argument.tangent.to(value.dtype))


class Linear(nn.Linear):
    """nn.Linear for duals: the tangent is multiplied by the weight, without the bias."""

    def forward(self, x: Dual) -> Dual:  # type: ignore[override]
        """x: (B, ..., in_features) -> (B, ..., out_features)."""
        if x.tangent is None:
            return Dual(super().forward(x.value))
        with torch.no_grad():
            tangent = F.linear(x.tangent, self.weight)
        return Dual(super().forward(x.value), tangent)


def attention(query: Dual, key: Dual, value: Dual) -> Dual:
    """Softmax attention of (B, heads, N, D / heads); the values use the fused kernel.

    With P = softmax(S), S = Q K' / sqrt(d): dS = (dQ K' + Q dK') / sqrt(d); dP = P dS - P sum(P dS); dO = dP V + P dV.
    """
    output = F.scaled_dot_product_attention(query.value, key.value, value.value)
    if query.tangent is None or key.tangent is None or value.tangent is None:
        assert query.tangent is key.tangent is value.tangent, (
            "either query, key and value must all have a tangent, or none"
        )
        return Dual(output)
    with torch.no_grad():
        scale, rows = query.value.shape[-1] ** -0.5, len(query.tangent)
        q, k, v = query.value[:rows] * scale, key.value[:rows], value.value[:rows]
        weights = (q @ k.mT).softmax(dim=-1)  # (b, heads, N, N)
        tangent = weights * ((query.tangent * scale) @ k.mT + q @ key.tangent.mT)
        tangent = torch.addcmul(tangent, weights, tangent.sum(dim=-1, keepdim=True), value=-1.0)
        return Dual(output, tangent @ v + weights @ value.tangent)
