"""MLDecoderHead: Query2Label's lighter sibling, one cross-attention of fixed queries."""

import torch
from torch import Tensor, nn

from mlc.heads.decoder import DecoderConfig, check_width
from mlc.heads.head_size import HeadSize, seeded
from mlc.heads.transformer import Attention, FeedForward
from mlc.store.schema import TOKENS

HIDDEN_DIM, FFN_DIM, ATTENTION_HEADS, QUERY_GROUPS = 768, 2048, 8, 100


class MLDecoderHead(FeedForward):
    """Tokens (B, T, C) -> logits (B, L).

    Tokens are projected and cut at 0; G random queries, which are never trained, look at them once,
    without position code; each gives the logits of g = ceil(L / G) labels by a map of its own. With
    G = L, the default up to 100 labels, each label has its query.

    Source: Ridnik et al. 2021, https://arxiv.org/abs/2111.12933, as its released code has it: the
    self-attention of queries is left out, and its norm kept.
    """

    reads = TOKENS
    query: Tensor

    def __init__(self, size: HeadSize, config: DecoderConfig, generator: torch.Generator) -> None:
        """Make a head.

        Args:
            size: of tokens and classes; it has no use for a grid.
            config: of the head.
            generator: whose seed is that of the initial weights and of the queries.

        Raises:
            MlcError: the width is not divisible by the number of attention heads.
        """
        width = config.hidden_dim or HIDDEN_DIM
        heads = config.attention_heads or ATTENTION_HEADS
        check_width(width, heads)
        with seeded(generator):
            super().__init__(width, config.ffn_dim or FFN_DIM, config.dropout)
            self.classes = size.classes
            groups = min(config.query_groups or QUERY_GROUPS, size.classes)
            self.embed = nn.Linear(size.width, width)
            self.register_buffer("query", torch.randn(groups, width))
            self.multihead_attn = Attention(width, heads, config.dropout)
            nn.init.xavier_uniform_(self.multihead_attn.in_proj_weight)
            self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
            labels_of_query = -(-size.classes // groups)
            self.W = nn.Parameter(torch.empty(groups, width, labels_of_query))
            nn.init.xavier_normal_(self.W)
            self.b = nn.Parameter(torch.zeros(size.classes))

    def forward(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Return logits (B, L); where the tokens lie makes no difference."""
        memory = self.embed(tokens).relu()
        labels = self._queries(len(tokens))
        labels = self.norm2(labels + self.drop(self.multihead_attn(labels, memory)))
        labels = self.norm3(labels + self.feed_forward(labels))
        of_queries = torch.einsum("bgd,gdk->bgk", labels, self.W)
        return of_queries.flatten(1)[:, : self.classes] + self.b

    def attention(self, tokens: Tensor) -> Tensor:
        """Return how much each label looks at each token, (B, L, T) of sum 1: mean over heads.

        Labels of one query look alike.
        """
        memory = self.embed(tokens).relu()
        weights = self.multihead_attn.weights(self._queries(len(tokens)), memory)
        return weights.repeat_interleave(self.W.shape[2], dim=1)[:, : self.classes]

    def _queries(self, images: int) -> Tensor:
        queries = self.query.expand(images, *self.query.shape)
        normed: Tensor = self.norm1(queries + self.drop(queries))
        return normed
