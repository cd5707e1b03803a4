"""AttentionPoolHead: its formula, its start, its gradient, and what the mean of tokens cannot."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from mlc.heads.attention_pool import AttentionPoolHead
from mlc.heads.linear import LinearHead

WIDTH, CLASSES, TOKENS = 6, 3, 5


def head_of(seed: int = 0, dtype: torch.dtype = torch.float64) -> AttentionPoolHead:
    """Return a head whose queries are not those of the start."""
    generator = torch.Generator().manual_seed(seed)
    head = AttentionPoolHead(WIDTH, CLASSES, generator).to(dtype)
    with torch.no_grad():
        head.query.normal_(std=2, generator=generator)
    return head


def tokens_of(images: int = 4, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, TOKENS, WIDTH, dtype=dtype, generator=generator)


def slow_logits(head: AttentionPoolHead, tokens: Tensor) -> np.ndarray:
    """Return logits (B, L) by the formula, one number after the other."""
    weight, query = head.weight.tolist(), head.query.tolist()
    logits = np.empty((len(tokens), len(weight)))
    for image, items in enumerate(tokens.tolist()):
        for label, bias in enumerate(head.bias.tolist()):
            looks, values = [], []
            for token in items:
                score = sum(q * x for q, x in zip(query[label], token, strict=True))
                looks.append(math.exp(score / math.sqrt(len(token))))
                values.append(sum(w * x for w, x in zip(weight[label], token, strict=True)))
            weighed = sum(look * value for look, value in zip(looks, values, strict=True))
            logits[image, label] = bias + weighed / sum(looks)
    return logits


def test_it_starts_as_the_linear_head_on_the_mean_of_the_tokens() -> None:
    head = AttentionPoolHead(WIDTH, CLASSES, torch.Generator().manual_seed(3))
    linear = LinearHead(WIDTH, CLASSES, torch.Generator().manual_seed(3))
    for name in ("weight", "bias"):
        assert torch.equal(getattr(head, name), getattr(linear, name))
    tokens = tokens_of(dtype=torch.float32)
    torch.testing.assert_close(head(tokens), linear(tokens.mean(dim=1)), rtol=0, atol=1e-6)


def test_the_seed_is_that_of_the_generator() -> None:
    weights = [AttentionPoolHead(4, 2, torch.Generator().manual_seed(each)) for each in (0, 0, 1)]
    assert torch.equal(weights[0].weight, weights[1].weight)
    assert not torch.equal(weights[0].weight, weights[2].weight)


def test_the_formula_is_that_of_a_slow_loop() -> None:
    head, tokens = head_of(), tokens_of()
    got = head(tokens).detach().numpy()
    np.testing.assert_allclose(got, slow_logits(head, tokens), rtol=1e-12, atol=1e-12)


def test_attention_is_of_sum_1_over_the_tokens_for_each_class() -> None:
    attention = head_of().attention(tokens_of())
    assert attention.shape == (4, CLASSES, TOKENS)
    assert (attention > 0).all()
    torch.testing.assert_close(
        attention.sum(dim=2), torch.ones(4, CLASSES, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert not torch.allclose(attention[:, 0], attention[:, 1])  # each class has its own


def test_a_class_looks_at_the_token_that_its_query_points_to() -> None:
    head, tokens = head_of(), tokens_of()
    with torch.no_grad():
        head.query[1] = 1e3 * tokens[2, 3]
    tokens[2, 3] *= 10  # no other token is as far in its direction
    assert head.attention(tokens)[2, 1, 3] > 1 - 1e-9
    expected = head.weight[1] @ tokens[2, 3] + head.bias[1]
    torch.testing.assert_close(head(tokens)[2, 1], expected, rtol=1e-9, atol=0)


def test_the_order_of_tokens_and_the_other_images_change_nothing() -> None:
    head, tokens = head_of(), tokens_of()
    shuffled = tokens[:, torch.tensor([3, 0, 4, 2, 1])]
    torch.testing.assert_close(head(shuffled), head(tokens), rtol=0, atol=1e-12)
    torch.testing.assert_close(head(tokens[1:2]), head(tokens)[1:2], rtol=0, atol=1e-12)


def test_scores_of_any_size_are_finite() -> None:
    head, tokens = head_of(dtype=torch.float32), 1e4 * tokens_of(dtype=torch.float32)
    logits = head(tokens)
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(each.grad).all() for each in head.parameters())


def test_the_gradient_is_that_of_finite_differences() -> None:
    head = head_of()
    names = [name for name, _ in head.named_parameters()]
    assert sorted(names) == ["bias", "query", "weight"]

    def logits(tokens: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(
            head, dict(zip(names, parameters, strict=True)), (tokens,)
        )

    inputs = [tokens_of(2), *head.parameters()]
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    assert torch.autograd.gradcheck(logits, leaves)


def planted(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return tokens (n, 16, 3) and targets (n, 2).

    One token bears the mark of each class, channel 0 or 1, and the sign of its last channel is the
    target. The other tokens have signs too, which say nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (images, 16), generator=generator) * 2.0 - 1
    places = torch.rand(images, 16, generator=generator).argsort(dim=1)[:, :2]
    marks = torch.zeros(images, 16, 2)
    for label in range(2):
        marks[torch.arange(images), places[:, label], label] = 1
    targets = (signs.gather(1, places) > 0).float()
    return torch.cat([marks, signs[..., None]], dim=2), targets


def predictions(head: nn.Module, of_train: Tensor, targets: Tensor, of_test: Tensor) -> Tensor:
    """Train a head; return (n, L) bool, what it says of the test images."""
    optimiser = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(200):
        loss = nn.functional.binary_cross_entropy_with_logits(head(of_train), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return head(of_test) > 0


def test_it_finds_the_one_token_that_carries_a_class_where_the_mean_does_not() -> None:
    (train, targets), (test, truth) = planted(256, seed=0), planted(256, seed=1)
    pool = AttentionPoolHead(3, 2, torch.Generator().manual_seed(0))
    linear = LinearHead(3, 2, torch.Generator().manual_seed(0))
    by_pool = predictions(pool, train, targets, test)
    by_mean = predictions(linear, train.mean(dim=1), targets, test.mean(dim=1))
    assert ((by_pool == truth.bool()).float().mean(dim=0) > 0.95).all()
    assert ((by_mean == truth.bool()).float().mean(dim=0) < 0.75).all()
