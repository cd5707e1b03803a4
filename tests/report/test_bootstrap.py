"""The bootstrap: a weighted mAP is the mAP of the rows repeated, and resamples are resamples."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlc.heads.metrics import mean_ap
from mlc.report.bootstrap import (
    BLOCK,
    resample_weights,
    resampled_map,
    resampled_mean,
    seed_weights,
)

CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # in per cent: ratios of counts are float32
SEEDS = [(0, 0, 1200), (1, 1, 1200), (2, 2, 1200)]


def data(seed: int, images: int = 40, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return scores with many ties, and targets of which the last class has one positive."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 9, (images, classes)) / 8
    targets = generator.random((images, classes)) < 0.3
    targets[0] = True
    targets[1:, -1] = False
    return scores.astype(np.float32), targets


def repeated(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    return mean_ap(np.repeat(scores, weights, axis=0), np.repeat(targets, weights, axis=0))


def test_weights_of_one_give_the_map_itself() -> None:
    scores, targets = data(0)
    once = np.ones((len(scores), 2), dtype=np.int32)
    np.testing.assert_allclose(
        resampled_map(scores, targets, once), mean_ap(scores, targets), **CLOSE
    )


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_integer_weights_give_the_map_of_the_rows_repeated(seed: int) -> None:
    scores, targets = data(seed)
    weights = np.random.default_rng(seed).integers(0, 4, (len(scores), 3), dtype=np.int32)
    want = [repeated(scores, targets, each) for each in weights.T]
    np.testing.assert_allclose(resampled_map(scores, targets, weights), want, **CLOSE)


def test_weights_are_counts_and_not_shares() -> None:
    scores, targets = data(1)
    weights = np.full((len(scores), 1), 3, dtype=np.int32)
    np.testing.assert_allclose(
        resampled_map(scores, targets, weights), mean_ap(scores, targets), **CLOSE
    )


def test_a_score_that_is_the_same_everywhere_gives_the_share_of_positives() -> None:
    _, targets = data(2)
    weights = resample_weights(len(targets), 5)
    shares = (weights.T @ targets) / weights.sum(axis=0)[:, None]
    got = resampled_map(np.zeros(targets.shape), targets, weights)
    np.testing.assert_allclose(got, 100 * shares.mean(axis=1), **CLOSE)


def test_a_class_that_a_resample_lacks_counts_zero_in_it() -> None:
    scores, targets = data(3)
    weights = np.ones((len(scores), 2), dtype=np.int32)
    weights[0, 1] = 0  # the only positive of the last class
    with_it, without = resampled_map(scores, targets, weights)
    assert with_it == pytest.approx(mean_ap(scores, targets), rel=1e-6)
    assert without == pytest.approx(mean_ap(scores[1:], targets[1:]), rel=1e-6)
    known = mean_ap(scores[1:, :2], targets[1:, :2])
    assert without == pytest.approx(known * 2 / 3, rel=1e-6)


def test_a_class_that_nobody_has_counts_zero_in_all() -> None:
    scores, targets = data(4)
    targets[:, 1] = False
    weights = resample_weights(len(scores), 4)
    want = [repeated(scores, targets, each) for each in weights.T]
    np.testing.assert_allclose(resampled_map(scores, targets, weights), want, **CLOSE)


def test_each_resample_draws_as_many_images_as_there_are() -> None:
    weights = resample_weights(30, 400)
    assert weights.shape == (30, 400)
    assert (weights.sum(axis=0) == 30).all()
    np.testing.assert_allclose(weights.mean(axis=1), 1, atol=0.25)  # 5 deviations
    assert (weights == 0).mean() == pytest.approx((1 - 1 / 30) ** 30, abs=0.02)


def test_resamples_are_the_same_for_all_runs_and_differ_by_seed() -> None:
    np.testing.assert_array_equal(resample_weights(30, 5), resample_weights(30, 5))
    assert (resample_weights(30, 5) != resample_weights(30, 5, seed=1)).any()


def test_blocks_of_resamples_are_put_together_in_their_order() -> None:
    scores, targets = data(5)
    weights = resample_weights(len(scores), 2 * BLOCK + 3)
    want = [repeated(scores, targets, each) for each in weights.T]
    np.testing.assert_allclose(resampled_map(scores, targets, weights), want, **CLOSE)


def test_threads_of_torch_are_as_they_were() -> None:
    scores, targets = data(6)
    before = torch.get_num_threads()
    resampled_map(scores, targets, resample_weights(len(scores), 2))
    assert torch.get_num_threads() == before


def test_scores_of_another_type_give_the_same() -> None:
    scores, targets = data(7)
    weights = resample_weights(len(scores), 3)
    np.testing.assert_array_equal(
        resampled_map(scores.astype(np.float64), targets, weights),
        resampled_map(scores, targets, weights),
    )


def test_shares_of_seeds_are_those_of_one_draw_less() -> None:
    weights = seed_weights(SEEDS, 500)
    assert weights.shape == (3, 500)
    assert set(np.unique(weights)) == {0, 0.5, 1}
    np.testing.assert_array_equal(weights.sum(axis=0), 1)
    np.testing.assert_allclose(weights.mean(axis=1), 1 / 3, atol=0.08)  # 5 deviations


def test_the_variance_of_a_mean_over_seeds_is_that_of_a_mean() -> None:
    """Of three values: s ** 2 / 3; as many draws as seeds would give two thirds of it."""
    values = [np.full(20_000, each) for each in (1.0, 2.0, 6.0)]
    means = resampled_mean(values, SEEDS)
    assert means.mean() == pytest.approx(3, abs=0.06)  # 5 deviations
    assert means.var() == pytest.approx(np.var([1, 2, 6], ddof=1) / 3, rel=0.05)


def test_one_seed_is_always_drawn() -> None:
    sample = np.random.default_rng(0).random(50)
    np.testing.assert_array_equal(resampled_mean([sample], SEEDS[:1]), sample)


def test_rows_that_share_their_seeds_share_the_draws_and_others_do_not() -> None:
    noise = [np.full(400, each) for each in (1.0, 2.0, 6.0)]
    better = [each + 1 for each in noise]
    shared = resampled_mean(better, SEEDS) - resampled_mean(noise, SEEDS)
    np.testing.assert_allclose(shared, 1)
    other = [(seed + 1, *rest) for seed, *rest in SEEDS]
    apart = resampled_mean(better, other) - resampled_mean(noise, SEEDS)
    variance = 2 * np.var([1, 2, 6], ddof=1) / 3
    assert apart.var() == pytest.approx(variance, rel=0.3)


def test_seeds_and_images_are_drawn_independently() -> None:
    """The variances add up: here 1 of the images, which move all seeds alike, and 7/3."""
    images = np.random.default_rng(1).standard_normal(20_000)
    means = resampled_mean([images + each for each in (1.0, 2.0, 6.0)], SEEDS)
    assert means.var() == pytest.approx(1 + 7 / 3, rel=0.05)
