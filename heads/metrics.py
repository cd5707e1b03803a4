"""Multi-label metrics in numpy: three average precisions, P/R/F1 at a threshold, P@k and R@k."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating[Any]]
Targets = NDArray[np.bool_]
AT_K = (1, 3, 5)


def step_ap(scores: Scores, targets: Targets) -> NDArray[np.float64]:
    """Average precision of each class as scikit-learn defines it: a step sum, ties grouped.

    The recall rises by 1/P at each positive, so AP is the mean over positives of the precision at
    their score: positives at or above it, over images at or above it. Two plain sorts give both
    counts; nothing is sorted by index.

    Args:
        scores: (N, L), any monotone score.
        targets: (N, L) bool.

    Returns:
        (L,) in [0, 1]; NaN for a class without positives.
    """
    result = np.full(scores.shape[1], np.nan)
    for column, (values, wanted) in enumerate(_columns(scores, targets)):
        positives = np.sort(values[wanted])
        if len(positives):
            found = len(positives) - np.searchsorted(positives, positives)
            above = len(values) - np.searchsorted(np.sort(values), positives)
            result[column] = np.mean(found / above)
    return result


def ranked_ap(
    scores: Scores, targets: Targets, *, interpolated: bool = False
) -> NDArray[np.float64]:
    """Average precision of each class from ranks: ties stay in the order of the rows.

    Args:
        scores: (N, L), any monotone score.
        targets: (N, L) bool.
        interpolated: take the best precision at this or a higher recall (VOC 2010, all points),
            as Query2Label's ``voc_mAP`` does; else as ASL's and ML-Decoder's ``mAP`` do, without
            the 1e-8 that they add to the number of positives.

    Returns:
        (L,) in [0, 1]; NaN for a class without positives.
    """
    result = np.full(scores.shape[1], np.nan)
    for column, (values, wanted) in enumerate(_columns(scores, targets)):
        ranks = np.flatnonzero(wanted[np.argsort(-values, kind="stable")]) + 1
        if len(ranks):
            precision = np.arange(1, len(ranks) + 1) / ranks
            if interpolated:
                precision = np.maximum.accumulate(precision[::-1])
            result[column] = precision.mean()
    return result


def mean_ap(scores: Scores, targets: Targets) -> float:
    """Return the MLSPL papers' mAP in per cent: ``step_ap``, a class without positives counts 0."""
    return 100 * float(np.nan_to_num(step_ap(scores, targets)).mean())


def precision_recall(predicted: Targets, targets: Targets) -> dict[str, float]:
    """Per-class and overall precision, recall and F1, in per cent.

    CP and CR are means over classes, CF1 is the harmonic mean of these two; OP, OR and OF1 pool
    the counts of all classes. 0/0 is 0.

    Args:
        predicted: (N, L) bool.
        targets: (N, L) bool.
    """
    hits = (predicted & targets).sum(axis=0)
    guesses, positives = predicted.sum(axis=0), targets.sum(axis=0)
    result = {}
    for prefix, precision, recall in (
        ("C", _ratio(hits, guesses).mean(), _ratio(hits, positives).mean()),
        ("O", _ratio(hits.sum(), guesses.sum()), _ratio(hits.sum(), positives.sum())),
    ):
        f1 = _ratio(2 * precision * recall, precision + recall)
        result[f"{prefix}P"], result[f"{prefix}R"] = 100 * float(precision), 100 * float(recall)
        result[f"{prefix}F1"] = 100 * float(f1)
    return {name: result[name] for name in ("CP", "CR", "CF1", "OP", "OR", "OF1")}


def top_k(scores: Scores, k: int) -> Targets:
    """Return (N, L) bool: the k highest scores of each image, ties to the earlier class."""
    chosen = np.zeros(scores.shape, dtype=np.bool_)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.put_along_axis(chosen, best, True, axis=1)
    return chosen


def evaluate(
    probs: Scores, targets: Targets, classes: Sequence[str], threshold: float = 0.5
) -> dict[str, Any]:
    """Return everything that ``results.json`` says of a split, in per cent.

    Args:
        probs: (N, L) in [0, 1], float32.
        targets: (N, L) bool.
        classes: L names.
        threshold: a label is predicted above it; ``top3`` takes the three highest instead.

    Returns:
        ``mAP`` (``mean_ap``), ``mAP_asl`` and ``mAP_voc`` (``ranked_ap``, classes without
        positives left out), ``precision_recall`` at the threshold and under ``top3``, ``P@k`` and
        ``R@k`` (means over all images, 0 for one without positives), ``threshold``,
        ``per_class_ap`` (of ``mAP``), ``images``, ``classes_without_positives``.
    """
    ap = step_ap(probs, targets)
    result: dict[str, Any] = {
        "mAP": 100 * float(np.nan_to_num(ap).mean()),
        "mAP_asl": _mean_of_known(ranked_ap(probs, targets)),
        "mAP_voc": _mean_of_known(ranked_ap(probs, targets, interpolated=True)),
        **precision_recall(probs > threshold, targets),
        "top3": precision_recall(top_k(probs, 3), targets),
    }
    for k in AT_K:
        hits = (top_k(probs, k) & targets).sum(axis=1)
        result[f"P@{k}"] = 100 * float((hits / k).mean())
        result[f"R@{k}"] = 100 * float(_ratio(hits, targets.sum(axis=1)).mean())
    return result | {
        "threshold": threshold,
        "images": len(targets),
        "classes_without_positives": int(np.isnan(ap).sum()),
        "per_class_ap": {
            name: 100 * float(value) for name, value in zip(classes, np.nan_to_num(ap), strict=True)
        },
    }


def _columns(scores: Scores, targets: Targets) -> Any:
    """Return pairs of contiguous columns, which sort several times faster than strided ones."""
    return zip(np.ascontiguousarray(scores.T), np.ascontiguousarray(targets.T), strict=True)


def _mean_of_known(ap: NDArray[np.float64]) -> float:
    known = ap[~np.isnan(ap)]
    return 100 * float(known.mean()) if len(known) else 0.0


def _ratio(numerator: Any, denominator: Any) -> NDArray[np.float64]:
    safe = np.where(denominator == 0, 1, denominator)
    return np.asarray(np.where(denominator == 0, 0.0, numerator / safe), dtype=np.float64)
