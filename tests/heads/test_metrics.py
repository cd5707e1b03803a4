"""Metrics: scikit-learn and slow loops as oracles, on data with ties and classes without any."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from mlc.configs.errors import MlcError
from mlc.heads import metrics_torch
from mlc.heads.metrics import (
    best_classes,
    evaluate,
    mean_ap,
    precision_recall,
    precision_recall_at_k,
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


def step_ap_on_torch(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    got = metrics_torch.step_ap(torch.from_numpy(scores.copy()), torch.from_numpy(targets.copy()))
    assert got.dtype == torch.float64
    return got.numpy()


BOTH = pytest.mark.parametrize("function", [step_ap, step_ap_on_torch], ids=["numpy", "torch"])


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Few distinct scores, so most are tied; any share of positives, none and all included."""
    images, classes = draw(st.integers(1, 12)), draw(st.integers(1, 20))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = generator.integers(-draw(st.integers(0, 6)), 1, (images, classes)) * dtype(0.1)
    return values.astype(dtype), generator.random((images, classes)) < draw(st.floats(0, 1))


def assert_scikit_learns(got: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> None:
    for column, value in enumerate(got):
        if targets[:, column].any():
            want = average_precision_score(targets[:, column], scores[:, column])
            assert value == pytest.approx(want, rel=0, abs=1e-12)
        else:
            assert np.isnan(value)


@BOTH
@settings(deadline=None)
@given(table=tables())
def test_step_ap_of_any_table_is_scikit_learns(function, table) -> None:
    assert_scikit_learns(function(*table), *table)


@settings(deadline=None)
@given(tables())
def test_ranked_ap_of_any_table_is_its_definition_in_a_loop(table) -> None:
    scores, targets = table
    for interpolated, slow in ((False, slow_ranked_ap), (True, slow_voc_ap)):
        got = ranked_ap(scores, targets, interpolated=interpolated)
        for column, value in enumerate(got):
            own = scores[:, column], targets[:, column]
            assert np.isnan(value) or value == pytest.approx(slow(*own), rel=1e-12)
            assert np.isnan(value) == (not own[1].any())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_both_zeros_tie_and_infinities_are_the_extremes(dtype) -> None:
    scores = np.array([[0.0], [-0.0], [-1], [-np.inf], [np.inf], [-0.0], [0.0]], dtype=dtype)
    targets = np.array([[0], [1], [0], [1], [0], [0], [1]], dtype=bool)
    assert step_ap(scores, targets)[0] == pytest.approx((2 / 5 + 2 / 5 + 3 / 7) / 3)
    assert step_ap_on_torch(scores, targets)[0] == pytest.approx((2 / 5 + 2 / 5 + 3 / 7) / 3)
    assert ranked_ap(scores, targets)[0] == pytest.approx((1 / 3 + 2 / 5 + 3 / 7) / 3)


def heads_of(dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return (2, 3) heads of 40 classes: several jobs each; class 17 has no positives."""
    scores = np.stack([logits_of(20 + seed, 200, 40).round(1) for seed in range(6)])
    targets = targets_of(20, 200, 40)
    targets[:, 17] = False
    return scores.reshape(2, 3, 200, 40).astype(dtype), targets


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_head_in_a_batch_is_bit_equal_to_the_same_head_alone(function, dtype) -> None:
    scores, targets = heads_of(dtype)
    batch = function(scores, targets)
    assert batch.shape == (2, 3, 40)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(batch[index], function(scores[index], targets))
        assert_scikit_learns(batch[index], scores[index], targets)
    assert len(np.unique(batch[..., 0])) == 6  # the heads do differ


@BOTH
def test_every_head_may_have_its_own_targets(function) -> None:
    scores, _ = heads_of(np.float32)
    targets = np.stack([targets_of(40 + seed, 200, 40) for seed in range(6)]).reshape(scores.shape)
    targets[0, 1, :, 5] = False
    batch = function(scores, targets)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(batch[index], function(scores[index], targets[index]))
    assert np.argwhere(np.isnan(batch)).tolist() == [[0, 1, 5]]


def test_neither_threads_nor_the_layout_in_memory_change_a_bit() -> None:
    scores, targets = heads_of(np.float32)
    want, threads = step_ap(scores, targets), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            np.testing.assert_array_equal(step_ap(scores, targets), want)
    finally:
        torch.set_num_threads(threads)
    strided = np.ascontiguousarray(np.moveaxis(scores, 0, -1))
    flipped = np.asfortranarray(targets)
    np.testing.assert_array_equal(step_ap(np.moveaxis(strided, -1, 0), flipped), want)


def test_the_inputs_of_every_metric_stay_as_they_are() -> None:
    scores, targets = np.asfortranarray(logits_of(12).astype(np.float32)), targets_of(12)
    before = scores.copy(), targets.copy()
    evaluate(scores, targets, [*"abcdef"])
    step_ap_on_torch(scores, targets)
    np.testing.assert_array_equal(scores, before[0])
    np.testing.assert_array_equal(targets, before[1])


def test_mean_ap_is_a_float_for_one_head_and_an_array_for_several() -> None:
    scores, targets = heads_of(np.float32)
    batch = mean_ap(scores, targets)
    assert batch.shape == (2, 3)
    on_torch = metrics_torch.mean_ap(torch.from_numpy(scores), torch.from_numpy(targets))
    for index in np.ndindex(2, 3):
        alone = mean_ap(scores[index], targets)
        assert type(alone) is float
        assert alone == batch[index] == 100 * np.nan_to_num(step_ap(scores[index], targets)).mean()
    np.testing.assert_allclose(on_torch, batch, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SCORES)
def test_the_torch_twin_is_the_numpy_one(name: str) -> None:
    scores, targets = SCORES[name], targets_of(13)
    targets[:, 4] = False
    np.testing.assert_allclose(step_ap_on_torch(scores, targets), step_ap(scores, targets), **CLOSE)


def test_nan_scores_are_refused_in_numpy_and_give_nan_in_torch() -> None:
    scores, targets = heads_of(np.float32)
    scores[1, 2, 7, 30] = np.nan
    for function in (step_ap, mean_ap):
        with pytest.raises(
            MlcError, match=r"^scores: .* got 1 NaN, the first at \[1, 2, 7, 30\]; "
        ):
            function(scores, targets)
    for refused in (ranked_ap, lambda own, _: top_k(own, 3)):
        with pytest.raises(MlcError, match="NaN"):
            refused(scores[1, 2], targets)
    values = step_ap_on_torch(scores, targets)
    unknown = {tuple(each) for each in np.argwhere(np.isnan(values)).tolist()}
    assert unknown == {(1, 2, 30)} | {(*index, 17) for index in np.ndindex(2, 3)}
    means = metrics_torch.mean_ap(torch.from_numpy(scores), torch.from_numpy(targets))
    assert np.argwhere(np.isnan(means.numpy())).tolist() == [[1, 2]]


@BOTH
def test_targets_of_another_kind_or_shape_are_refused(function) -> None:
    scores, targets = heads_of(np.float32)
    with pytest.raises(MlcError, match=r"^targets: should be bool, got (torch\.)?int8; pass"):
        function(scores, targets.astype(np.int8))
    for wrong in (targets[:-1], targets.T, np.stack([targets] * 3)):
        with pytest.raises(MlcError, match=r"^targets: should be \(200, 40\) as the scores or "):
            function(scores, wrong)


def test_targets_on_another_device_are_refused() -> None:
    with pytest.raises(MlcError, match=r"^targets: should be on cpu as the scores, got meta; move"):
        metrics_torch.step_ap(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_torch_twin_stays_on_the_gpu_without_a_sync() -> None:
    scores, targets = heads_of(np.float32)
    on_gpu = torch.from_numpy(scores).cuda(), torch.from_numpy(targets).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values, alone = (
            metrics_torch.step_ap(*on_gpu),
            metrics_torch.step_ap(on_gpu[0][1, 2], on_gpu[1]),
        )
        means = metrics_torch.mean_ap(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_allclose(values.cpu(), step_ap(scores, targets), **CLOSE)
    np.testing.assert_array_equal(values[1, 2].cpu(), alone.cpu())
    np.testing.assert_allclose(means.cpu(), mean_ap(scores, targets), rtol=0, atol=1e-10)


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


def test_precision_and_recall_by_hand() -> None:
    probs = np.array([[0.9, 0.6, 0.2], [0.8, 0.4, 0.7], [0.3, 0.9, 0.6], [0.1, 0.2, 0.55]])
    targets = np.array([[1, 0, 1], [1, 1, 1], [0, 1, 0], [1, 0, 1]], dtype=bool)
    # Hits of 2, 2 and 3 guesses: 2, 1 and 2; the positives are 3, 2 and 3.
    cp, cr = (2 / 2 + 1 / 2 + 2 / 3) / 3, (2 / 3 + 1 / 2 + 2 / 3) / 3
    got = evaluate(probs, targets, [*"abc"], 0.5)
    want = {"CP": cp, "CR": cr, "CF1": 2 * cp * cr / (cp + cr), "OP": 5 / 7, "OR": 5 / 8}
    want["OF1"] = 2 * 5 / (7 + 8)
    assert {name: got[name] for name in want} == pytest.approx(
        {name: 100 * value for name, value in want.items()}, rel=1e-12
    )


def test_cf1_is_of_the_means_as_in_the_query2label_table() -> None:
    """Its row of R101-448: CP 84.8 and CR 74.5 give 79.3; the mean of these F1s would be 73.9."""
    predicted, targets = np.zeros((125, 2), dtype=bool), np.zeros((125, 2), dtype=bool)
    predicted[:49, 0], targets[:100, 0] = True, True  # precision 1, recall 0.49
    predicted[:125, 1], targets[:87, 1] = True, True  # precision 0.696, recall 1
    got = precision_recall(predicted, targets)
    assert (got["CP"], got["CR"]) == pytest.approx((84.8, 74.5), rel=1e-12)
    assert round(got["CF1"], 1) == 79.3


def test_top_3_by_hand_with_ties() -> None:
    probs = np.array(
        [
            [0.5, 0.5, 0.5, 0.5, 0.1],  # a, b and c; the tie leaves d out
            [0.2, 0.9, 0.2, 0.2, 0.8],  # b, e and, of three that tie, a
            [0.0, 0.0, 0.0, 0.0, 0.0],  # a, b and c, though nothing is above the threshold
        ]
    )
    targets = np.array([[1, 0, 0, 1, 0], [0, 1, 1, 0, 1], [0, 0, 1, 0, 0]], dtype=bool)
    cp = (1 / 3 + 1 / 3 + 1 / 2 + 0 + 1) / 5  # d is not guessed at all
    cr = (1 + 1 + 1 / 2 + 0 + 1) / 5
    want = {"CP": cp, "CR": cr, "CF1": 2 * cp * cr / (cp + cr), "OP": 4 / 9, "OR": 4 / 6}
    want["OF1"] = 2 * 4 / (9 + 6)
    got = evaluate(probs, targets, [*"abcde"], 0.5)["top3"]
    assert got == pytest.approx({name: 100 * value for name, value in want.items()}, rel=1e-12)


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


@settings(deadline=None)
@given(tables(), st.integers(1, 25))
def test_best_classes_are_a_stable_sort_of_each_image(table, k: int) -> None:
    scores, _ = table
    scores[scores == scores.min()] = -np.inf
    np.testing.assert_array_equal(
        best_classes(scores, k), np.argsort(-scores, axis=1, kind="stable")[:, :k]
    )


def test_best_classes_of_several_heads_are_those_of_each() -> None:
    scores, _ = heads_of(np.float32)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(
            best_classes(scores, 5)[index], best_classes(scores[index], 5)
        )
        np.testing.assert_array_equal(top_k(scores, 5)[index], top_k(scores[index], 5))


def test_zeros_of_both_signs_go_to_the_earlier_class() -> None:
    scores = np.array([[-0.0, 0.0, -1.0], [-2.0, -0.0, 0.0]], dtype=np.float32)
    assert best_classes(scores, 2).tolist() == [[0, 1], [1, 2]]


def test_p_at_k_is_over_k_also_where_there_are_fewer_classes() -> None:
    scores, targets = np.array([[0.1, 0.9], [0.2, 0.3]]), np.array([[1, 1], [0, 0]], dtype=bool)
    got = precision_recall_at_k(best_classes(scores, 5), targets)
    want = {"P@1": 50, "P@3": 100 / 3, "P@5": 20, "R@1": 25, "R@3": 50, "R@5": 50}
    assert got == pytest.approx(want)


def test_no_python_call_is_made_for_each_image() -> None:
    calls = []
    for images in (30, 3000):
        scores, targets = logits_of(14, images), targets_of(14, images)
        counts = [0]

        def count(_frame: object, event: str, _arg: object, counts: list[int] = counts) -> None:
            counts[0] += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            precision_recall_at_k(best_classes(scores, 5), targets)
        finally:
            sys.setprofile(None)
        calls.append(counts[0])
    assert calls[0] == calls[1] > 10


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
