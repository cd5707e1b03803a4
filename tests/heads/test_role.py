"""ROLE's label estimator: how it starts, and that dense Adam moves what was visited once."""

import math

import numpy as np
import torch
from scipy.stats import kstest

from mlc.heads.inputs import Split
from mlc.heads.linear import LinearHead
from mlc.heads.losses import LOSSES
from mlc.heads.role import ESTIMATOR_LR_FACTOR, initial_estimator_logits
from mlc.heads.train import run_epoch

KNOBS = {"expected_positives": 1.5}


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


def estimator_after_each_batch(batches: list[list[int]], lr: float = 1e-3) -> list[torch.Tensor]:
    """Train ROLE on 6 images a batch at a time; return the table before and after each."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, generator=generator)
    observed = torch.eye(6, 3, dtype=torch.int8)
    train = Split(np.arange(6).astype(str), features, observed, (observed == 1).numpy())
    head = LinearHead(4, 3, generator)
    estimator = torch.nn.Parameter(initial_estimator_logits(observed, generator))
    groups = [
        {"params": list(head.parameters()), "lr": lr},
        {"params": [estimator], "lr": lr * ESTIMATOR_LR_FACTOR},
    ]
    optimiser = torch.optim.Adam(groups, fused=True)
    tables = [estimator.detach().clone()]
    for batch in batches:
        rows = torch.tensor([batch])
        run_epoch(LOSSES["role"], head, estimator, optimiser, train, rows, KNOBS)
        tables.append(estimator.detach().clone())
    return tables


def test_rows_go_on_moving_in_batches_without_them_once_they_were_visited() -> None:
    before, first, second, third = estimator_after_each_batch([[0, 1], [2, 3], [2, 3]])
    assert (first[:2] != before[:2]).all()
    assert (second[:2] != first[:2]).all()
    assert (third[:2] != second[:2]).all()


def test_rows_that_were_never_visited_do_not_move() -> None:
    tables = estimator_after_each_batch([[0, 1], [2, 3], [2, 3]])
    for table in tables:
        torch.testing.assert_close(table[4:], tables[0][4:], rtol=0, atol=0)
    torch.testing.assert_close(tables[1][2:4], tables[0][2:4], rtol=0, atol=0)
    assert (tables[2][2:4] != tables[0][2:4]).all()


def test_the_first_visit_moves_a_logit_by_ten_times_the_learning_rate() -> None:
    before, after = estimator_after_each_batch([[0, 1]], lr=1e-3)
    step = (after[:2] - before[:2]).abs()
    np.testing.assert_allclose(step, 10 * 1e-3, rtol=0.01)  # Adam's first step is lr * sign
