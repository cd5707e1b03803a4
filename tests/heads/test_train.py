"""The training step: the authors' trajectory, and what a run's numbers may depend on."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mlc.configs.device import one_thread
from mlc.configs.errors import MlcError
from mlc.heads.block import LinearBlock, Start
from mlc.heads.config import TrainConfig
from mlc.heads.inputs import Split
from mlc.heads.linear import LinearHead
from mlc.heads.metrics import mean_ap
from mlc.heads.train import (
    _epochs,
    batches_of_epoch,
    probabilities,
    score,
    train_block,
    train_head,
)
from mlc.heads.trained import Diverged, TrainedHead
from mlc.losses.table import LOSSES


def random_split(images: int, seed: int) -> Split:
    """Return images whose labels follow their features, with some noise, half of them observed."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, 6, generator=generator)
    noise = torch.randn(images, 4, generator=generator)
    true = features[:, :4] + noise > 0.5
    true[0] = True
    hidden = torch.rand(images, 4, generator=generator) < 0.5
    observed = torch.where(hidden, 0, true * 2 - 1).to(torch.int8)
    return Split(np.arange(images).astype(str), features, observed, true.numpy())


@pytest.fixture
def splits() -> dict[str, Split]:
    return {name: random_split(60, seed) for seed, name in enumerate(("train", "val", "test"))}


def train(splits: dict[str, Split], **settings: Any) -> TrainedHead:
    loss = settings.setdefault("loss", "an")
    known = LOSSES[loss].knobs()
    knobs = {"expected_positives": 1.5} if "expected_positives" in known else {}
    return train_head(
        TrainConfig(**({"epochs": 4, "lr": 1e-2, "device": "cpu", "knobs": knobs} | settings)),
        splits,
    )


def same(one: TrainedHead, other: TrainedHead) -> bool:
    """Whether two trainings gave the same bits."""
    states = (torch.equal(one.state[name], other.state[name]) for name in one.state)
    logits = (np.array_equal(one.logits[name], other.logits[name]) for name in one.logits)
    return one.history == other.history and all(states) and all(logits)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_seeds_give_the_same_bits(splits: dict[str, Split], loss: str) -> None:
    assert same(train(splits, loss=loss), train(splits, loss=loss))


@pytest.mark.parametrize("loss", ["an", "role"])
@pytest.mark.parametrize("seed", ["seed", "order_seed"])
def test_another_seed_gives_another_head(splits: dict[str, Split], loss: str, seed: str) -> None:
    assert not same(train(splits, loss=loss), train(splits, loss=loss, **{seed: 1}))


def test_the_state_of_other_generators_does_not_matter(splits: dict[str, Split]) -> None:
    torch.manual_seed(1)
    first = train(splits, loss="role")
    torch.manual_seed(2)
    assert same(first, train(splits, loss="role"))


def test_history_has_a_line_for_each_epoch_and_progress_hears_of_it(splits: dict) -> None:
    heard = []
    config = TrainConfig(loss="bce", epochs=3, lr=1e-2)
    trained = train_head(config, splits, lambda done, total, note="": heard.append((done, total)))
    assert [line["epoch"] for line in trained.history] == [1, 2, 3]
    assert heard == [(1, 3), (2, 3), (3, 3)]
    losses = [line["loss"] for line in trained.history]
    assert 0 < losses[-1] < losses[0] < 2


@pytest.mark.parametrize("loss", LOSSES)
def test_a_line_tells_how_many_positives_the_head_estimates(splits: dict, loss: str) -> None:
    trained = train(splits, loss=loss)
    best = trained.history[trained.best_epoch - 1]
    probs = 1 / (1 + np.exp(-trained.logits["val"].astype(np.float64)))
    want = probs.sum(axis=1).mean()
    assert best["val_estimated_positives"] == pytest.approx(want, rel=1e-5)
    others = {line["val_estimated_positives"] for line in trained.history}
    assert len(others) == len(trained.history)


