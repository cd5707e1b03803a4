"""Paired bootstrap over images: how sure a difference of two mAPs is."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 1 << 26


def resample_weights(images: int, resamples: int, seed: int = 0) -> NDArray[np.int32]:
    """Return (R, N): how often each image is in each resample of N images with replacement."""
    draws = np.random.default_rng(seed).multinomial(
        images, np.full(images, 1 / images), size=resamples
    )
    return draws.astype(np.int32)


def resampled_map(
    scores: NDArray[np.floating[Any]], targets: NDArray[np.bool_], weights: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Return the MLSPL mAP, in per cent, of each resample.

    The same definition as ``mean_ap``: ties grouped, a class without positives counts 0.

    Args:
        scores: (N, L).
        targets: (N, L) bool.
        weights: (R, N) counts; pass the same to all runs that are compared.

    Returns:
        (R,) float64.
    """
    total = np.zeros(len(weights))
    step = max(1, CHUNK_BYTES // (8 * len(scores)))
    for column in range(scores.shape[1]):
        order = np.argsort(-scores[:, column], kind="stable")
        values, wanted = scores[order, column], targets[order, column]
        if not wanted.any():
            continue
        # Index of the last image of each positive's tie group.
        end = np.searchsorted(-values, -values[wanted], side="right") - 1
        for start in range(0, len(weights), step):
            part = weights[start : start + step, order]
            total[start : start + step] += _weighted_ap(part, wanted, end)
    total *= 100 / scores.shape[1]
    return total


def _weighted_ap(
    weights: NDArray[np.int32], wanted: NDArray[np.bool_], end: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Return (R,) AP of one class, images in falling order of their score."""
    above = np.cumsum(weights, axis=1)[:, end]
    found = np.cumsum(np.where(wanted, weights, 0), axis=1)[:, end]
    own = weights[:, wanted]
    total = (own * (found / np.maximum(above, 1))).sum(axis=1)
    return np.asarray(total / np.maximum(own.sum(axis=1), 1), dtype=np.float64)
