"""MLDecoderHead: timm's layer is the oracle."""

from typing import Any

import pytest
import torch
from timm.layers.ml_decoder import MLDecoder

from mlc.heads.decoder import DecoderConfig
from mlc.heads.head_size import HeadSize
from mlc.heads.ml_decoder import MLDecoderHead

GRID, WIDTH = (3, 4), 10
NAMES = {
    "embed_standart.weight": "embed.weight",
    "embed_standart.bias": "embed.bias",
    "query_embed.weight": "query",
    "duplicate_pooling": "W",
    "duplicate_pooling_bias": "b",
}


def head_of(classes: int, **config: Any) -> MLDecoderHead:
    generator = torch.Generator().manual_seed(0)
    config = {"hidden_dim": 16} | config
    return MLDecoderHead(HeadSize(WIDTH, classes, GRID), DecoderConfig(**config), generator).eval()


@pytest.mark.parametrize(("classes", "groups"), [(5, None), (5, 5), (6, 3), (7, 3), (120, None)])
def test_logits_are_timm_s(classes: int, groups: int | None) -> None:
    head = head_of(classes, query_groups=groups)
    oracle = MLDecoder(classes, groups or -1, 16, WIDTH).eval()
    oracle.load_state_dict(
        {
            name: head.state_dict()[NAMES.get(name, name.removeprefix("decoder.layers.0."))]
            for name in oracle.state_dict()
        }
    )
    # torch's container asks a layer for what this one has not.
    oracle.decoder = oracle.decoder.layers[0]
    tokens = torch.randn(2, WIDTH, *GRID, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head(tokens.flatten(2).transpose(1, 2)), oracle(tokens))


def test_the_sizes_are_the_paper_s() -> None:
    with torch.device("meta"):
        head = MLDecoderHead(HeadSize(2048, 80), DecoderConfig(), torch.Generator())
    assert 7_100_000 < sum(each.numel() for each in head.parameters()) < 7_300_000
    assert head.query.shape == (80, 768)  # not trained, and part of the state
    assert "query" in head.state_dict()


def test_attention_is_of_labels_and_sums_to_one() -> None:
    head = head_of(7, query_groups=3)
    attention = head.attention(torch.randn(2, 12, WIDTH))
    assert attention.shape == (2, 7, 12)
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(2, 7))
    assert torch.equal(attention[:, 0], attention[:, 2])  # of one query
    assert not torch.equal(attention[:, 0], attention[:, 3])
