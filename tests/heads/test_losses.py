"""Losses: the authors' values, the formula in a slow loop, and what every entry must satisfy."""

import math

import golden
import numpy as np
import pytest
import torch

from mlc.configs.errors import MlcError
from mlc.heads.losses import LOSSES, check_knobs, loss_value

CASES = golden.load("mlspl/losses.json")
K = 1.5
WITHOUT_ESTIMATOR = [name for name, method in LOSSES.items() if not method.has_estimator]


def signed(true_labels: object) -> torch.Tensor:
    """Our full labels, +1 and -1, from the authors' 1 and 0."""
    return torch.tensor(true_labels) * 2 - 1


def labels_of(case: dict, result: dict) -> torch.Tensor:
    name = result["labels"]
    return signed(case[name]) if name == "true_labels" else torch.tensor(case[name])


def knobs_of(name: str, expected_positives: float = K) -> dict[str, float]:
    known = LOSSES[name].knobs()
    return {"expected_positives": expected_positives} if "expected_positives" in known else {}


def value(name: str, logits, labels, estimator=None, weights=None, **knobs):
    method = LOSSES[name]
    if method.has_estimator and estimator is None:
        estimator = torch.linspace(-2, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    extra = knobs_of(name) | knobs
    estimator = estimator if method.has_estimator else None
    return loss_value(
        method, logits, labels, knobs=extra, estimator_logits=estimator, weights=weights
    )


def random_batch(seed: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, generator=generator, dtype=dtype) * 2
    return logits, torch.randint(-1, 2, (5, 4), generator=generator)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_the_authors(name: str, case: dict) -> None:
    result = case["results"][name]
    logits = torch.tensor(case["logits"], requires_grad=True)
    estimator = torch.tensor(case["estimator_logits"], requires_grad=True)
    knobs = knobs_of(name, case["expected_positives"])
    loss = value(name, logits, labels_of(case, result), estimator, **knobs)
    loss.backward()
    close = {"rtol": 1e-5, "atol": 1e-7}
    np.testing.assert_allclose(loss.item(), result["loss"], **close)
    np.testing.assert_allclose(logits.grad, result["grad_logits"], **close)
    if "grad_estimator_logits" in result:
        np.testing.assert_allclose(estimator.grad, result["grad_estimator_logits"], **close)


def nl(p: float) -> float:
    return -math.log(p + 1e-5)


def slow_cell(name: str, p: float, z: int, classes: int) -> float:
    """One cell, transcribed from the table of the paper's code, with -1 as an observed negative."""
    smooth = 0.9 * nl(p) + 0.1 * nl(1 - p), 0.9 * nl(1 - p) + 0.1 * nl(p)
    negative = nl(1 - p)
    return {
        "bce": (nl(p), 0.0, negative),
        "bce_ls": (smooth[0], 0.0, smooth[1]),
        "an": (nl(p), negative, negative),
        "an_ls": (smooth[0], smooth[1], smooth[1]),
        "wan": (nl(p), negative / (classes - 1), negative / (classes - 1)),
        "epr": (nl(p), 0.0, negative),
    }[name][{1: 0, 0: 1, -1: 2}[z]]


@pytest.mark.parametrize("name", WITHOUT_ESTIMATOR)
def test_cells_are_the_formula_in_a_loop(name: str) -> None:
    logits, labels = random_batch(0)
    cells = LOSSES[name].cells(logits, labels)
    for row in range(5):
        for column in range(4):
            p = 1 / (1 + math.exp(-logits[row, column].item()))
            want = slow_cell(name, p, int(labels[row, column]), classes=4)
            assert cells[row, column].item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("name", WITHOUT_ESTIMATOR)
def test_gradient_is_the_numeric_one(name: str) -> None:
    """Not of ROLE: its targets are detached, so a difference sees more than the gradient has."""
    logits, labels = random_batch(1)
    assert torch.autograd.gradcheck(lambda x: value(name, x, labels), logits.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [100.0, -100.0])
def test_extreme_logits_stay_finite(name: str, size: float) -> None:
    logits = torch.full((3, 4), size, requires_grad=True)
    estimator = torch.full((3, 4), -size, requires_grad=True)
    labels = torch.tensor([[1, 0, 0, -1]] * 3)
    loss = value(name, logits, labels, estimator)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_cell_of_weight_zero_costs_nothing_and_has_no_gradient_of_its_own(name: str) -> None:
    logits, labels = random_batch(2)
    weights = torch.ones_like(logits)
    weights[1, 2] = 0
    method = LOSSES[name]
    extra = {"estimator_logits": torch.zeros_like(logits)} if method.has_estimator else {}
    cells = method.cells(logits.requires_grad_(), labels, **extra)
    (cells * weights).sum().backward()
    assert logits.grad[1, 2] == 0
    got = value(name, logits, labels, torch.zeros_like(logits), weights)
    term = method.batch_term(logits, **(knobs_of(name) | extra)) if method.batch_term else 0
    expected = (cells.sum() - cells[1, 2]) / cells.numel() + term
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_stack_of_heads_gives_each_its_own_loss(name: str) -> None:
    batches = [random_batch(seed) for seed in range(3)]
    logits = torch.stack([logits for logits, _ in batches])
    labels = torch.stack([labels for _, labels in batches])
    estimator = torch.randn(logits.shape, dtype=torch.float64)
    stacked = value(name, logits, labels, estimator)
    alone = [value(name, *batch, estimator[i]) for i, batch in enumerate(batches)]
    assert stacked.shape == (3,)
    torch.testing.assert_close(stacked, torch.stack(alone), rtol=1e-12, atol=1e-12)


def test_identities() -> None:
    logits, labels = random_batch(3)
    unknown = torch.where(labels == 1, 1, 0)
    known = torch.where(labels == 1, 1, -1)
    same = {"rtol": 0, "atol": 0}
    an = value("an", logits, unknown)
    torch.testing.assert_close(an, value("bce", logits, known), **same)
    torch.testing.assert_close(an, value("an_ls", logits, unknown, smoothing=0.0), **same)
    torch.testing.assert_close(an, value("wan", logits, unknown, negative_weight=1.0), **same)


def test_knobs_are_checked_before_any_work() -> None:
    check_knobs("an_ls", {"smoothing": 0.05})
    with pytest.raises(MlcError, match=r"an_ls has no knob 'smothing'; did you mean 'smoothing'"):
        check_knobs("an_ls", {"smothing": 0.05})
    with pytest.raises(MlcError, match=r"unknown loss 'rol'; did you mean 'role'"):
        check_knobs("rol", {})
    with pytest.raises(MlcError, match=r"an has no knob 'x'; it has none"):
        check_knobs("an", {"x": 1})
