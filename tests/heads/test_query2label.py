"""Query2LabelHead: the position code, a straight-line forward, what labels may and may not see."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlc.configs.errors import MlcError
from mlc.heads.decoder import DecoderConfig
from mlc.heads.head_size import HeadSize
from mlc.heads.position import sine_position
from mlc.heads.query2label import Query2LabelHead, from_official, to_official

GRID, WIDTH, CLASSES = (3, 4), 8, 5


def head_of(width: int = WIDTH, seed: int = 0, **config: Any) -> Query2LabelHead:
    """Return a head in float64 in which every parameter counts."""
    generator = torch.Generator().manual_seed(seed)
    config = {"ffn_dim": 16} | config
    head = Query2LabelHead(HeadSize(width, CLASSES, GRID), DecoderConfig(**config), generator)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return head.double().eval()


def tokens_of(images: int = 2, width: int = WIDTH, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, math.prod(GRID), width, generator=generator, dtype=torch.float64)


def test_the_position_code_is_that_of_the_paper_s_code() -> None:
    code = sine_position((14, 14), 2048).view(14, 14, 2048).permute(2, 0, 1)
    turn = 2 * math.pi
    assert code[0, 0, 0] == pytest.approx(math.sin(turn / 14), abs=1e-6)
    assert code[1, 0, 0] == pytest.approx(math.cos(turn / 14), abs=1e-6)
    assert code[0, 13].abs().max() < 2e-6
    for column in range(14):
        assert code[1024, 0, column] == pytest.approx(math.sin(turn * (column + 1) / 14), abs=1e-6)
    slow = turn * 5 / (14 + 1e-6) / 10_000 ** (2 * 7 / 1024)
    assert code[14, 4, 9] == pytest.approx(math.sin(slow), abs=1e-6)
    assert code[15, 4, 9] == pytest.approx(math.cos(slow), abs=1e-6)


def test_the_position_code_of_another_grid_ends_at_the_same_angle() -> None:
    small, large = sine_position((2, 3), 16), sine_position((7, 9), 16)
    torch.testing.assert_close(small[-1], large[-1], rtol=0, atol=1e-5)
    assert small.shape == (6, 16)


# A forward in numpy, one image, one head and one formula after the other.


def norm(values: Any, state: Any, name: str) -> Any:
    centred = values - values.mean(axis=-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]


def attend(query: Any, key: Any, value: Any, state: Any, name: str, heads: int) -> Any:
    weights = np.split(state[f"{name}.in_proj_weight"], 3)
    biases = np.split(state[f"{name}.in_proj_bias"], 3)
    query, key, value = (
        each @ weight.T + bias
        for each, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    parts = []
    for q, k, v in zip(
        *(np.split(each, heads, axis=1) for each in (query, key, value)), strict=True
    ):
        scores = np.exp(q @ k.T / math.sqrt(q.shape[1]))
        parts.append(scores / scores.sum(axis=1, keepdims=True) @ v)
    gathered = np.concatenate(parts, axis=1)
    return gathered @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def feed_forward(values: Any, state: Any, name: str) -> Any:
    inner = values @ state[f"{name}.linear1.weight"].T + state[f"{name}.linear1.bias"]
    return np.maximum(inner, 0) @ state[f"{name}.linear2.weight"].T + state[f"{name}.linear2.bias"]


def slow_logits(head: Query2LabelHead, tokens: Any, heads: int, kept: tuple[int, ...]) -> Any:
    state = {name: each.numpy() for name, each in head.state_dict().items()}
    position, query = head.position.numpy(), state["query_embed.weight"]
    if "input_proj.weight" in state:
        tokens = tokens @ state["input_proj.weight"].T + state["input_proj.bias"]
    name = "transformer.encoder.layers.0"
    at = tokens + position
    tokens = norm(
        tokens + attend(at, at, tokens, state, f"{name}.self_attn", heads), state, f"{name}.norm1"
    )
    tokens = norm(tokens + feed_forward(tokens, state, name), state, f"{name}.norm2")
    labels = np.zeros_like(query)
    for layer in range(2):
        name = f"transformer.decoder.layers.{layer}"
        if layer in kept:
            at = labels + query
            gathered = attend(at, at, labels, state, f"{name}.self_attn", heads)
            labels = norm(labels + gathered, state, f"{name}.norm1")
        gathered = attend(
            labels + query, tokens + position, tokens, state, f"{name}.multihead_attn", heads
        )
        labels = norm(labels + gathered, state, f"{name}.norm2")
        labels = norm(labels + feed_forward(labels, state, name), state, f"{name}.norm3")
    labels = norm(labels, state, "transformer.decoder.norm")
    return (state["fc.W"][0] * labels).sum(axis=1) + state["fc.b"][0]


@pytest.mark.parametrize(
    ("config", "heads", "kept"),
    [
        ({}, 4, ()),
        ({"hidden_dim": 12, "attention_heads": 2}, 2, ()),
        ({"input_projection": True}, 4, ()),
        ({"self_attention": "first"}, 4, (0,)),
        ({"self_attention": "others"}, 4, (1,)),
        ({"self_attention": "all"}, 4, (0, 1)),
    ],
    ids=str,
)
def test_logits_are_those_of_straight_line_code(
    config: dict[str, Any], heads: int, kept: tuple[int, ...]
) -> None:
    head, tokens = head_of(**config), tokens_of()
    want = np.stack([slow_logits(head, each, heads, kept) for each in tokens.numpy()])
    np.testing.assert_allclose(head(tokens).detach().numpy(), want, rtol=1e-10, atol=1e-10)


def test_without_self_attention_a_label_does_not_see_the_others() -> None:
    head, tokens = head_of(), tokens_of()
    whole = head(tokens)
    for name in ("query_embed.weight", "fc.W", "fc.b"):
        parameter = head.get_parameter(name)
        parameter.data = parameter.data[..., 1:3, :] if name != "fc.b" else parameter.data[:, 1:3]
    torch.testing.assert_close(head(tokens), whole[:, 1:3])


def test_tokens_may_come_in_any_order_with_their_places() -> None:
    head, tokens = head_of(), tokens_of(3)
    places = torch.stack(
        [torch.randperm(12, generator=torch.Generator().manual_seed(9)) for _ in range(3)]
    )
    moved = tokens.gather(1, places[:, :, None].expand_as(tokens))
    torch.testing.assert_close(head(moved, places), head(tokens))
    assert (head(moved) - head(tokens)).abs().max() > 1e-3  # the code makes a difference


def test_attention_sums_to_one_and_follows_the_logits() -> None:
    head, tokens = head_of(), tokens_of()
    attention = head.attention(tokens)
    assert attention.shape == (2, CLASSES, 12)
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(2, CLASSES, dtype=torch.float64))
    # Written as torch's own module has it.
    layer, own = head.transformer.decoder.layers[1], head.transformer
    oracle = torch.nn.MultiheadAttention(WIDTH, 4, batch_first=True).double().eval()
    oracle.load_state_dict(layer.multihead_attn.state_dict())
    memory = own.encode(tokens, head.position)
    query = head.query_embed.weight
    labels = own.decoder.layers[0](
        torch.zeros(2, CLASSES, WIDTH).double(), query, memory, head.position
    )
    _, want = oracle(labels + query, memory + head.position, memory)
    torch.testing.assert_close(attention, want)


def test_the_sizes_are_the_paper_s() -> None:
    with torch.device("meta"):
        head = Query2LabelHead(HeadSize(2048, 80, (14, 14)), DecoderConfig(), torch.Generator())
    assert sum(each.numel() for each in head.parameters()) == 151_406_672
    assert all(each.dtype == torch.float32 for each in head.parameters())


def test_the_seed_is_that_of_the_generator_and_leaves_torch_s_own_alone() -> None:
    def logits(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        size = HeadSize(WIDTH, CLASSES, GRID)
        return Query2LabelHead(size, DecoderConfig(), generator).eval()(tokens_of().float())

    before = torch.random.get_rng_state()
    assert torch.equal(logits(3), logits(3))
    assert not torch.equal(logits(3), logits(4))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_dim": 6, "attention_heads": 2}, "divisible by 4, for the position code, got 6"),
        ({"hidden_dim": 8, "attention_heads": 3}, "divisible by 3, for attention_heads, got 8"),
    ],
)
def test_widths_that_cannot_be_shared_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(MlcError, match=message):
        head_of(**config)


def test_tokens_without_a_grid_are_refused() -> None:
    with pytest.raises(MlcError, match="where tokens lie"):
        Query2LabelHead(HeadSize(8, 2), DecoderConfig(), torch.Generator())


def test_the_official_layout_and_back_is_the_same() -> None:
    state = head_of(input_projection=True).state_dict()
    official = to_official(state)
    assert official["input_proj.weight"].shape == (WIDTH, WIDTH, 1, 1)
    assert "position" not in official
    back = from_official(official)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], each) for name, each in state.items())
