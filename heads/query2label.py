"""Query2LabelHead: each label looks for itself among the tokens, through a transformer decoder."""

import math
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from mlc.heads.decoder import DecoderConfig, check_width
from mlc.heads.head_size import HeadSize, seeded
from mlc.heads.position import sine_position
from mlc.heads.transformer import DecoderLayer, EncoderLayer, init_xavier
from mlc.store.schema import TOKENS

ATTENTION_HEADS = 4
FFN_TIMES = 4  # the hidden width


class Query2LabelHead(nn.Module):
    """Tokens (B, T, C) of a grid -> logits (B, L).

    One encoder layer over the tokens, two decoder layers from label queries to tokens, and for each
    label a linear map of its own. Labels start from zeros, and their queries, as the tokens'
    position code, are added in every layer to what is looked for and never passed on. Without
    self-attention, the default, labels never meet: a label's logit does not depend on which others
    there are. Parameters have the names of the authors' code.

    Source: Liu et al. 2021, https://arxiv.org/abs/2107.10834, as its released code has it.
    """

    reads = TOKENS
    position: Tensor

    def __init__(self, size: HeadSize, config: DecoderConfig, generator: torch.Generator) -> None:
        """Make a head.

        Args:
            size: of the tokens, with their grid.
            config: of the head.
            generator: whose seed is that of the initial weights.

        Raises:
            MlcError: the width is not divisible by 4 and by the number of attention heads.
        """
        super().__init__()
        width = config.hidden_dim or size.width
        heads = config.attention_heads or ATTENTION_HEADS
        check_width(width, heads, multiple=4)
        ffn_dim = config.ffn_dim or FFN_TIMES * width
        with seeded(generator):
            self.input_proj: nn.Module = nn.Identity()
            if config.input_projection or width != size.width:
                self.input_proj = nn.Linear(size.width, width)
            self.transformer = Transformer(config, width, ffn_dim, heads)
            init_xavier(self.transformer)
            self.query_embed = nn.Embedding(size.classes, width)
            self.fc = GroupLinear(size.classes, width)
        # Not of the state: it is made anew for every grid.
        self.register_buffer("position", sine_position(size.of_grid(), width), persistent=False)

    def forward(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Return logits (B, L).

        Args:
            tokens: (B, T, C), row by row of the grid.
            places: (B, T) where on the grid the tokens lie, if they are not all of it in order.
        """
        memory, position = self._encode(tokens, places)
        logits: Tensor = self.fc(self.transformer.decode(self.query_embed.weight, memory, position))
        return logits

    def attention(self, tokens: Tensor) -> Tensor:
        """Return how much each label looks at each token, (B, L, T) of sum 1.

        Of the last decoder layer, the mean over its heads.
        """
        memory, position = self._encode(tokens, None)
        return self.transformer.attention(self.query_embed.weight, memory, position)

    def _encode(self, tokens: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the tokens as labels look at them, and their position codes."""
        position = self.position if places is None else self.position[places]
        memory = self.input_proj(tokens)
        return self.transformer.encode(memory, position), position


class Transformer(nn.Module):
    """An encoder without final norm, and a decoder with one."""

    def __init__(self, config: DecoderConfig, width: int, ffn_dim: int, heads: int) -> None:
        super().__init__()
        self.encoder = Layers(
            EncoderLayer(width, ffn_dim, heads, config.dropout)
            for _ in range(config.encoder_layers)
        )
        self.decoder = Layers(
            DecoderLayer(
                width, ffn_dim, heads, config.dropout, self_attention=config.attends_itself(layer)
            )
            for layer in range(config.decoder_layers)
        )
        self.decoder.norm = nn.LayerNorm(width)

    def encode(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Return (B, T, d)."""
        for layer in self.encoder.layers:
            tokens = layer(tokens, position)
        return tokens

    def decode(self, query: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """Return what is known of each label, (B, L, d)."""
        labels = self._decode_to(len(self.decoder.layers), query, memory, position)
        normed: Tensor = self.decoder.norm(labels)
        return normed

    def attention(self, query: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """Return how much each label looks at each token in the last layer, (B, L, T)."""
        labels = self._decode_to(len(self.decoder.layers) - 1, query, memory, position)
        last = cast(DecoderLayer, self.decoder.layers[-1])
        labels = last.after_self_attention(labels, query)
        return last.multihead_attn.weights(labels + query, memory, position)

    def _decode_to(self, stop: int, query: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        labels = torch.zeros_like(query).expand(len(memory), *query.shape)
        for layer in self.decoder.layers[:stop]:
            labels = layer(labels, query, memory, position)
        return labels


class Layers(nn.Module):
    """Layers one after the other, and perhaps a norm."""

    norm: nn.LayerNorm

    def __init__(self, layers: Iterable[EncoderLayer | DecoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class GroupLinear(nn.Module):
    """A linear map to one number for each label, of its own vector."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.W = nn.Parameter(torch.empty(1, classes, width).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.empty(1, classes).uniform_(-bound, bound))

    def forward(self, labels: Tensor) -> Tensor:
        """Return logits (B, L) of vectors (B, L, d)."""
        return (self.W * labels).sum(dim=2) + self.b


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a released head under our names, without its position code.

    Only the projection of the tokens has another shape: a 1x1 convolution (d, C, 1, 1) there.
    """
    return {
        name: tensor.flatten(1) if name == "input_proj.weight" else tensor
        for name, tensor in tensors.items()
    }


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a head as the authors' code names and shapes them."""
    return {
        name: tensor[:, :, None, None] if name == "input_proj.weight" else tensor
        for name, tensor in tensors.items()
    }
