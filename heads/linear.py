"""Linear heads: one affine map of the pooled features, as they are or of one length."""

import math

import torch
from torch import Tensor, nn

from mlc.store.schema import POOLED


class LinearHead(nn.Module):
    """Pooled features (B, D) -> logits (B, L).

    Weights and bias start uniform in +-1/sqrt(D): torch's own default for ``nn.Linear``, here from
    a generator of their own.
    """

    reads = POOLED

    def __init__(self, width: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.bias = nn.Parameter(torch.empty(classes))
        with torch.no_grad():
            self.weight.uniform_(-bound, bound, generator=generator)
            self.bias.uniform_(-bound, bound, generator=generator)

    @staticmethod
    def inputs(features: Tensor) -> Tensor:
        """Return what the affine map sees of features (B, D); nothing in it is trained."""
        return features

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, L)."""
        return nn.functional.linear(self.inputs(features), self.weight, self.bias)


class NormalisedLinearHead(LinearHead):
    """A linear head that sees the direction of an image's features, not their length.

    The features of each image are scaled to the Euclidean length sqrt(D), so that a feature is of
    the size of 1 and learning rates and strengths keep their meaning. Zeros stay zeros.
    """

    @staticmethod
    def inputs(features: Tensor) -> Tensor:
        """Return features (B, D) of length sqrt(D)."""
        return nn.functional.normalize(features, dim=1) * math.sqrt(features.shape[1])
