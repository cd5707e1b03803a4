"""ROLE: how its label estimator starts."""

import math

import torch
from scipy.stats import kstest

from mlc.losses.role import initial_estimator_logits


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def start(observed: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return initial_estimator_logits(observed, torch.Generator().manual_seed(seed))


def test_observed_labels_start_at_the_authors_values_exactly() -> None:
    observed = torch.tensor([[1, 0, -1], [-1, 1, 0]], dtype=torch.int8)
    logits = start(observed)
    assert logits.dtype == torch.float32
    assert set(logits[observed == 1].tolist()) == {torch.tensor(logit(0.995)).item()}
    assert set(logits[observed == -1].tolist()) == {torch.tensor(logit(0.005)).item()}


def test_unknown_labels_start_uniform_in_logits_between_04_and_06() -> None:
    logits = start(torch.zeros(500, 40, dtype=torch.int8)).flatten()
    probs = logits.sigmoid()
    assert 0.4 <= probs.min() < 0.4001
    assert 0.5999 < probs.max() <= 0.6
    uniform = kstest(logits.numpy(), "uniform", args=(-logit(0.6), 2 * logit(0.6)))
    assert uniform.pvalue > 0.01


def test_the_start_depends_on_the_seed_alone() -> None:
    observed = torch.zeros(6, 5, dtype=torch.int8)
    torch.testing.assert_close(start(observed), start(observed), rtol=0, atol=0)
    assert (start(observed) != start(observed, seed=1)).all()


def test_observing_a_label_does_not_shift_the_draws_of_the_others() -> None:
    nothing = torch.zeros(6, 5, dtype=torch.int8)
    something = nothing.clone()
    something[2, 3] = 1
    same = start(nothing) == start(something)
    assert (~same).nonzero().tolist() == [[2, 3]]
