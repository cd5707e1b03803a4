"""The estimator's table: visited rows alone, and the numbers of dense Adam."""

import copy

import numpy as np
import pytest
import torch

from mlc.heads.estimator import (
    BETA1,
    BETA2,
    EPS,
    SETTLED,
    TERMS,
    Estimator,
    Visits,
    displacement,
    quadrature,
)

LR = 0.1


class Dense:
    """The same table under torch's own Adam, every row at every step."""

    def __init__(self, start: torch.Tensor) -> None:
        self.table = torch.nn.Parameter(start.clone())
        self.optimiser = torch.optim.Adam([self.table], lr=LR)

    def step(self, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        self.table.grad = torch.zeros_like(self.table)
        self.table.grad[:, rows] = gradient
        self.optimiser.step()


def lazy_and_dense(
    images: int, batch: int, epochs: int, dtype=torch.float64, heads: int = 1, skip: int = 0
):
    """Yield after each epoch both tables, and the largest difference of the logits read so far.

    Gradients are from 1e-12 to 1e-3, so that eps is everything from nothing to all there is.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(heads, images, 5, generator=generator, dtype=dtype)
    lazy = Estimator(start, torch.full((heads,), LR, dtype=dtype))
    dense, worst = Dense(start), 0.0
    for epoch in range(epochs):
        order = torch.randperm(images, generator=generator)[: images // batch * batch]
        batches = order.view(-1, batch)
        visits = lazy.schedule(batches)
        for step, rows in enumerate(batches):
            logits, m, v = lazy.read(rows, visits.at(step))
            if epoch >= skip:
                worst = max(
                    worst,
                    float((logits - dense.table.detach()[:, rows].transpose(0, 1)).abs().max()),
                )
            size = 10 ** (torch.rand(logits.shape, generator=generator, dtype=dtype) * 9 - 12)
            gradient = size * torch.randn(logits.shape, generator=generator, dtype=dtype)
            lazy.update(rows, visits.at(step), logits, m, v, gradient)
            dense.step(rows, gradient.transpose(0, 1))
        yield lazy, dense, worst


def difference(lazy: Estimator, dense: Dense) -> float:
    table = torch.stack([lazy.logits(head) for head in range(len(dense.table))])
    return float((table - dense.table.detach()).abs().max())


@pytest.mark.parametrize(("images", "batch"), [(12, 4), (60, 4), (1600, 4)])
def test_reading_only_what_is_visited_gives_the_numbers_of_dense_adam(
    images: int, batch: int
) -> None:
    epochs = max(2, 600 * batch // images)
    for lazy, dense, worst in lazy_and_dense(images, batch, epochs):
        assert worst < 2e-6  # the first steps, where the bias corrections are steepest
        assert difference(lazy, dense) < 2e-6
    assert float(dense.table.detach().std()) > 1.5


def test_from_the_hundredth_step_on_the_difference_is_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(1, 40, 5, dtype=torch.float64)
    lazy, dense = Estimator(start, torch.full((1,), LR, dtype=torch.float64)), Dense(start)
    lazy.steps = 100
    dense.step(torch.arange(1), torch.zeros(1, 1, 5, dtype=torch.float64))
    dense.optimiser.state[dense.table]["step"] += 99
    for _ in range(60):
        batches = torch.randperm(40, generator=generator).view(-1, 4)
        visits = lazy.schedule(batches)
        for step, rows in enumerate(batches):
            logits, m, v = lazy.read(rows, visits.at(step))
            gradient = 1e-4 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
            lazy.update(rows, visits.at(step), logits, m, v, gradient)
            dense.step(rows, gradient.transpose(0, 1))
    assert difference(lazy, dense) < 1e-12
    assert float(dense.table.detach().abs().max()) > 1


def test_in_float32_it_is_as_far_from_float64_as_dense_adam_is() -> None:
    *_, (lazy, dense, worst) = lazy_and_dense(60, 4, 40, torch.float32)
    assert worst < 5e-5
    assert difference(lazy, dense) < 5e-5


def test_each_head_of_a_stack_has_its_own_learning_rate() -> None:
    lr = torch.tensor([0.1, 0.01])
    both = Estimator(torch.zeros(2, 4, 3), lr)
    rows = torch.tensor([1, 3])
    visits = both.schedule(rows[None])
    logits, m, v = both.read(rows, visits.at(0))
    both.update(rows, visits.at(0), logits, m, v, torch.ones(2, 2, 3))
    moved = [both.logits(head)[rows] for head in range(2)]
    torch.testing.assert_close(moved[0], torch.full((2, 3), -0.1), rtol=1e-4, atol=0)
    torch.testing.assert_close(moved[1], torch.full((2, 3), -0.01), rtol=1e-4, atol=0)


def test_a_copy_goes_on_to_the_same_numbers() -> None:
    """A resumed run has nothing but the table, the last visits and the number of steps."""
    steps = lazy_and_dense(60, 4, 6)
    lazy, *_ = next(steps)
    resumed = Estimator(torch.zeros(1, 60, 5, dtype=torch.float64), lazy.lr)
    for name in ("table", "last_visit", "steps"):
        setattr(resumed, name, copy.deepcopy(getattr(lazy, name)))
    rows = torch.arange(8).view(2, 4)
    for estimator in (lazy, resumed):
        visits = estimator.schedule(rows)
        for step in range(2):
            logits, m, v = estimator.read(rows[step], visits.at(step))
            estimator.update(rows[step], visits.at(step), logits, m, v, torch.ones_like(logits))
    assert torch.equal(lazy.logits(0), resumed.logits(0))


def test_rows_without_a_visit_stay_as_they_started() -> None:
    start = torch.randn(1, 6, 3)
    lazy = Estimator(start, torch.full((1,), LR))
    rows = torch.tensor([0, 1])
    for _ in range(3):
        visit = lazy.schedule(rows[None]).at(0)
        logits, m, v = lazy.read(rows, visit)
        lazy.update(rows, visit, logits, m, v, torch.ones_like(logits))
    assert torch.equal(lazy.logits(0)[2:], start[0, 2:])
    assert (lazy.logits(0)[:2] < start[0, :2] - LR).all()


@pytest.mark.parametrize("step", [1, 2, 7, 50, 1023, 1024, 5000, SETTLED, 10**6])
def test_quadrature_is_the_sum_of_all_the_steps_to_come(step: int) -> None:
    nodes, weights = quadrature(step, 1)
    v = 10.0 ** torch.arange(-30, 3, dtype=torch.float64).view(1, 1, -1)
    m = torch.sqrt(v)
    term = np.arange(2 * TERMS)[:, None]
    visit = Visits(m, nodes.view(-1, 1, 1, 1), weights.view(-1, 1, 1, 1))
    found = displacement(m, v, visit).flatten().numpy()
    scale = np.sqrt(v.flatten().numpy() * BETA2**term / (1 - BETA2 ** (step + term)))
    parts = BETA1**term / (1 - BETA1 ** (step + term)) / (scale + EPS)
    want = m.flatten().numpy() * parts.sum(axis=0)
    np.testing.assert_allclose(found, want, rtol=2e-6 if step < 20 else 1e-8)
    if 100 <= step < SETTLED:
        np.testing.assert_allclose(found, want, rtol=1e-12)


def test_quadratures_of_several_steps_are_those_of_each() -> None:
    nodes, weights = quadrature(1020, 10)  # over the edge of a chunk
    for offset in range(10):
        alone = quadrature(1020 + offset, 1)
        np.testing.assert_array_equal(nodes[offset], alone[0][0])
        np.testing.assert_array_equal(weights[offset], alone[1][0])


def test_a_table_read_in_pieces_is_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, (lazy, _, _) = lazy_and_dense(60, 4, 3, heads=2)
    whole = [lazy.logits(head) for head in range(2)]
    monkeypatch.setattr("mlc.heads.estimator.ROWS_AT_ONCE", 7)
    for head in range(2):
        torch.testing.assert_close(lazy.logits(head), whole[head], rtol=1e-12, atol=1e-12)
    assert not torch.equal(whole[0], lazy.table[:, 0, 0])  # rows are on their way
