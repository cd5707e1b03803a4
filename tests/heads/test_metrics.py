"""Metrics: scikit-learn and slow loops as oracles, on data with ties and classes without any."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from mlc.heads.metrics import (
    evaluate,
    mean_ap,
    precision_recall,
    ranked_ap,
    step_ap,
    top_k,
)

CLOSE = {"rtol": 0, "atol": 1e-12}


def logits_of(seed: int, images: int = 300, classes: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((images, classes)) * 3


def targets_of(seed: int, images: int = 300, classes: int = 6) -> np.ndarray:
    targets = np.random.default_rng(1000 + seed).random((images, classes)) < 0.2
    targets[0] = True  # no class without a positive
    return targets


SCORES = {
    "random": logits_of(0),
    "many ties": logits_of(1).round(),
    "two values": logits_of(2) > 0.5,
    "all the same": np.zeros((300, 6)),
    "saturated": expit(logits_of(3).astype(np.float32) * 40),
    "float32": expit(logits_of(4).astype(np.float32)),
    "float16 rounded": logits_of(5).astype(np.float16).astype(np.float32),
}
SCORES = {name: scores * 1.0 for name, scores in SCORES.items()}


@pytest.mark.parametrize("name", SCORES)
def test_step_ap_is_scikit_learns(name: str) -> None:
    scores, targets = SCORES[name], targets_of(0)
    np.testing.assert_allclose(
        step_ap(scores, targets), average_precision_score(targets, scores, average=None), **CLOSE
    )
    assert mean_ap(scores, targets) == pytest.approx(
        100 * average_precision_score(targets, scores, average="macro"), rel=1e-12
    )


def test_the_data_has_the_ties_that_it_claims() -> None:
    for name in ("many ties", "two values", "all the same", "saturated"):
        assert len(np.unique(SCORES[name])) < 0.8 * SCORES[name].size
    assert SCORES["float32"].dtype == np.float32
    assert (SCORES["saturated"] == 1).mean() > 0.2


def test_a_class_without_positives_has_no_ap_and_counts_zero_in_map() -> None:
    scores, targets = logits_of(6), targets_of(6)
    targets[:, 2] = False
    known = [0, 1, 3, 4, 5]
    for function in (step_ap, ranked_ap):
        np.testing.assert_array_equal(np.isnan(function(scores, targets)), np.arange(6) == 2)
    want = average_precision_score(targets[:, known], scores[:, known], average=None)
    assert mean_ap(scores, targets) == pytest.approx(100 * want.sum() / 6, rel=1e-12)
    assert mean_ap(scores, np.zeros_like(targets)) == 0


def test_ranked_ap_by_hand() -> None:
    scores = np.array([[0.9], [0.8], [0.7], [0.6]])
    targets = np.array([[1], [0], [1], [1]], dtype=bool)
    plain = (1 + 2 / 3 + 3 / 4) / 3
    interpolated = (1 + 3 / 4 + 3 / 4) / 3
    np.testing.assert_allclose(ranked_ap(scores, targets), plain, rtol=1e-15)
    np.testing.assert_allclose(
        ranked_ap(scores, targets, interpolated=True), interpolated, rtol=1e-15
    )
    assert round(plain, 4) == 0.8056
    assert round(interpolated, 4) == 0.8333


def slow_ranked_ap(scores: np.ndarray, targets: np.ndarray) -> float:
    """The mean, over the positives from the highest score down, of the precision there."""
    order = sorted(range(len(scores)), key=lambda row: -scores[row])  # sorted() is stable
    hits, total = 0, 0.0
    for rank, row in enumerate(order, start=1):
        if targets[row]:
            hits += 1
            total += hits / rank
    return total / hits


def slow_voc_ap(scores: np.ndarray, targets: np.ndarray) -> float:
    """VOC 2010: the area under the precision envelope, sentinels at recall 0 and 1."""
    order = sorted(range(len(scores)), key=lambda row: -scores[row])
    recall, precision, hits = [0.0], [0.0], 0
    for rank, row in enumerate(order, start=1):
        hits += bool(targets[row])
        recall.append(hits / targets.sum())
        precision.append(hits / rank)
    recall.append(1.0)
    precision.append(0.0)
    for rank in range(len(precision) - 2, -1, -1):
        precision[rank] = max(precision[rank], precision[rank + 1])
    return sum(
        (recall[rank] - recall[rank - 1]) * precision[rank] for rank in range(1, len(recall))
    )


@pytest.mark.parametrize("name", SCORES)
def test_ranked_ap_is_its_definition_in_a_loop(name: str) -> None:
    scores, targets = SCORES[name], targets_of(7)
    for column, (plain, interpolated) in enumerate(
        zip(ranked_ap(scores, targets), ranked_ap(scores, targets, interpolated=True), strict=True)
    ):
        own = scores[:, column], targets[:, column]
        assert plain == pytest.approx(slow_ranked_ap(*own), rel=1e-12)
        assert interpolated == pytest.approx(slow_voc_ap(*own), rel=1e-12)


def test_ties_stay_in_the_order_of_the_rows() -> None:
    scores, targets = np.zeros((4, 1)), np.array([[1], [0], [0], [1]], dtype=bool)
    assert ranked_ap(scores, targets)[0] == (1 + 2 / 4) / 2
    assert ranked_ap(scores, ~targets)[0] == (1 / 2 + 2 / 3) / 2
    assert step_ap(scores, targets)[0] == 1 / 2


def test_without_ties_the_step_sum_is_the_ranked_one_and_less_than_the_envelope() -> None:
    scores, targets = logits_of(8), targets_of(8)
    step, ranked = step_ap(scores, targets), ranked_ap(scores, targets)
    np.testing.assert_allclose(step, ranked, **CLOSE)
    assert (ranked_ap(scores, targets, interpolated=True) > ranked).all()


seeds = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(seeds, st.floats(0.5, 3), st.floats(-5, 5))
def test_step_ap_depends_on_the_order_of_scores_alone(
    seed: int, slope: float, shift: float
) -> None:
    scores = logits_of(seed, images=30, classes=3).round(1)
    targets = targets_of(seed % 1000, images=30, classes=3)
    mapped = np.exp(scores * slope + shift)
    assert len(np.unique(mapped)) == len(np.unique(scores))
    np.testing.assert_array_equal(step_ap(mapped, targets), step_ap(scores, targets))


@settings(deadline=None)
@given(seeds)
def test_step_ap_does_not_depend_on_the_order_of_rows(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 6, (25, 3)).astype(float)
    targets = generator.random((25, 3)) < 0.4
    rows = generator.permutation(25)
    np.testing.assert_allclose(step_ap(scores[rows], targets[rows]), step_ap(scores, targets))


@pytest.mark.parametrize("threshold", [-2.0, 0.5, 4.0])
def test_precision_and_recall_are_scikit_learns(threshold: float) -> None:
    predicted, targets = logits_of(9) + np.linspace(-6, 6, 6) > threshold, targets_of(9)
    targets[:, 1] = False
    predicted[:, 3] = False
    got = precision_recall(predicted, targets)
    macro = precision_recall_fscore_support(targets, predicted, average="macro", zero_division=0)
    micro = precision_recall_fscore_support(targets, predicted, average="micro", zero_division=0)
    close = {"rel": 1e-12}
    assert (got["CP"], got["CR"]) == pytest.approx((100 * macro[0], 100 * macro[1]), **close)
    harmonic = 2 * got["CP"] * got["CR"] / (got["CP"] + got["CR"])
    assert got["CF1"] == pytest.approx(harmonic, **close)
    assert got["CF1"] != pytest.approx(100 * macro[2], rel=1e-3)  # the mean of F1s is another
    want = tuple(100 * value for value in micro[:3])
    assert (got["OP"], got["OR"], got["OF1"]) == pytest.approx(want, **close)


def test_nothing_predicted_or_nothing_there_is_zero() -> None:
    none, some = np.zeros((4, 3), dtype=bool), np.ones((4, 3), dtype=bool)
    for predicted, targets in ((none, some), (none, none), (some, none)):
        assert set(precision_recall(predicted, targets).values()) == {0.0}
    assert set(precision_recall(some, some).values()) == {100.0}


def slow_top_k(row: np.ndarray, k: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda column: -row[column])[:k])


@pytest.mark.parametrize("k", [1, 3, 5, 9])
@pytest.mark.parametrize("name", ["random", "many ties", "all the same"])
def test_top_k_is_the_k_highest_and_ties_go_to_the_earlier_class(name: str, k: int) -> None:
    chosen = top_k(SCORES[name], k)
    for row, marks in zip(SCORES[name], chosen, strict=True):
        assert set(np.flatnonzero(marks).tolist()) == slow_top_k(row, k)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_p_and_r_at_k_are_means_over_all_images(k: int) -> None:
    scores, targets = SCORES["many ties"], targets_of(10)
    targets[50:90] = False
    precisions, recalls = [], []
    for row, wanted in zip(scores, targets, strict=True):
        hits = sum(wanted[column] for column in slow_top_k(row, k))
        precisions.append(hits / k)
        recalls.append(hits / wanted.sum() if wanted.any() else 0.0)
    result = evaluate(scores, targets, [*"abcdef"])
    assert result[f"P@{k}"] == pytest.approx(100 * np.mean(precisions), rel=1e-12)
    assert result[f"R@{k}"] == pytest.approx(100 * np.mean(recalls), rel=1e-12)


PROMISED = {
    *("mAP", "mAP_asl", "mAP_voc", "CP", "CR", "CF1", "OP", "OR", "OF1", "top3"),
    *("P@1", "P@3", "P@5", "R@1", "R@3", "R@5"),
    *("threshold", "per_class_ap", "images", "classes_without_positives"),
}


@pytest.fixture
def result() -> dict:
    """Return the metrics of 300 images of which class c has no positives."""
    targets = targets_of(11)
    targets[:, 2] = False
    return evaluate(SCORES["float32"], targets, [*"abcdef"], 0.8)


def test_results_have_every_promised_key_as_plain_json_values(result: dict) -> None:
    assert set(result) == PROMISED
    assert set(result["top3"]) == {"CP", "CR", "CF1", "OP", "OR", "OF1"}
    counts = {"images": 300, "classes_without_positives": 1, "threshold": 0.8}
    assert {name: result[name] for name in counts} == counts
    flat = [result[name] for name in PROMISED - {"top3", "per_class_ap"}]
    assert {type(each) for each in flat} == {float, int}


def test_results_agree_with_the_functions_they_are_made_of(result: dict) -> None:
    scores, targets = SCORES["float32"], targets_of(11)
    targets[:, 2] = False
    known = [0, 1, 3, 4, 5]
    assert result["mAP"] == mean_ap(scores, targets)
    plain = ranked_ap(scores, targets)[known]
    interpolated = ranked_ap(scores, targets, interpolated=True)[known]
    assert result["mAP_asl"] == pytest.approx(100 * plain.mean(), rel=1e-12)
    assert result["mAP_voc"] == pytest.approx(100 * interpolated.mean(), rel=1e-12)
    at_threshold = precision_recall(scores > 0.8, targets)
    assert {name: result[name] for name in at_threshold} == at_threshold
    assert result["top3"] == precision_recall(top_k(scores, 3), targets)


def test_per_class_ap_names_the_classes_and_averages_to_map(result: dict) -> None:
    assert list(result["per_class_ap"]) == [*"abcdef"]
    assert result["per_class_ap"]["c"] == 0
    assert np.mean(list(result["per_class_ap"].values())) == pytest.approx(result["mAP"])


def test_a_label_is_predicted_above_the_threshold_and_not_at_it() -> None:
    probs = np.array([[0.5, 0.6]], dtype=np.float32)
    assert evaluate(probs, np.array([[True, True]]), ["a", "b"], 0.5)["OR"] == 50


def test_a_split_without_any_positive_has_metrics_of_zero() -> None:
    result = evaluate(SCORES["float32"], np.zeros((300, 6), dtype=bool), [*"abcdef"])
    assert result["classes_without_positives"] == 6
    assert {result[name] for name in ("mAP", "mAP_asl", "mAP_voc", "OF1", "R@3")} == {0.0}


def test_class_names_and_columns_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        evaluate(SCORES["float32"], targets_of(0), [*"abcde"])
