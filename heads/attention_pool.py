"""AttentionPoolHead: each class looks at the tokens that matter to it; the light spatial head."""

import math

import torch
from torch import Tensor, nn

from mlc.store.schema import TOKENS


class AttentionPoolHead(nn.Module):
    """Tokens (B, T, C) -> logits (B, L), each class with an attention of its own.

    With x_t the token at t, w_l and b_l the weight and bias of class l, and q_l its query::

        logit_l = b_l + sum_t softmax_t(q_l . x_t / sqrt(C)) (w_l . x_t)

    Two linear maps of the tokens and a softmax: no more than twice the cost of a linear head on
    each token. Queries start at 0, where every token counts the same, so that the head starts as
    the linear head on the mean of the tokens.

    Reference: the attention pooling of Ilse et al., ICML 2018, with a linear score for each class;
    class-specific attention as in CSRA (Zhu and Wu, ICCV 2021), whose scores are those of the
    classifier itself, where these have weights of their own and the mean of tokens is not added.
    """

    reads = TOKENS

    def __init__(self, width: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.bias = nn.Parameter(torch.empty(classes))
        self.query = nn.Parameter(torch.zeros(classes, width))
        with torch.no_grad():
            self.weight.uniform_(-bound, bound, generator=generator)
            self.bias.uniform_(-bound, bound, generator=generator)

    def attention(self, tokens: Tensor) -> Tensor:
        """Return how much each class looks at each token, (B, L, T), of sum 1 over the tokens."""
        scores = nn.functional.linear(tokens, self.query) / math.sqrt(tokens.shape[-1])
        return scores.softmax(dim=1).transpose(1, 2)

    def forward(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Return logits (B, L); where the tokens lie makes no difference."""
        values = nn.functional.linear(tokens, self.weight)
        return (self.attention(tokens) * values.transpose(1, 2)).sum(dim=2) + self.bias
