"""HEADS: the table of heads, by the name that commands know them by."""

import torch
from torch import nn

from mlc.configs.errors import choose
from mlc.heads.attention_pool import AttentionPoolHead
from mlc.heads.decoder import DecoderConfig
from mlc.heads.head_size import HeadSize
from mlc.heads.linear import LinearHead, NormalisedLinearHead
from mlc.heads.ml_decoder import MLDecoderHead
from mlc.heads.query2label import Query2LabelHead

# What a head reads of a store, pooled features or tokens, is its attribute ``reads``.
DECODERS: dict[str, type[Query2LabelHead] | type[MLDecoderHead]] = {
    "ml-decoder": MLDecoderHead,
    "q2l": Query2LabelHead,
}
AFFINE: dict[str, type[LinearHead]] = {
    "linear": LinearHead,
    "normalised-linear": NormalisedLinearHead,
}
OF_TOKENS = {"attention-pool": AttentionPoolHead, **DECODERS}
HEADS = {**AFFINE, **OF_TOKENS}


def make_head(
    name: str, size: HeadSize, config: DecoderConfig, generator: torch.Generator
) -> nn.Module:
    """Return a new head, on the CPU.

    Args:
        name: a key of HEADS.
        size: of its inputs and outputs.
        config: of heads that attend; others have no use for it.
        generator: of the initial weights.

    Raises:
        MlcError: no head has that name, or these sizes.
    """
    choose(HEADS, name, "head")
    if name in DECODERS:
        return DECODERS[name](size, config, generator)
    light = AFFINE.get(name, AttentionPoolHead)
    return light(size.width, size.classes, generator)
