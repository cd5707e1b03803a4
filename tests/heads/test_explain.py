"""What explains a result: expected positives, estimates of hidden labels, thirds of the classes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlc.heads.explain import estimated_positives, estimator_quality, frequency_bins

OBSERVED = torch.tensor([[1, 0, 0, 0], [0, 0, -1, 0]], dtype=torch.int8)
TRUE = np.array([[1, 1, 1, 0], [1, 0, 0, 1]], dtype=np.bool_)  # hidden positives: 2 and 2


def test_estimated_positives_are_the_mean_sum_of_an_image() -> None:
    probs = torch.tensor([[0.25, 0.5, 0.0], [1.0, 0.25, 0.5]])
    assert estimated_positives(probs) == 1.25


def test_estimated_positives_of_many_images_are_summed_in_float64() -> None:
    probs = torch.full((40_000, 80), 0.1)
    assert estimated_positives(probs) == pytest.approx(80 * float(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize("as_true", [torch.from_numpy, lambda true: true])
def test_only_hidden_cells_count(as_true) -> None:
    estimates = torch.tensor([[0.9, 0.9, 0.1, 0.9], [0.4, 0.8, 0.9, 0.6]])
    # Hidden and above 0.5: (0, 1) and (1, 3) are positive; (0, 3) and (1, 1) are not.
    assert estimator_quality(estimates, OBSERVED, as_true(TRUE)) == {
        "hidden_precision": 50.0,
        "hidden_recall": 50.0,
    }


def test_precision_and_recall_are_not_the_same() -> None:
    estimates = torch.tensor([[0.0, 0.6, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert estimator_quality(estimates, OBSERVED, TRUE) == {
        "hidden_precision": 100.0,
        "hidden_recall": 25.0,
    }


def test_an_estimate_of_one_half_is_no_positive() -> None:
    found = estimator_quality(torch.full((2, 4), 0.5), OBSERVED, TRUE)
    assert found == {"hidden_precision": 0.0, "hidden_recall": 0.0}


def test_nothing_hidden_is_0_over_0() -> None:
    observed = torch.from_numpy(np.where(TRUE, 1, -1).astype(np.int8))
    found = estimator_quality(torch.ones(2, 4), observed, TRUE)
    assert found == {"hidden_precision": 0.0, "hidden_recall": 0.0}


def test_thirds_of_the_classes_by_their_positives() -> None:
    positives = np.array([500, 3, 40, 7, 90, 1000, 5])
    ap = np.array([50.0, 1.0, 20.0, 4.0, np.nan, 80.0, 2.0])
    assert frequency_bins(positives, ap) == {
        "rare": {"mAP": pytest.approx(7 / 3), "classes": 3, "fewest": 3, "most": 7},
        "medium": {"mAP": 10.0, "classes": 2, "fewest": 40, "most": 90},
        "frequent": {"mAP": 65.0, "classes": 2, "fewest": 500, "most": 1000},
    }


def test_classes_of_equal_frequency_stay_in_their_order() -> None:
    positives = np.random.default_rng(0).integers(0, 3, 300)
    order = sorted(range(300), key=lambda column: positives[column])  # Python's is stable
    bins = frequency_bins(positives, np.arange(300.0))
    want = [np.mean(order[start : start + 100]) for start in (0, 100, 200)]
    assert [each["mAP"] for each in bins.values()] == pytest.approx(want, rel=1e-12)


def test_fewer_classes_than_thirds_leave_the_frequent_ones_out() -> None:
    assert list(frequency_bins(np.array([9, 2]), np.array([1.0, 2.0]))) == ["rare", "medium"]


@given(st.lists(st.tuples(st.integers(0, 99), st.floats(0, 100)), min_size=1, max_size=40))
def test_the_mean_of_the_thirds_is_the_map(classes: list[tuple[int, float]]) -> None:
    positives, ap = (np.array(each) for each in zip(*classes, strict=True))
    bins = frequency_bins(positives, ap).values()
    total = sum(each["mAP"] * each["classes"] for each in bins)
    assert total / len(classes) == pytest.approx(ap.mean())
    assert sum(each["classes"] for each in bins) == len(classes)
    assert max(each["classes"] for each in bins) - min(each["classes"] for each in bins) <= 1
