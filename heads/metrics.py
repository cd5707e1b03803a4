"""Multi-label metrics in numpy: three average precisions, P/R/F1 at a threshold, P@k and R@k.

Scores must not be NaN: every function that ranks them refuses it. Sorting dominates, and numpy
sorts without the GIL, so classes are shared among as many threads as torch uses. A class is
always computed by the same operations: its value does not depend on threads or on other heads.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mlc.configs.errors import MlcError

Scores = NDArray[np.floating[Any]]
Targets = NDArray[np.bool_]
AT_K = (1, 3, 5)
CLASSES_PER_JOB = 16  # 16 classes of 16,416 images are 1 MB: sorted while they are in cache

Job = TypeVar("Job")
Result = TypeVar("Result")


def step_ap(scores: Scores, targets: Targets) -> NDArray[np.float64]:
    """Average precision of each class as scikit-learn defines it: a step sum, ties grouped.

    The recall rises by 1/P at each positive, so AP is the mean over positives of the precision at
    their score: positives at or above it, over images at or above it. Two plain sorts give both
    counts; nothing is sorted by index.

    Args:
        scores: (..., N, L), any monotone score; float32 sorts fastest.
        targets: (N, L) bool, the same for all heads, or (..., N, L).

    Returns:
        (..., L) in [0, 1]; NaN for a class without positives. A head's values are bit-equal
        alone and in any batch.

    Raises:
        MlcError: a score is NaN, or the targets are not bool or of another shape.
    """
    _check(scores, targets)
    images, classes = scores.shape[-2:]
    heads, shared = _stacked(scores), _stacked(targets)
    positives = [_positives(each) for each in shared]
    result = np.empty((len(heads), classes))

    def fill(job: tuple[int, int]) -> None:
        head, start = job
        cells, ends = positives[head % len(positives)]
        stop = min(start + CLASSES_PER_JOB, classes)
        own = cells[ends[start] : ends[stop]] - start * images
        block = heads[head, :, start:stop].T.copy()
        result[head, start:stop] = _block_ap(block, own, ends[start : stop + 1] - ends[start])

    _in_threads(fill, product(range(len(heads)), range(0, classes, CLASSES_PER_JOB)))
    return result.reshape(*scores.shape[:-2], classes)


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

    Raises:
        MlcError: see ``step_ap``.
    """
    return _ap_of_ranks(_ranks(scores, targets), interpolated=interpolated)


def mean_ap(scores: Scores, targets: Targets) -> Any:
    """Return the MLSPL papers' mAP in per cent: ``step_ap``, a class without positives counts 0.

    Args:
        scores: (..., N, L), any monotone score.
        targets: (N, L) bool, the same for all heads, or (..., N, L).

    Returns:
        (...) float64; a float for (N, L).

    Raises:
        MlcError: see ``step_ap``.
    """
    values = 100 * np.nan_to_num(step_ap(scores, targets)).mean(axis=-1)
    return values if values.ndim else float(values)


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


def best_classes(scores: Scores, k: int) -> NDArray[np.intp]:
    """Return the k highest classes of each image, highest first, ties to the earlier class.

    For the few classes that are asked for, as many passes of ``argmax`` are several times faster
    than an argsort or argpartition of all.

    Args:
        scores: (..., N, L), any score.
        k: at least 1; where it is above L, all classes are returned.

    Returns:
        (..., N, min(k, L)) indices of classes.

    Raises:
        MlcError: a score is NaN.
    """
    _refuse_nan(scores)
    keys = _keys(scores)
    best = np.empty((*keys.shape[:-1], min(k, keys.shape[-1])), dtype=np.intp)
    for place in range(best.shape[-1]):
        highest = keys.argmax(axis=-1, keepdims=True)
        best[..., place] = highest[..., 0]
        # No score has this key, not even -inf: what was taken cannot be taken again.
        np.put_along_axis(keys, highest, np.iinfo(keys.dtype).min, axis=-1)
    return best


def top_k(scores: Scores, k: int) -> Targets:
    """Return (..., N, L) bool: the k highest scores of each image, ties to the earlier class."""
    return _marked(best_classes(scores, k), scores.shape)


def precision_recall_at_k(
    best: NDArray[np.intp], targets: Targets, ks: Sequence[int] = AT_K
) -> dict[str, float]:
    """Return ``P@k`` and ``R@k`` in per cent: means over all images, 0 for one without positives.

    Args:
        best: (N, K) of ``best_classes``, K at least the largest k or all classes.
        targets: (N, L) bool.
        ks: where to cut; P@k is over k, also where there are fewer classes.
    """
    hits = np.take_along_axis(targets, best, axis=1).cumsum(axis=1)
    positives = targets.sum(axis=1)
    result = {}
    for k in ks:
        own = hits[:, min(k, best.shape[1]) - 1]
        result[f"P@{k}"] = 100 * float((own / k).mean())
        result[f"R@{k}"] = 100 * float(_ratio(own, positives).mean())
    return result


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

    Raises:
        MlcError: see ``step_ap``.
    """
    ap, ranks = step_ap(probs, targets), _ranks(probs, targets)
    best = best_classes(probs, max(AT_K))
    result: dict[str, Any] = {
        "mAP": 100 * float(np.nan_to_num(ap).mean()),
        "mAP_asl": _mean_of_known(_ap_of_ranks(ranks, interpolated=False)),
        "mAP_voc": _mean_of_known(_ap_of_ranks(ranks, interpolated=True)),
        **precision_recall(probs > threshold, targets),
        "top3": precision_recall(_marked(best[:, :3], probs.shape), targets),
        **precision_recall_at_k(best, targets),
    }
    return result | {
        "threshold": threshold,
        "images": len(targets),
        "classes_without_positives": int(np.isnan(ap).sum()),
        "per_class_ap": {
            name: 100 * float(value) for name, value in zip(classes, np.nan_to_num(ap), strict=True)
        },
    }


def _stacked(table: NDArray[Any]) -> NDArray[Any]:
    return table.reshape(math.prod(table.shape[:-2]), *table.shape[-2:])


def _positives(targets: Targets) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the positives' flat cells in the transposed table, and where each class's end.

    Those of class c are ``cells[ends[c] : ends[c + 1]]``.
    """
    ends = np.concatenate([[0], targets.sum(axis=0).cumsum()])
    return np.flatnonzero(targets.T), ends