def test_roles_lines_tell_what_its_table_is_worth(splits: dict) -> None:
    """Recomputed from the tables of a block that took the same steps."""
    history = train(splits, loss="role", lr=3e-2, batch_size=7).history
    train_ = splits["train"]
    order = torch.Generator().manual_seed(0)
    knobs, start = {"expected_positives": 1.5}, Start(3e-2, 0.0, seed=0)
    with one_thread():
        block = LinearBlock(LOSSES["role"], knobs, [start], train_, 7)
        assert block.estimator is not None
        for line in history:
            block.epoch(batches_of_epoch(60, 7, order))
            estimates = torch.sigmoid(block.estimator.logits(0)).numpy().astype(np.float64)
            hidden = train_.observed.numpy() == 0
            hits = (hidden & train_.true & (estimates > 0.5)).sum()
            assert 0 < hits < (hidden & train_.true).sum()
            assert line["hidden_precision"] == 100 * hits / (hidden & (estimates > 0.5)).sum()
            assert line["hidden_recall"] == 100 * hits / (hidden & train_.true).sum()
            want = estimates.sum(axis=1).mean()
            assert line["train_estimated_positives"] == pytest.approx(want, rel=1e-6)
    assert len({line["train_estimated_positives"] for line in history}) == 4


def test_only_role_has_a_table_to_tell_of(splits: dict) -> None:
    own = {"train_estimated_positives", "hidden_precision", "hidden_recall"}
    for loss in LOSSES:
        assert (set(train(splits, loss=loss).history[0]) >= own) == (loss == "role")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes the validation mAP of the epochs to come what it is told."""

    def script(*values: float) -> None:
        rest = iter(values)
        monkeypatch.setattr("mlc.heads.train.mean_ap", lambda *_: next(rest))

    return script


@pytest.mark.parametrize(
    ("maps", "best"), [((10, 50, 30, 50, 20), 2), ((5, 4, 3), 1), ((1, 1, 2), 3), ((0, 0), 1)]
)
def test_the_first_of_the_best_epochs_is_kept(
    splits: dict, scripted: Callable[..., None], maps: tuple[float, ...], best: int
) -> None:
    scripted(*maps)
    trained = train(splits, epochs=len(maps))
    assert trained.best_epoch == best
    assert [line["val_mAP"] for line in trained.history] == list(maps)
    scripted(*range(best))  # rising: the last is kept
    stopped_there = train(splits, epochs=best)
    assert stopped_there.best_epoch == best
    for name, value in trained.state.items():
        assert torch.equal(value, stopped_there.state[name])
    for name, logits in trained.logits.items():
        np.testing.assert_array_equal(logits, stopped_there.logits[name])


def test_logits_are_those_of_the_state_that_is_kept(
    splits: dict, scripted: Callable[..., None]
) -> None:
    scripted(1, 3, 2, 2)
    trained = train(splits)
    for name in ("val", "test"):
        want = splits[name].features @ trained.state["weight"].T + trained.state["bias"]
        np.testing.assert_allclose(trained.logits[name], want, rtol=1e-5, atol=1e-6)


def test_the_recorded_map_is_that_of_clean_validation_labels(splits: dict) -> None:
    trained = train(splits, loss="bce")
    best = trained.history[trained.best_epoch - 1]["val_mAP"]
    assert best == mean_ap(probabilities(trained.logits["val"]), splits["val"].true)
    assert best == max(line["val_mAP"] for line in trained.history)


def test_observed_validation_labels_can_choose_another_epoch(
    splits: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, observed = splits["val"].true, (splits["val"].observed == 1).numpy()
    assert (clean != observed).any()
    rising, falling = iter((1, 2, 3)), iter((3, 2, 1))

    def map_of(_, targets):
        if np.array_equal(targets, clean):
            return next(rising)
        np.testing.assert_array_equal(targets, observed)
        return next(falling)

    monkeypatch.setattr("mlc.heads.train.mean_ap", map_of)
    assert train(splits, epochs=3, val_labels="clean").best_epoch == 3
    assert train(splits, epochs=3, val_labels="observed").best_epoch == 1


def test_the_test_split_never_influences_training_or_selection(splits: dict) -> None:
    other = random_split(45, seed=9)
    first, second = train(splits), train(splits | {"test": other})
    assert first.history == second.history
    assert first.best_epoch == second.best_epoch
    for name, value in first.state.items():
        assert torch.equal(value, second.state[name])
    assert len(second.logits["test"]) == 45


def test_training_sees_observed_labels_only(splits: dict) -> None:
    lying = replace(splits["train"], true=~splits["train"].true)
    assert same(train(splits), train(splits | {"train": lying}))


@pytest.mark.parametrize(
    ("images", "size", "shape"), [(10, 4, (2, 4)), (8, 4, (2, 4)), (3, 16, (1, 3))]
)
def test_batches_are_whole_and_no_row_is_in_two(images: int, size: int, shape: tuple) -> None:
    batches = batches_of_epoch(images, size, torch.Generator().manual_seed(0))
    assert batches.shape == shape
    rows = batches.flatten().tolist()
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(images))


def test_other_rows_are_dropped_in_each_epoch() -> None:
    order = torch.Generator().manual_seed(0)
    dropped = [
        set(range(10)) - set(batches_of_epoch(10, 4, order).flatten().tolist()) for _ in range(40)
    ]
    assert {len(each) for each in dropped} == {2}
    assert set().union(*dropped) == set(range(10))


def test_heads_that_differ_in_their_seed_share_every_batch(
    splits: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def spy(*arguments):
        batches = batches_of_epoch(*arguments)
        seen.append(batches.flatten().tolist())
        return batches

    monkeypatch.setattr("mlc.heads.train.batches_of_epoch", spy)
    train(splits, loss="role", seed=0)
    train(splits, loss="role", seed=1)
    train(splits, loss="an", seed=0)
    assert seen[:4] == seen[4:8] == seen[8:]
    assert seen[0] != seen[1]


def in_views(splits: dict[str, Split], noise: float, views: int = 2) -> dict[str, Split]:
    """Return splits with views that differ by some noise; the first is that of the splits."""
    generator = torch.Generator().manual_seed(3)
    seen = {}
    for name, split in splits.items():
        other = torch.randn(views, *split.features.shape, generator=generator)
        other[0] = 0
        seen[name] = replace(split, views=split.features + noise * other)
    return seen


@pytest.mark.parametrize("loss", LOSSES)
def test_views_that_are_all_the_same_change_no_bit(splits: dict, loss: str) -> None:
    """Neither in training, where they disturb no other draw, nor in the mean of the logits."""
    plain, views = train(splits, loss=loss), in_views(splits, noise=0)
    assert same(plain, train(views, loss=loss))
    assert same(plain, train(views, loss=loss, view_augment=True))
    assert same(plain, train(views, loss=loss, view_augment=True, eval_views="mean"))


@pytest.mark.parametrize("loss", ["bce", "role"])
def test_views_are_seen_in_training_and_drawn_from_the_order_seed(splits: dict, loss: str) -> None:
    views = in_views(splits, noise=0.5)
    augmented = train(views, loss=loss, view_augment=True)
    assert same(augmented, train(views, loss=loss, view_augment=True))
    assert not same(augmented, train(splits, loss=loss))
    assert same(train(views, loss=loss), train(splits, loss=loss))
    other = in_views(splits, noise=0.7)["train"]
    assert not same(augmented, train(views | {"train": other}, loss=loss, view_augment=True))
    assert same(  # scored in the first view
        augmented, train(splits | {"train": views["train"]}, loss=loss, view_augment=True)
    )


def test_every_view_is_drawn_for_its_share_and_anew_in_each_epoch(
    splits: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []
    epoch = LinearBlock.epoch

    def spy(block, batches, check, views):
        drawn.append((batches, views))
        return epoch(block, batches, check, views)

    monkeypatch.setattr(LinearBlock, "epoch", spy)
    views = in_views(splits, noise=0.5, views=3)
    for seeds in ({}, {"seed": 1}, {"order_seed": 1}):
        train(views, view_augment=True, batch_size=4, epochs=40, **seeds)
    first, again, other = (drawn[start : start + 40] for start in (0, 40, 80))
    assert all(torch.equal(one[1], two[1]) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one[1], two[1]) for one, two in zip(first, other, strict=True))
    assert len({tuple(views.flatten().tolist()) for _, views in first}) == 40
    counts = torch.stack([views for _, views in first]).flatten().bincount()
    assert len(counts) == 3
    assert counts.min() > 0.28 * counts.sum()


def test_views_do_not_follow_from_the_rows(splits: dict) -> None:
    """A generator of the same seed would draw both from the same numbers."""
    wide = {"train": replace(random_split(2, 0), image_id=np.arange(20_000).astype(str))}
    seen = in_views(wide, noise=0.5)["train"]
    config = TrainConfig(view_augment=True, batch_size=1, epochs=1)
    ((rows, views),) = _epochs(config, seen)
    position = torch.arange(20_000)
    drawn = (rows[:, 0] - position) % 2  # what is left of the number that chose the row
    agree = float((drawn == views[:, 0]).double().mean())
    assert abs(agree - 0.5) < 0.02


@pytest.mark.parametrize("loss", ["an", "role"])
def test_the_mean_over_views_is_that_of_their_logits(splits: dict, loss: str) -> None:
    views = in_views(splits, noise=0.5, views=3)
    trained = train(views, loss=loss, eval_views="mean")
    weight, bias = trained.state["weight"], trained.state["bias"]
    for name in ("val", "test"):
        want = sum(seen @ weight.T + bias for seen in views[name].views) / 3
        np.testing.assert_allclose(trained.logits[name], want, rtol=1e-5, atol=1e-5)
        first = splits[name].features @ weight.T + bias
        assert np.abs(trained.logits[name] - first.numpy()).max() > 0.1
    best = trained.history[trained.best_epoch - 1]["val_mAP"]
    assert best == mean_ap(probabilities(trained.logits["val"]), splits["val"].true)


def test_a_head_of_its_own_is_scored_like_the_block(splits: dict) -> None:
    views = in_views(splits, noise=0.5)
    trained = train(views, eval_views="mean")
    head = LinearHead(6, 4, torch.Generator())
    head.load_state_dict(trained.state)
    want = trained.logits["test"]
    np.testing.assert_allclose(score(head, views["test"], "an", "mean"), want, atol=1e-5)
    first = head(splits["test"].features).detach()
    np.testing.assert_array_equal(score(head, views["test"], "an"), first)
    views["test"].views[1, 3, 2] = math.inf
    with pytest.raises(Diverged):
        score(head, views["test"], "an", "mean")


@pytest.mark.parametrize("loss", ["bce", "role"])
def test_fewer_images_than_a_batch_are_one_batch(splits: dict, loss: str) -> None:
    splits["train"] = random_split(3, seed=5)
    trained = train(splits, loss=loss, batch_size=16)
    assert len({line["loss"] for line in trained.history}) == 4


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_features_that_are_not_finite_are_told(splits: dict, value: float) -> None:
    splits["train"].features[7, 2] = value
    with pytest.raises(MlcError, match=r"an: training diverged, .* not finite; .* smaller lr"):
        train(splits)


def test_a_learning_rate_that_overflows_is_told(splits: dict) -> None:
    with pytest.raises(MlcError, match=r"bce: training diverged, .* not finite; .* smaller lr"):
        train(splits, loss="bce", lr=1e38)


def test_a_head_that_diverges_in_any_epoch_has_diverged(
    splits: dict, scripted: Callable[..., None]
) -> None:
    scripted(50, math.nan, 60, 70)
    with pytest.raises(Diverged, match=r"an: training diverged"):
        train(splits)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_head_of_a_block_that_diverges_leaves_the_others_their_bits(
    splits: dict, loss: str
) -> None:
    knobs = {"expected_positives": 1.5} if "expected_positives" in LOSSES[loss].knobs() else {}
    configs = [
        TrainConfig(loss=loss, lr=lr, seed=seed, knobs=knobs, epochs=3)
        for lr, seed in ((1e-2, 0), (1e38, 0), (1e-2, 1), (1e38, 1))
    ]
    together = train_block(configs, splits)
    assert [isinstance(each, Diverged) for each in together] == [False, True, False, True]
    for each in (0, 2):
        (lonely,) = train_block([configs[each]], splits)
        assert isinstance(lonely, TrainedHead)
        assert isinstance(together[each], TrainedHead)
        assert same(lonely, together[each])


def test_torch_has_its_threads_back_after_training(splits: dict) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(splits)
        assert torch.get_num_threads() == 2
        with pytest.raises(Diverged):
            train(splits, lr=1e38)
        with pytest.raises(InterruptedError):
            train_block([TrainConfig()], splits, check=interrupt)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def interrupt() -> None:
    raise InterruptedError
