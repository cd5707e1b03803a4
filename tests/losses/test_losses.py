"""Losses: the authors' values, the formula in a slow loop, and what every entry must satisfy."""

import inspect
import math
from dataclasses import replace

import golden
import numpy as np
import pytest
import torch
from slow_losses import SLOW, K, SlowLoss, slopes, slow_term
from torchvision.ops import sigmoid_focal_loss

from mlc.configs.errors import MlcError
from mlc.losses.method import Method, keywords, wanted
from mlc.losses.table import LOSSES, check_knobs
from mlc.losses.value import loss_gradient, loss_value

CASES = golden.load("mlspl/losses.json")
Q2L = {"gamma_neg": 2, "gamma_pos": 0, "clip": 0, "epsilon": 1e-5}
DETACHED = {**Q2L, "focus_gradient": 0}
# (loss, the authors' entry, knobs); focal's oracle is torchvision, of others there is no code
PARITY = [
    *((name, name, {}) for name in ("bce", "bce_ls", "iun", "iu", "pr", "an", "an_ls", "wan")),
    *((name, name, {}) for name in ("epr", "role", "em", "em_apl")),
    *(
        (f"ll_{scheme}", f"ll-{scheme}_clean_rate_{clean}", {"large_share": 1 - clean})
        for scheme in ("r", "ct", "cp")
        for clean in (1, 0.9)
    ),
    ("hill", "hill", {}),
    ("splc", "splc_epoch0", {}),
    ("splc", "splc_epoch1", {"corrects": 1.0}),
    ("gr", "gr", {"slope": 2.0, "offset": -2.0, "centre": 0.8, "spread": 0.5}),
    ("asl", "asl_gneg4_gpos1_clip0.05_sum", {}),
    ("asl", "q2l_asl_gneg2_gpos0_clip0", Q2L),
    ("asl", "q2l_asl_gneg2_gpos0_clip0_detached", DETACHED),
    ("asl", "q2l_bce", {**Q2L, "gamma_neg": 0}),
]
SOFT_NEGATIVES = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
PRIORS = {
    "class_priors": torch.tensor([[0.5, 0.2, 0.9, 0.3]], dtype=torch.float64),
    "labelled_shares": torch.tensor([[0.2, 0.1, 0.9, 0.0]], dtype=torch.float64),
}
VARIANTS = [
    *((name, {}) for name in LOSSES),
    ("em", {"alpha": 0.3}),
    ("em_apl", {"soft_negatives": SOFT_NEGATIVES}),
    ("ll_r", {"large_share": 0.2}),
    ("ll_ct", {"large_share": 0.2}),
    ("ll_cp", {"large_share": 0.1}),
    ("hill", {"height": 1.2, "margin": 0.5, "gamma": 0.5}),
    ("splc", {"corrects": 1.0}),
    ("splc", {"corrects": 1.0, "threshold": 0.3, "margin": 0.5, "gamma": 0.5}),
    ("gr", {"slope": 2.0, "offset": -2.0, "centre": 0.8, "spread": 0.5}),
    ("gr", {"q2": 0.5, "q3": 0.7}),
    ("crisp", PRIORS),
    ("nnpu", PRIORS),
    ("an_ls", {"smoothing": 0.05}),
    ("wan", {"negative_weight": 0.3}),
    ("focal", {"gamma": 0.5, "alpha": 0.25}),
    ("asl", {"gamma_neg": 0.5, "gamma_pos": 0.3, "clip": 0.3}),
    ("asl", {"gamma_neg": 0, "clip": 0.3}),
    ("asl", Q2L),
    ("asl", DETACHED),
    ("asl", {**DETACHED, "focus_gradient": 0.4, "gamma_pos": 1.7}),
]
# What changes as training goes on, as it is later than in the first epoch.
LATER = {
    "em_apl": {"soft_negatives": SOFT_NEGATIVES},
    **{name: {"large_share": 0.2} for name in ("ll_r", "ll_ct", "ll_cp")},
    "splc": {"corrects": 1.0},
    "crisp": PRIORS,
    "nnpu": PRIORS,
}
KNOB_VALUES = {
    "smoothing": (0.0, 0.05, 0.3),
    "negative_weight": (0.01, 0.3, 1.0),
    "expected_positives": (0.5, 1.5, 2.9),
    "gamma": (0.0, 0.5, 2.0),
    "alpha": (0.25, 0.5, 0.9),
    "gamma_neg": (0.0, 2.0, 4.0),
    "gamma_pos": (0.0, 1.0, 0.5),
    "clip": (0.0, 0.05, 0.2),
    "focus_gradient": (0.0, 1.0, 0.5),
    "epsilon": (1e-8, 0.1, 0.2),
    "beta": (0.1, 0.5, 0.9),
    "height": (1.0, 1.5, 2.0),
    "margin": (0.0, 0.5, 1.0),
    "threshold": (0.1, 0.5, 0.9),
    "q2": (0.01, 0.5, 1.0),
    "q3": (0.01, 0.5, 1.0),
}


