"""Linear head: one affine map of the pooled features."""

import math

import torch
from torch import Tensor, nn


class LinearHead(nn.Module):
    """Pooled features (B, D) -> logits (B, L).

    Weights and bias start uniform in +-1/sqrt(D): torch's own default for ``nn.Linear``, here from
    a generator of their own.
    """

    def __init__(self, width: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.bias = nn.Parameter(torch.empty(classes))
        with torch.no_grad():
            self.weight.uniform_(-bound, bound, generator=generator)
            self.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, L)."""
        return nn.functional.linear(features, self.weight, self.bias)


HEADS = {"linear": LinearHead}
