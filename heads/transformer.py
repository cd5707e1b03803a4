"""The layers of transformer heads, post-norm, under the parameter names of torch's own.

Tokens and queries are (B, T, d) and (B, L, d). A position is added to what is looked for and
looked at, never to what is passed on.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from mlc.heads.decoder import check_width


class Attention(nn.Module):
    """Multi-head attention of queries over a memory.

    Parameters are those of ``torch.nn.MultiheadAttention``; the rows of ``in_proj_weight`` are for
    queries, keys, values.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        check_width(width, heads)
        self.width, self.heads, self.dropout = width, heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tensor, memory: Tensor, position: Tensor | None = None) -> Tensor:
        """Return what each query gathers, (B, L, d).

        Args:
            queries: (B, L, d), their positions added.
            memory: (B, T, d), the values.
            position: (T, d) or (B, T, d), added to the memory where it is a key.
        """
        query, key, value = self._project(queries, memory, position)
        dropout = self.dropout if self.training else 0.0
        gathered = scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        projected: Tensor = self.out_proj(gathered.transpose(1, 2).flatten(2))
        return projected

    def weights(self, queries: Tensor, memory: Tensor, position: Tensor | None = None) -> Tensor:
        """Return how much each query looks at each item of the memory, (B, L, T) of sum 1.

        The mean over heads; arguments as ``forward`` has them.
        """
        query, key, _ = self._project(queries, memory, position)
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        weights: Tensor = scores.softmax(dim=3).mean(dim=1)
        return weights

    def _project(
        self, queries: Tensor, memory: Tensor, position: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, heads, ., d / heads)."""
        of_query, of_key, _ = self.in_proj_weight.chunk(3)
        query = linear(queries, of_query, self.in_proj_bias[: self.width])
        # Keys and values in one product; the position is projected by itself, once for all images.
        both = linear(memory, self.in_proj_weight[self.width :], self.in_proj_bias[self.width :])
        key, value = both.chunk(2, dim=2)
        if position is not None:
            key = key + linear(position, of_key)
        return self._split(query), self._split(key), self._split(value)

    def _split(self, values: Tensor) -> Tensor:
        return values.view(*values.shape[:2], self.heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """What all layers end with: two linear maps with a ReLU between, and dropout."""

    def __init__(self, width: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, width)
        self.drop = nn.Dropout(dropout)

    def feed_forward(self, values: Tensor) -> Tensor:
        """Return (B, L, d)."""
        dropped: Tensor = self.drop(self.linear2(self.drop(self.linear1(values).relu())))
        return dropped


class EncoderLayer(FeedForward):
    """Tokens attend to tokens."""

    def __init__(self, width: int, ffn_dim: int, heads: int, dropout: float) -> None:
        super().__init__(width, ffn_dim, dropout)
        self.self_attn = Attention(width, heads, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Return (B, T, d)."""
        gathered = self.self_attn(tokens + position, tokens, position)
        tokens = self.norm1(tokens + self.drop(gathered))
        encoded: Tensor = self.norm2(tokens + self.feed_forward(tokens))
        return encoded


class DecoderLayer(FeedForward):
    """Labels attend to tokens, before that perhaps to each other."""

    def __init__(
        self, width: int, ffn_dim: int, heads: int, dropout: float, *, self_attention: bool
    ) -> None:
        super().__init__(width, ffn_dim, dropout)
        self.self_attention = self_attention
        if self_attention:
            self.self_attn = Attention(width, heads, dropout)
            self.norm1 = nn.LayerNorm(width)
        self.multihead_attn = Attention(width, heads, dropout)
        self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, labels: Tensor, query: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """Return what is known of each label after this layer, (B, L, d).

        Args:
            labels: (B, L, d), what is known so far.
            query: (L, d), what each label looks for, in every layer.
            memory: (B, T, d), the tokens.
            position: (T, d) or (B, T, d), theirs.
        """
        labels = self.after_self_attention(labels, query)
        gathered = self.multihead_attn(labels + query, memory, position)
        labels = self.norm2(labels + self.drop(gathered))
        decoded: Tensor = self.norm3(labels + self.feed_forward(labels))
        return decoded

    def after_self_attention(self, labels: Tensor, query: Tensor) -> Tensor:
        """Return (B, L, d), unchanged in a layer without."""
        if not self.self_attention:
            return labels
        gathered = self.self_attn(labels + query, labels, query)
        after: Tensor = self.norm1(labels + self.drop(gathered))
        return after


def init_xavier(module: nn.Module) -> None:
    """Set all parameters of more than one dimension as Xavier and Glorot do, uniformly."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