def labels_of(case: dict, result: dict) -> torch.Tensor:
    """Our labels: +1, 0 unknown, -1, from the authors', whose true labels are 0 and 1."""
    true = torch.tensor(case["true_labels"]) * 2 - 1
    single = torch.tensor(case["single_positive"])
    return {
        "true_labels": true,
        "single_positive": single,
        "soft_negatives (a value -s marks a soft negative with target s)": single,
        "single_positive + true_labels": torch.where(true == -1, -1, single),
        "one_positive_one_negative": torch.tensor(case["one_positive_one_negative"]),
    }[result["labels"]]


def knobs_of(name: str, expected_positives: float = K) -> dict[str, float]:
    """The knobs that have no default."""
    known = LOSSES[name].knobs().items()
    without = {knob for knob, default in known if default is inspect.Parameter.empty}
    assert without <= {"expected_positives"}
    return dict.fromkeys(without, expected_positives)


def value(name: str, logits, labels, estimator=None, weights=None, **knobs):
    method = LOSSES[name]
    if method.has_estimator and estimator is None:
        estimator = torch.linspace(-2, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    extra = {
        knob: each.to(logits.dtype) if isinstance(each, torch.Tensor) else each
        for knob, each in (knobs_of(name) | knobs).items()
    }
    estimator = estimator if method.has_estimator else None
    return loss_value(
        method, logits, labels, knobs=extra, estimator_logits=estimator, weights=weights
    )


def random_batch(seed: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, generator=generator, dtype=dtype) * 2
    return logits, torch.randint(-1, 2, (5, 4), generator=generator)


def random_estimator(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(5, 4, generator=generator, dtype=torch.float64) * 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
@pytest.mark.parametrize(("name", "entry", "knobs"), PARITY, ids=[entry for _, entry, _ in PARITY])
def test_value_and_gradients_are_the_authors(
    name: str, entry: str, knobs: dict[str, float], case: dict
) -> None:
    result = case["results"][entry]
    logits = torch.tensor(case["logits"], requires_grad=True)
    estimator = torch.tensor(case["estimator_logits"], requires_grad=True)
    knobs = knobs_of(name, case["expected_positives"]) | knobs
    if name == "em_apl":
        soft = -torch.tensor(case["soft_negatives"])
        knobs |= {"soft_negatives": torch.where(soft > 0, soft, -1.0)}
    ours = logits.numel() if "sum" in (entry[-3:], result.get("reduction")) else 1
    theirs = 1000 if entry.startswith("q2l") else 1
    loss = value(name, logits, labels_of(case, result), estimator, **knobs) * ours
    loss.backward()
    close = {"rtol": 1e-5, "atol": 1e-7}
    np.testing.assert_allclose(loss.item(), result["loss"] / theirs, **close)
    np.testing.assert_allclose(logits.grad, np.array(result["grad_logits"]) / theirs, **close)
    assert ("grad_estimator_logits" in result) == LOSSES[name].has_estimator
    if LOSSES[name].has_estimator:
        np.testing.assert_allclose(estimator.grad, result["grad_estimator_logits"], **close)


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_torchvisions(gamma: float, alpha: float | None) -> None:
    logits, labels = random_batch(0)
    labels = torch.where(labels == 0, 1, labels)
    ours = LOSSES["focal"].cells(logits, labels, gamma=gamma, alpha=alpha)
    theirs = sigmoid_focal_loss(
        logits, (labels == 1).double(), alpha=-1 if alpha is None else alpha, gamma=gamma
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def slow_loss(name: str, seed: int, knobs: dict[str, float]) -> SlowLoss:
    logits, labels = random_batch(seed)
    return SlowLoss(name, labels.numpy(), logits.numpy(), random_estimator(seed).numpy(), knobs)


def test_a_batch_has_every_label_in_it() -> None:
    """So that the loops and slopes below look at all of a formula."""
    for seed in (0, 1, 2):
        assert set(random_batch(seed)[1].flatten().tolist()) == {-1, 0, 1}


OWN = [(name, knobs) for name, knobs in VARIANTS if name in SLOW]  # that the loops know


@pytest.mark.parametrize(("name", "knobs"), OWN)
def test_cells_are_the_formula_in_a_loop(name: str, knobs: dict[str, float]) -> None:
    logits, labels = random_batch(0)
    estimator = random_estimator(0)
    extra = {"estimator_logits": estimator} if LOSSES[name].has_estimator else {}
    of_cells = wanted(LOSSES[name].cells, knobs | extra)
    cells = LOSSES[name].cells(logits, labels, **of_cells)
    slow = slow_loss(name, 0, knobs)
    want = slow.cells(logits.numpy(), estimator.numpy())
    np.testing.assert_allclose(cells, want, rtol=1e-9, atol=1e-12)
    got = value(name, logits, labels, estimator, **knobs)
    np.testing.assert_allclose(got, slow(logits.numpy(), estimator.numpy()), rtol=1e-9)


@pytest.mark.parametrize(("name", "knobs"), OWN)
def test_gradients_are_the_slopes_with_stopped_gradients_held(
    name: str, knobs: dict[str, float]
) -> None:
    logits, labels = random_batch(1)
    estimator = random_estimator(1)
    slow = slow_loss(name, 1, knobs)
    value(name, logits.requires_grad_(), labels, estimator.requires_grad_(), **knobs).backward()
    x, e = logits.detach().numpy(), estimator.detach().numpy()
    close = {"rtol": 1e-6, "atol": 1e-9}
    np.testing.assert_allclose(logits.grad, slopes(lambda moved: slow(moved, e), x), **close)
    assert (estimator.grad is not None) == LOSSES[name].has_estimator
    if estimator.grad is not None:
        np.testing.assert_allclose(estimator.grad, slopes(lambda moved: slow(x, moved), e), **close)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        (name, knobs)
        for name, knobs in VARIANTS
        if name not in ("role", "gr") and "focus_gradient" not in knobs
    ],
)
def test_gradcheck(name: str, knobs: dict[str, float]) -> None:
    """Not of stopped gradients, which only the slopes above can hold."""
    logits, labels = random_batch(1)
    assert torch.autograd.gradcheck(
        lambda x: value(name, x, labels, **knobs), logits.requires_grad_()
    )


@pytest.mark.parametrize(("name", "knobs"), VARIANTS)
@pytest.mark.parametrize("size", [100.0, -100.0])
@pytest.mark.parametrize("agree", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(
    name: str, knobs: dict[str, float], size: float, agree: bool, dtype: torch.dtype
) -> None:
    logits = torch.full((5, 4), size, dtype=dtype, requires_grad=True)
    estimator = torch.full((5, 4), size if agree else -size, dtype=dtype, requires_grad=True)
    labels = torch.tensor([[1, 0, 0, -1]] * 5, dtype=torch.int8)
    loss = value(name, logits, labels, estimator, **knobs)
    loss.backward()
    assert loss.dtype == dtype
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    if LOSSES[name].has_estimator:
        assert torch.isfinite(estimator.grad).all()


@pytest.mark.parametrize("label", [1, 0, -1])
@pytest.mark.parametrize("name", LOSSES)
def test_a_cell_of_weight_zero_changes_nothing(name: str, label: int) -> None:
    """Neither its logits nor its label; a regulariser, which sees all logits, left aside."""
    method = replace(LOSSES[name], batch_term=None)
    logits, labels = random_batch(2)
    labels[1] = torch.tensor([1, 0, label, -1])
    estimator = random_estimator(2)
    weights = torch.ones_like(logits)
    weights[1, 2] = 0

    def loss() -> torch.Tensor:
        given = estimator if method.has_estimator else None
        return loss_value(
            method,
            logits,
            labels,
            knobs={} if LOSSES[name].batch_term else LATER.get(name, {}),
            weights=weights,
            estimator_logits=given,
        )

    before = loss()
    logits[1, 2], estimator[1, 2], labels[1, 2] = 3.0, -3.0, {1: 0, 0: -1, -1: 1}[label]
    torch.testing.assert_close(loss(), before, rtol=1e-14, atol=0)
    logits.requires_grad_()
    estimator.requires_grad_()
    loss().backward()
    assert logits.grad[1, 2] == 0
    if method.has_estimator:
        assert estimator.grad[1, 2] == 0


@pytest.mark.parametrize("name", SLOW)
def test_weights_are_of_the_cells_and_leave_the_divisor_and_the_regulariser(name: str) -> None:
    logits, labels = random_batch(2)
    estimator = random_estimator(2)
    method = LOSSES[name]
    slow = slow_loss(name, 2, LATER.get(name, {}))
    rows = torch.tensor([1.0, 0.5, 4.0, 2.0, 3.0])
    weights = rows.sqrt() if name == "pr" else rows  # a pair weighs the product of two
    weights = weights[:, None].expand_as(logits)
    got = value(name, logits, labels, estimator, weights, **LATER.get(name, {}))
    cells = slow.cells(logits.numpy(), estimator.numpy()) * rows.numpy()[:, None]
    term = slow_term(name, logits.numpy(), estimator.numpy(), labels.numpy(), LATER.get(name))
    assert (term != 0) == (method.batch_term is not None)
    np.testing.assert_allclose(got, cells.mean() + term, rtol=1e-6)


def test_a_pair_weighs_the_product_of_its_labels_weights() -> None:
    logits, labels = torch.tensor([[0.3, -1.0, 2.0, 1.0]]), torch.tensor([[1, 0, 0, 1]])
    weights = torch.tensor([[2.0, 3.0, 0.5, 0.0]])
    p = logits.sigmoid()[0]
    want = 2.0 * (3.0 * (1 - p[0] + p[1]) + 0.5 * (1 - p[0] + p[2])) / 4
    torch.testing.assert_close(value("pr", logits, labels, weights=weights), want)


@pytest.mark.parametrize("name", ["bce", "bce_ls", "iun", "iu", "pr", "epr", "focal", "asl"])
def test_a_label_without_weight_is_as_good_as_none(name: str) -> None:
    """Partial labels: masked by weights, or marked as what the loss leaves out."""
    logits, labels = random_batch(4)
    known = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    left_out = -1 if name == "pr" else 0
    marked = value(name, logits, torch.where(known, labels, left_out))
    torch.testing.assert_close(value(name, logits, labels, weights=known.double()), marked)
    assert marked != value(name, logits, labels)


@pytest.mark.parametrize("name", LOSSES)
def test_a_stack_of_heads_gives_each_its_own_loss(name: str) -> None:
    batches = [random_batch(seed) for seed in range(6)]
    logits = torch.stack([logits for logits, _ in batches])
    labels = torch.stack([labels for _, labels in batches])
    estimator = torch.stack([random_estimator(seed) for seed in range(6)])
    alone = torch.stack([value(name, *batch, estimator[i]) for i, batch in enumerate(batches)])
    stacked = value(name, logits, labels, estimator)
    assert stacked.shape == (6,)
    torch.testing.assert_close(stacked, alone, rtol=1e-12, atol=1e-12)
    grid = [each.view(2, 3, 5, 4) for each in (logits, labels, estimator)]
    torch.testing.assert_close(value(name, *grid), alone.view(2, 3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "knob"),
    [
        (name, knob)
        for name, method in LOSSES.items()
        for knob in method.knobs()
        if knob in (keywords(method.cells) | keywords(method.batch_term or method.cells))
        and knob in KNOB_VALUES
    ],
)
def test_a_stack_of_heads_gives_each_its_own_knob(name: str, knob: str) -> None:
    logits, labels = random_batch(5)
    estimator = random_estimator(5)
    given = KNOB_VALUES[knob]
    others = {
        "focus_gradient": {"gamma_pos": 0.7},
        "beta": {"soft_negatives": SOFT_NEGATIVES},
        "threshold": {"corrects": 1.0},
    }.get(knob, {})
    inputs = [logits.clone().requires_grad_() for _ in given]
    alone = [
        value(name, x, labels, estimator, **{knob: number}, **others)
        for x, number in zip(inputs, given, strict=True)
    ]
    torch.stack(alone).sum().backward()
    stack = torch.stack([logits] * len(given)).requires_grad_()
    knobs = {knob: torch.tensor(given, dtype=logits.dtype).view(-1, 1, 1)}
    stacked = value(name, stack, labels, estimator.expand_as(stack), **knobs, **others)
    stacked.sum().backward()
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(stacked, torch.stack(alone), **close)
    torch.testing.assert_close(stack.grad, torch.stack([x.grad for x in inputs]), **close)
    told_apart = torch.stack([x.grad for x in inputs])
    assert (told_apart[0] != told_apart[1]).any()
    assert (told_apart[1] != told_apart[2]).any()


def test_identities() -> None:
    logits, labels = random_batch(3)
    unknown = torch.where(labels == 1, 1, 0)
    known = torch.where(labels == 1, 1, -1)
    same = {"rtol": 0, "atol": 0}
    an = value("an", logits, unknown)
    torch.testing.assert_close(an, value("bce", logits, known), **same)
    torch.testing.assert_close(an, value("an_ls", logits, unknown, smoothing=0.0), **same)
    torch.testing.assert_close(an, value("wan", logits, unknown, negative_weight=1.0), **same)
    for name in ("iun", "iu"):
        torch.testing.assert_close(
            value(name, logits, labels), value("bce", logits, labels), **same
        )
    focal = value("focal", logits, labels, gamma=2.0)
    symmetric = value("asl", logits, labels, gamma_neg=2.0, gamma_pos=2.0, clip=0.0)
    torch.testing.assert_close(focal, symmetric, rtol=1e-12, atol=0)


def test_a_cell_of_asl_is_bounded_and_a_clipped_negative_costs_nothing() -> None:
    logits = torch.tensor([[-60.0, 60.0, -4.0]], requires_grad=True)
    cells = LOSSES["asl"].cells(logits, torch.tensor([[1, -1, -1]]))
    cells.sum().backward()
    bound = -math.log(1e-8)
    # of the negative, 1 - p + clip is 0.05
    want = [bound, -(0.95**4) * math.log(0.05), 0.0]
    np.testing.assert_allclose(cells.detach()[0], want, rtol=1e-6)
    np.testing.assert_allclose(logits.grad, [[0.0, 0.0, 0.0]], atol=1e-20)


def test_knobs_are_checked_before_any_work() -> None:
    check_knobs("an_ls", {"smoothing": 0.05})
    with pytest.raises(MlcError, match=r"an_ls has no knob 'smothing'; did you mean 'smoothing'"):
        check_knobs("an_ls", {"smothing": 0.05})
    with pytest.raises(MlcError, match=r"unknown loss 'rol'; did you mean 'role'"):
        check_knobs("rol", {})
    with pytest.raises(MlcError, match=r"an has no knob 'x'; it has none"):
        check_knobs("an", {"x": 1})


def test_a_list_is_for_knobs_of_classes_alone() -> None:
    check_knobs("nnpu", {"priors": (0.1, 0.2)})
    with pytest.raises(MlcError, match=r"knobs.alpha: should be one number, got \[0.1, 0.2\]"):
        check_knobs("em", {"alpha": (0.1, 0.2)})
    with pytest.raises(MlcError, match=r"knobs.priors: should be from 0 to 1, got 1.2"):
        check_knobs("nnpu", {"priors": (0.1, 1.2)})


def test_weights_and_the_estimator_are_no_knobs() -> None:
    with pytest.raises(MlcError, match=r"pr has no knob 'weights'; it has none"):
        check_knobs("pr", {"weights": 1})
    with pytest.raises(MlcError, match=r"role has no knob 'estimator_logits'"):
        check_knobs("role", {"estimator_logits": 1})


def test_the_table_has_every_method_of_the_papers() -> None:
    wanted = "bce bce_ls iun iu pr an an_ls wan epr role focal asl "
    wanted += "em em_apl ll_r ll_ct ll_cp hill splc gr crisp nnpu"
    assert set(wanted.split()) <= set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_what_changes_has_a_value_from_the_start_and_is_no_knob(name: str) -> None:
    method = LOSSES[name]
    assert bool(method.changing) == (method.schedule is not None or method.recompute is not None)
    for argument in method.changing:
        pieces = [each for each in (method.cells, method.batch_term) if each is not None]
        defaults = [keywords(each)[argument] for each in pieces if argument in keywords(each)]
        assert defaults
        assert inspect.Parameter.empty not in defaults
        with pytest.raises(MlcError, match=f"{name} has no knob '{argument}'"):
            check_knobs(name, {argument: 0.5})


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_that_training_takes_is_autograds(name: str) -> None:
    """Where a method has a formula for it; in a stack too, and with knobs of its own."""
    logits, estimator = (torch.randn(3, 5, 4, dtype=torch.float64) * 3 for _ in range(2))
    labels = torch.randint(-1, 2, (5, 4))
    method, knobs = LOSSES[name], knobs_of(name)
    for changed in ({}, {knob: 0.3 for knob in method.knobs()}):
        leaves = [logits.clone().requires_grad_(), estimator.clone().requires_grad_()]
        table = leaves[1] if method.has_estimator else None
        loss = loss_value(method, leaves[0], labels, knobs=knobs | changed, estimator_logits=table)
        loss.sum().backward()
        found = loss_gradient(
            method,
            logits,
            labels,
            knobs=knobs | changed,
            estimator_logits=estimator if method.has_estimator else None,
        )
        for leaf, gradient in zip(leaves, found, strict=False):
            torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-14)


def test_a_method_with_an_estimator_needs_no_formula_for_its_gradient() -> None:
    logits, estimator = (torch.randn(3, 5, 4, dtype=torch.float64) for _ in range(2))
    labels, role = torch.randint(-1, 2, (5, 4)), LOSSES["role"]
    by_formula, by_autograd = (
        loss_gradient(method, logits, labels, knobs=knobs_of("role"), estimator_logits=estimator)
        for method in (role, replace(role, gradient=None))
    )
    assert len(by_autograd) == 2
    for one, other in zip(by_formula, by_autograd, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_a_new_loss_may_have_knobs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def cells(logits: torch.Tensor, labels: torch.Tensor, *, sharpness: float = 1.0):
        return sharpness * logits * labels

    monkeypatch.setitem(LOSSES, "new", Method(cells, "full"))
    check_knobs("new", {"sharpness": -3.0})
    with pytest.raises(MlcError, match=r"knobs.sharpness: should be a finite number, got inf"):
        check_knobs("new", {"sharpness": math.inf})
