"""Full-batch heads: scikit-learn's optimum, a zero gradient for every loss, odd classes."""

import time

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import softplus

from mlc.configs.errors import MlcError
from mlc.heads import lbfgs
from mlc.heads.full_batch import (
    CONVEX,
    STRENGTHS,
    cell_weights,
    fit_path,
)
from mlc.heads.lbfgs import solve
from mlc.heads.logistic import Problems, Track, bytes_per_slot, rotate
from mlc.losses.table import LOSSES

IMAGES, WIDTH, CLASSES = 300, 12, 5


def problem(
    images: int = IMAGES, width: int = WIDTH, classes: int = CLASSES, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features of unequal scale, far from 0, and noisy labels +1 and -1."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    mix = torch.randn(width, width, **draw) * torch.logspace(-1, 1, width, dtype=torch.float64)
    features = torch.randn(images, width, **draw) @ mix + 3 * torch.randn(width, **draw)
    true = torch.randn(width, classes, **draw) / 10
    logits = (features - features.mean(dim=0)) @ true + torch.linspace(-2, 1, classes)
    labels = torch.where(torch.rand(images, classes, **draw) < logits.sigmoid(), 1, -1)
    return features, labels.to(torch.int8)


def some_unknown(labels: torch.Tensor) -> torch.Tensor:
    hidden = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    return torch.where(hidden, 0, labels)


def objective(path, index, column, features, present, absent) -> torch.Tensor:
    """The loss of a class over C sum(a + b), and its gradient by weights and bias, in float64."""
    weight = path.weight[index, column].double().requires_grad_()
    bias = path.bias[index, column].double().requires_grad_()
    a, b = present[:, column], absent[:, column]
    logits = features.double() @ weight + bias
    loss = (a * softplus(-logits) + b * softplus(logits)).sum()
    loss = loss + weight.square().sum() / (2 * path.strengths[index])
    loss = loss / (a + b).sum()
    loss.backward()
    return torch.cat([loss.detach()[None], weight.grad, bias.grad[None]])


def slow_cell_weights(loss: str, label: int, classes: int) -> tuple[float, float]:
    """What multiplies -log p and -log(1 - p) in one cell, from the tables of the papers' code."""
    if loss in ("bce", "bce_ls", "iu", "iun") and label == 0:
        return 0.0, 0.0
    if loss == "wan":
        return (1.0, 0.0) if label == 1 else (0.0, 1 / (classes - 1))
    near, far = (0.9, 0.1) if loss.endswith("_ls") else (1.0, 0.0)
    return (near, far) if label == 1 else (far, near)


@pytest.mark.parametrize("loss", CONVEX)
def test_cell_weights_are_those_of_the_papers(loss: str) -> None:
    labels = torch.tensor([[1, 0, -1, 0]])
    present, absent = cell_weights(loss, labels, {})
    want = [slow_cell_weights(loss, int(label), 4) for label in labels[0]]
    np.testing.assert_allclose(present[0], [a for a, _ in want], rtol=1e-12)
    np.testing.assert_allclose(absent[0], [b for _, b in want], rtol=1e-12)


@pytest.mark.parametrize("loss", CONVEX)
def test_it_is_the_loss_of_training_but_for_its_epsilon(loss: str) -> None:
    logits = torch.linspace(-2, 2, 12, dtype=torch.float64).view(3, 4)
    labels = torch.tensor([[1, 0, -1, 1], [0, 1, -1, 0], [-1, -1, 1, 0]])
    knobs = {"negative_weight": 0.3} if loss == "wan" else {}
    knobs |= {"smoothing": 0.2} if loss.endswith("_ls") else {}
    present, absent = cell_weights(loss, labels, knobs)
    exact = present * softplus(-logits) + absent * softplus(logits)
    torch.testing.assert_close(
        exact, LOSSES[loss].cells(logits, labels, **knobs), rtol=0, atol=2e-4
    )


def test_weights_scale_cells() -> None:
    labels = torch.tensor([[1, -1, 1]])
    weights = torch.tensor([[2.0, 3.0, 0.0]])
    present, absent = cell_weights("bce_ls", labels, {}, weights)
    np.testing.assert_allclose(present, [[1.8, 0.3, 0.0]], rtol=1e-12)
    np.testing.assert_allclose(absent, [[0.2, 2.7, 0.0]], rtol=1e-12)


def test_the_optimum_is_that_of_scikit_learn() -> None:
    features, labels = problem()
    strengths = (10.0, 1e-3, 0.1)  # in no order
    path = fit_path(features, labels, "bce", strengths, knobs={}, tolerance=1e-9)
    assert path.strengths == strengths
    assert path.converged.all()
    for index, strength in enumerate(strengths):
        for column in range(CLASSES):
            oracle = LogisticRegression(C=strength, tol=1e-12, max_iter=100_000, solver="newton-cg")
            oracle.fit(features.numpy(), labels[:, column].numpy())
            weight, bias = path.weight[index, column], path.bias[index, column]
            np.testing.assert_allclose(weight, oracle.coef_[0], rtol=0, atol=1e-6)
            np.testing.assert_allclose(bias, oracle.intercept_[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", CONVEX)
def test_the_gradient_is_zero_to_the_tolerance(loss: str, weighted: bool) -> None:
    """Convex, so that nothing else need be shown; autograd on the raw features is the judge."""
    features, labels = problem()
    labels = some_unknown(labels)
    weights = None
    if weighted:
        weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2)) * 3
    present, absent = cell_weights(loss, labels, {}, weights)
    path = fit_path(
        features,
        labels,
        loss,
        (0.01, 1.0),
        knobs={},
        weights=weights,
        tolerance=1e-7,
        max_bytes=1,  # one class at a time: what depends on all of them must not show it
    )
    assert path.converged.all()
    for index in range(2):
        for column in range(CLASSES):
            gradient = objective(path, index, column, features, present, absent)[1:]
            assert float(gradient.norm()) <= 1.01e-7


def test_the_tolerance_is_that_of_the_raw_gradient() -> None:
    """Neither looser than promised, nor so strict that it costs steps."""
    features, labels = problem()
    present, absent = cell_weights("bce", labels, {})
    path = fit_path(features, labels, "bce", (0.1,), knobs={}, tolerance=0.03)
    norms = [
        float(objective(path, 0, column, features, present, absent)[1:].norm())
        for column in range(CLASSES)
    ]
    assert max(norms) <= 0.03
    assert max(norms) > 1e-4


def test_float32_is_as_good_as_its_tolerance() -> None:
    features, labels = problem()
    present, absent = cell_weights("bce", labels, {})
    exact = fit_path(features, labels, "bce", (0.01, 1.0), knobs={}, tolerance=1e-10)
    single = fit_path(features.float(), labels, "bce", (0.01, 1.0), knobs={}, tolerance=1e-4)
    assert single.weight.dtype == torch.float32
    assert single.converged.all()
    for index in range(2):
        for column in range(CLASSES):
            best = objective(exact, index, column, features, present, absent)[0]
            got = objective(single, index, column, features, present, absent)[0]
            assert float(got / best - 1) < 1e-5


@pytest.mark.parametrize("classes", [2, 70])
def test_slots_do_not_change_the_answer(classes: int) -> None:
    """With 2 classes a path is cut into parts that start afresh, with 70 each is walked whole."""
    features, labels = problem(classes=classes)
    strengths = (1e-3, 1e-2, 1e-1, 1.0)
    done = []
    path = fit_path(
        features,
        labels,
        "an_ls",
        strengths,
        knobs={},
        tolerance=1e-9,
        progress=lambda count, total, note="": done.append((count, total)),
    )
    assert done[-1] == (4 * classes, 4 * classes)
    assert path.converged.all()
    few = fit_path(
        features,
        labels,
        "an_ls",
        strengths,
        knobs={},
        tolerance=1e-9,
        max_bytes=10 * bytes_per_slot(IMAGES, WIDTH, 8),
    )
    torch.testing.assert_close(few.weight, path.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(few.bias, path.bias, rtol=0, atol=1e-5)
    alone = fit_path(features, labels[:, 1:2], "an_ls", (0.1,), knobs={}, tolerance=1e-9)
    torch.testing.assert_close(alone.weight[0, 0], path.weight[2, 1], rtol=0, atol=1e-6)


def test_no_more_problems_are_under_way_than_there_are_slots() -> None:
    """All classes the same, so that both slots are done at once, and one has no successor."""
    features, labels = problem()
    labels = labels[:, :1].repeat(1, CLASSES)
    asked = []

    def cells(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(columns.tolist())
        present, absent = cell_weights("bce", labels[:, columns], {})
        return present.T, absent.T

    strengths = torch.tensor([0.1, 1.0], dtype=torch.float64)
    rounds = solve(
        Problems(rotate(features), cells, strengths),
        [Track(column, 0, 2) for column in range(CLASSES)],
        slots=2,
        tolerance=1e-6,
        max_iter=100,
    )
    solved = [pair for each in rounds for pair in zip(each.position, each.column, strict=True)]
    assert max(len(columns) for columns in asked) == 2
    assert [column for columns in asked for column in columns] == list(range(CLASSES))
    assert sorted((int(position), int(column)) for position, column in solved) == [
        (position, column) for position in range(2) for column in range(CLASSES)
    ]


def test_what_stalls_does_not_hold_up_the_next_strength() -> None:
    """Nothing meets this tolerance: each problem ends where rounding hides any decrease."""
    features, labels = problem(classes=70)
    strengths = (0.01, 1.0)
    stalled = fit_path(features, labels, "bce", strengths, knobs={}, tolerance=1e-30)
    assert not stalled.converged.any()
    assert int(stalled.iterations.max()) < 500
    path = fit_path(features, labels, "bce", strengths, knobs={}, tolerance=1e-9)
    torch.testing.assert_close(stalled.weight, path.weight, rtol=0, atol=1e-6)


def test_patience_starts_anew_with_each_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = problem(classes=70)
    monkeypatch.setattr(lbfgs, "PATIENCE", 10)
    path = fit_path(features, labels, "bce", (1e-6, 100.0), knobs={}, tolerance=1e-9)
    assert path.converged.all()
    assert int(path.iterations[1].max()) > 10 + int(path.iterations[0].max())


def test_correlated_features_take_few_steps() -> None:
    """The first guess of the Hessian is right where regularisation dominates, good elsewhere."""
    features, labels = problem()
    path = fit_path(features, labels, "bce", (1e-7, 1e-2), knobs={}, tolerance=1e-7)
    assert int(path.iterations[0].max()) <= 4
    assert int(path.iterations[1].max()) <= 20


def test_a_strength_starts_from_the_one_before() -> None:
    features, labels = problem(classes=70)
    path = fit_path(features, labels, "bce", (0.1, 0.1001), knobs={}, tolerance=1e-5)
    assert float(path.iterations[1].double().mean()) < float(path.iterations[0].double().mean()) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_that_have_no_optimum_stay_finite(dtype: torch.dtype) -> None:
    features, labels = problem()
    labels[:, 0] = -1
    labels[:, 1] = 1
    labels[:, 2] = 0
    path = fit_path(features.to(dtype), labels, "bce", STRENGTHS[::4], knobs={})
    assert path.converged.all()
    assert torch.isfinite(path.weight).all()
    assert torch.isfinite(path.bias).all()
    # To the tolerance of 1e-5, where a bias that never ends has a gradient of e^bias.
    assert float(path.weight[:, :3].abs().max()) < 1e-4
    assert -40 < float(path.bias[:, 0].max()) < -11
    assert 11 < float(path.bias[:, 1].min()) < 40
    assert (path.bias[:, 2] == 0).all()
    assert (path.weight[:, 3:].abs().amax(dim=2) > 0).all()


def test_separable_classes_and_dead_features() -> None:
    features, labels = problem(images=20, width=40)  # more unknowns than images
    features[:, 7] = 0
    path = fit_path(features.float(), labels, "bce", (1e-6, 1.0, 1e5), knobs={})
    assert path.converged.all()
    assert torch.isfinite(path.weight).all()
    assert float(path.weight[:2, :, 7].abs().max()) < 1e-6
    right = (path.logits(features.float(), 2) > 0) == (labels == 1)
    assert right.all()


def test_an_interrupt_stops_every_thread() -> None:
    features, labels = problem(classes=80)
    told = []

    def interrupt_once(done: int, total: int, note: str = "") -> None:
        told.append(done)
        if len(told) == 1:
            raise KeyboardInterrupt
        time.sleep(0.01)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit_path(features, labels, "bce", STRENGTHS, knobs={}, progress=interrupt_once)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert told[-1] < 80 * 45 / 4


def test_steps_run_out() -> None:
    features, labels = problem()
    notes = []
    path = fit_path(
        features,
        labels,
        "bce",
        (100.0,),
        knobs={},
        max_iter=2,
        tolerance=1e-9,
        progress=lambda done, total, note="": notes.append(note),
    )
    assert notes[-1] == "5 did not converge"
    assert not path.converged.any()
    assert (path.iterations == 2).all()


def test_the_default_path_is_that_of_dinov3() -> None:
    assert len(STRENGTHS) == 45
    np.testing.assert_allclose([STRENGTHS[0], STRENGTHS[-1]], [1e-6, 1e5])
    np.testing.assert_allclose(np.diff(np.log10(STRENGTHS)), 11 / 44)


def test_what_makes_no_sense_is_refused() -> None:
    features, labels = problem(images=8)
    with pytest.raises(
        MlcError, match=r"unknown full-batch loss 'role'; choose from an, an_ls, bce, bce_ls,"
    ):
        fit_path(features, labels, "role", knobs={})
    with pytest.raises(MlcError, match=r"bce has no knob 'smoothing'"):
        fit_path(features, labels, "bce", knobs={"smoothing": 0.1})
    with pytest.raises(MlcError, match=r"smoothing: should be from 0 to 1, got 1.5"):
        fit_path(features, labels, "an_ls", knobs={"smoothing": 1.5})
    with pytest.raises(MlcError, match=r"negative_weight: should be at least 0, got -1"):
        fit_path(features, labels, "wan", knobs={"negative_weight": -1.0})
    weights = torch.ones(labels.shape)
    weights[3, 1] = -1
    with pytest.raises(MlcError, match=r"weights: should not be negative or NaN, got -1"):
        fit_path(features, labels, "bce", knobs={}, weights=weights)
    with pytest.raises(MlcError, match=r"labels: should be of 8 images, got 7"):
        fit_path(features, labels[:7], "bce", knobs={})
    with pytest.raises(MlcError, match=r"strengths: should be positive numbers, got 0"):
        fit_path(features, labels, "bce", (1.0, 0.0), knobs={})
    with pytest.raises(MlcError, match=r"strengths: is empty"):
        fit_path(features, labels, "bce", (), knobs={})
    with pytest.raises(MlcError, match=r"tolerance: should be a positive number, got 0"):
        fit_path(features, labels, "bce", knobs={}, tolerance=0.0)
    with pytest.raises(MlcError, match=r"max_iter: should be at least 1, got 0"):
        fit_path(features, labels, "bce", knobs={}, max_iter=0)
    features[2, 3], features[5, 0] = torch.nan, torch.inf
    with pytest.raises(MlcError, match=r"features: 2 of 8 rows are not finite: 2, 5"):
        fit_path(features, labels, "bce", knobs={})
