"""Paired bootstrap over images and over seeds: how sure a difference of two mAPs is."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from mlc.configs.cores import usable_cores
from mlc.configs.device import one_thread

BLOCK = 32  # resamples at once: 40,137 images of them are 5 MB, which stay in cache
SEED = 0  # of the draws of seeds

# Of a class, in falling order of score: all rows down to the last positive, where the group of
# rows that ends with a positive's ties starts; the positives, and where their groups start.
Ranked = tuple[Tensor, Tensor, Tensor, Tensor]


def resample_weights(images: int, resamples: int, seed: int = 0) -> NDArray[np.int32]:
    """Return (N, R): how often each image is in each resample of N images with replacement."""
    generator = np.random.default_rng(seed)
    draws = np.empty((resamples, images), dtype=np.int32)
    for row in draws:
        row[:] = np.bincount(generator.integers(images, size=images), minlength=images)
    return np.ascontiguousarray(draws.T)


def resampled_map(
    scores: NDArray[np.floating[Any]], targets: NDArray[np.bool_], weights: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Return the MLSPL mAP, in per cent, of each resample.

    The same definition as ``mean_ap``: ties grouped, a class without positives counts 0. The sums
    of weights between positives, nearly all of the work, are torch's ``embedding_bag``; blocks of
    resamples are shared between the cores. A ratio of counts is rounded to float32.

    Args:
        scores: (N, L).
        targets: (N, L) bool.
        weights: (N, R) counts; pass the same to all runs that are compared.

    Returns:
        (R,) float64.
    """
    columns = zip(np.ascontiguousarray(scores.T), np.ascontiguousarray(targets.T), strict=True)
    classes = [(values, wanted) for values, wanted in columns if wanted.any()]
    total = np.zeros(weights.shape[1])
    blocks = [slice(start, start + BLOCK) for start in range(0, len(total), BLOCK)]
    # A thread of its own for each block: torch's own threads, which meet after each operation,
    # made this several times slower on a busy machine.
    with one_thread(), ThreadPoolExecutor(usable_cores()) as pool:
        ranked = list(pool.map(_ranked, classes))
        sums = pool.map(lambda block: _sum_of_ap(weights[:, block], ranked), blocks)
        for block, values in zip(blocks, sums, strict=True):
            total[block] = values
    total *= 100 / scores.shape[1]
    return total


def _ranked(column: tuple[NDArray[np.floating[Any]], NDArray[np.bool_]]) -> Ranked:
    scores, wanted = column
    order = np.argsort(-scores, kind="stable")
    falling, hits = -scores[order], wanted[order]
    # Where the tie group of each positive ends, and which positive is the first of its group.
    ends, first = np.unique(np.searchsorted(falling, falling[hits], "right"), return_index=True)
    starts = np.concatenate([[0], ends[:-1]])
    return _rows(order[: ends[-1]]), _rows(starts), _rows(order[hits]), _rows(first)


def _rows(indices: NDArray[np.integer[Any]]) -> Tensor:
    return torch.from_numpy(indices.astype(np.int32))


def _sum_of_ap(weights: NDArray[np.int32], ranked: Sequence[Ranked]) -> NDArray[np.float64]:
    """Return (r,): the sum over classes of AP, for (N, r) weights."""
    counts = torch.from_numpy(np.ascontiguousarray(weights, dtype=np.float32))  # exact to 2 ** 24
    total = torch.zeros(counts.shape[1], dtype=torch.float64)
    for rows, starts, positives, first in ranked:
        above = embedding_bag(rows, counts, starts, mode="sum")
        above[0] += 1e-30  # 0/0 is 0, and any count stays what it is
        own = embedding_bag(positives, counts, first, mode="sum")
        found = own.cumsum(0)
        share = found[-1].clamp(min=1)
        precision = found.div_(above.cumsum_(0))
        total += own.mul_(precision).sum(0, dtype=torch.float64) / share
    sums: NDArray[np.float64] = total.numpy()
    return sums


def seed_weights(seeds: Sequence[tuple[int, ...]], resamples: int) -> NDArray[np.float64]:
    """Return (S, R): the share of each of S seeds in a row's mean, in each resample.

    S - 1 of them are drawn with replacement, for S draws would make the variance of a mean too
    small by a factor of 1 - 1/S: a third of it is missing at three seeds. The draws depend on the
    seeds alone, so rows that share their seeds share the draws, and others are independent. One
    seed is always drawn: its noise cannot be known.

    Args:
        seeds: what tells the runs of a row apart, as numbers >= 0, in any order of their own.
        resamples: R.

    Reference: Rao and Wu, J. Am. Stat. Assoc. 83 (1988): resamples of n - 1.
    """
    if len(seeds) == 1:
        return np.ones((1, resamples))
    entropy = [SEED, len(seeds), *(number for seed in seeds for number in seed)]
    draws = len(seeds) - 1
    share = np.full(len(seeds), 1 / len(seeds))
    return np.random.default_rng(entropy).multinomial(draws, share, size=resamples).T / draws


def resampled_mean(
    samples: Sequence[NDArray[np.float64]], seeds: Sequence[tuple[int, ...]]
) -> NDArray[np.float64]:
    """Return (R,): the mean mAP of a row when its images and its seeds are drawn again.

    The pigeonhole bootstrap: images, columns of a table, and seeds, its rows, are drawn
    independently of each other. ``samples`` hold the images' draws, ``seed_weights`` are the
    seeds'. The difference of two rows is of the same draws of images and, where they share their
    seeds, of the same draws of seeds: what moves both alike cancels. Its variance is that of the
    images plus that of the seeds, plus the two's interaction more than once: a little wide, never
    narrow for that reason. Few seeds still say little: at three the ends of an interval are
    themselves uncertain.

    Args:
        samples: (R,) mAP of each seed's run, by ``resampled_map``.
        seeds: of these runs; pass them sorted, so that rows that share them are paired.

    Reference: Owen, Ann. Appl. Stat. 1 (2007), https://arxiv.org/abs/0712.1111
    """
    weights = seed_weights(seeds, len(samples[0]))
    return np.asarray((weights * np.stack(samples)).sum(axis=0), dtype=np.float64)