def _block_ap(
    block: Scores, cells: NDArray[np.intp], ends: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Return ``step_ap`` (C,) of the contiguous scores (C, N), which are sorted in place."""
    positives = block.reshape(-1).take(cells)
    block.sort(axis=-1)
    below = np.empty(len(positives), dtype=np.intp)
    for ordered, (start, stop) in zip(block, pairwise(ends), strict=True):
        own = positives[start:stop]
        own.sort()  # in place; sorted needles are found twice as fast
        below[start:stop] = ordered.searchsorted(own)
    counts = np.diff(ends)
    known = counts > 0
    starts_tie = np.ones(len(positives), dtype=np.bool_)
    starts_tie[1:] = positives[1:] != positives[:-1]
    starts_tie[ends[:-1][known]] = True
    tie_start = np.maximum.accumulate(np.where(starts_tie, np.arange(len(positives)), 0))
    precision = (np.repeat(ends[1:], counts) - tie_start) / (block.shape[1] - below)
    result = np.full(len(block), np.nan)
    result[known] = np.add.reduceat(precision, ends[:-1][known]) / counts[known]
    return result


def _ranks(scores: Scores, targets: Targets) -> list[NDArray[np.intp]]:
    """Return for each class its positives' ranks, ascending from 1, ties in the order of rows."""
    _check(scores, targets)
    # Contiguous columns are sorted several times faster than strided ones.
    columns = zip(np.ascontiguousarray(scores.T), np.ascontiguousarray(targets.T), strict=True)
    return _in_threads(lambda own: np.flatnonzero(own[1][_descending(own[0])]) + 1, columns)


def _descending(values: Scores) -> NDArray[np.intp]:
    """Return the rows (N,) from the highest value down, ties in the order of the rows."""
    if values.dtype.itemsize > 4:
        return np.argsort(-values, kind="stable")
    # A plain sort of keys that end in the row is several times faster than a stable argsort.
    keys = (~_keys(values)).astype(np.int64) << 32 | np.arange(len(values))
    keys.sort()
    return keys & 0xFFFFFFFF


def _keys(scores: Scores) -> NDArray[Any]:
    """Return integers in the order of the scores, equal where they are: -0.0 is 0.0.

    Floats are ordered as the integers of their bits, negative ones the other way round.
    """
    scores = scores + 0.0
    bits = scores.view(f"i{scores.dtype.itemsize}")
    bits ^= (bits >> (8 * bits.dtype.itemsize - 1)) & np.iinfo(bits.dtype).max
    return bits


def _ap_of_ranks(ranks: Sequence[NDArray[np.intp]], *, interpolated: bool) -> NDArray[np.float64]:
    result = np.full(len(ranks), np.nan)
    for column, own in enumerate(ranks):
        if len(own):
            precision = np.arange(1, len(own) + 1) / own
            if interpolated:
                precision = np.maximum.accumulate(precision[::-1])
            result[column] = precision.mean()
    return result


def _marked(best: NDArray[np.intp], shape: tuple[int, ...]) -> Targets:
    chosen = np.zeros(shape, dtype=np.bool_)
    np.put_along_axis(chosen, best, True, axis=-1)
    return chosen


def _in_threads(job: Callable[[Job], Result], jobs: Iterable[Job]) -> list[Result]:
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(job, jobs))


def _check(scores: Scores, targets: Targets) -> None:
    if targets.dtype != np.bool_:
        raise MlcError(f"targets: should be bool, got {targets.dtype}; pass labels == 1")
    if targets.shape not in (scores.shape, scores.shape[-2:]):
        raise MlcError(
            f"targets: should be {scores.shape[-2:]} as the scores or {scores.shape} with their "
            f"heads, got {targets.shape}; pass the targets of these images"
        )
    _refuse_nan(scores)


def _refuse_nan(scores: Scores) -> None:
    if scores.size and np.isnan(scores.max()):  # max is NaN if any is, and needs no copy
        where = np.argwhere(np.isnan(scores))
        raise MlcError(
            f"scores: should be numbers, got {len(where)} NaN, the first at {where[0].tolist()}; "
            "leave out the heads that diverged"
        )


def _mean_of_known(ap: NDArray[np.float64]) -> float:
    known = ap[~np.isnan(ap)]
    return 100 * float(known.mean()) if len(known) else 0.0


def _ratio(numerator: Any, denominator: Any) -> NDArray[np.float64]:
    safe = np.where(denominator == 0, 1, denominator)
    return np.asarray(np.where(denominator == 0, 0.0, numerator / safe), dtype=np.float64)
