"""The bootstrap: a weighted mAP is the mAP of the rows repeated, and resamples are resamples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlc.heads.metrics import mean_ap
from mlc.report.bootstrap import resample_weights, resampled_map

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


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
    np.testing.assert_allclose(resampled_map(scores, targets, once), mean_ap(scores, targets))


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
    assert with_it == pytest.approx(mean_ap(scores, targets), rel=1e-12)
    assert without == pytest.approx(mean_ap(scores[1:], targets[1:]), rel=1e-12)
    known = mean_ap(scores[1:, :2], targets[1:, :2])
    assert without == pytest.approx(known * 2 / 3, rel=1e-12)


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
