"""HEADS: the table of heads, by the name that commands know them by."""

from mlc.heads.attention_pool import AttentionPoolHead
from mlc.heads.linear import LinearHead, NormalisedLinearHead

# What a head reads of a store, pooled features or tokens, is its attribute ``reads``.
HEADS: dict[str, type[LinearHead] | type[AttentionPoolHead]] = {
    "attention-pool": AttentionPoolHead,
    "linear": LinearHead,
    "normalised-linear": NormalisedLinearHead,
}
