"""From what is annotated to what a training run sees: splits and single positives, bit-exact."""

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.datasets.labels import SPLITS, LabelTable, full_labels

Labels = Literal[
    "full",
    "single-positive",
    "one-positive-one-negative",
    "one-positive-all-negatives",
    "as-given",
]
OFFICIAL_SEED = 1200  # of the authors, for the split and for the corruption
VAL_FRACTION = 0.2  # of the official training images
CSV_FRACTIONS = (0.7, 0.1, 0.2)  # train, val, test where a CSV has no split column


def apply_protocol(
    table: LabelTable,
    labels: Labels,
    *,
    split_seed: int = OFFICIAL_SEED,
    corruption_seed: int = OFFICIAL_SEED,
) -> LabelTable:
    """Return the table with all three splits and the observed labels asked for.

    Labels are hidden in the whole official training part before it is split, as the authors do.

    Args:
        table: as read; splits may be missing.
        labels: "full" shows the truth; "single-positive" one positive of each image, the same one
            that "one-positive-one-negative" shows beside a negative (the authors' ``--num-neg
            1``, for IU) and "one-positive-all-negatives" beside all true negatives (for IUN);
            "as-given" leaves ``observed`` alone.
        split_seed: of the validation split.
        corruption_seed: of the choice of what is observed.

    Raises:
        MlcError: the labels asked for need a truth that the table does not have, a split would
            be empty, or a seed is out of range.
    """
    for name, seed in (("split_seed", split_seed), ("corruption_seed", corruption_seed)):
        check_seed(name, seed)
    if labels != "as-given":
        if table.true is None:
            raise MlcError(
                f"labels: {labels!r} needs the true labels, and this data set has partial ones; "
                "use --labels as-given"
            )
        table = replace(table, observed=_observed(table.true, table.split, labels, corruption_seed))
    return assign_splits(table, split_seed)


def check_seed(name: str, seed: int) -> None:
    """Raise an MlcError if numpy does not take a seed."""
    if not 0 <= seed < 2**32:
        raise MlcError(f"{name}: should be from 0 to 2**32 - 1, got {seed}")


def assign_splits(table: LabelTable, seed: int, needed: tuple[str, ...] = SPLITS) -> LabelTable:
    """Return the table with every row in train, val or test.

    Rows without a split are cut 70/10/20; a table without validation rows gives 20 % of its
    training rows (the MLSPL protocol); a table that has both is left alone.

    Raises:
        MlcError: one of the splits that are needed would be empty.
    """
    split = table.split.astype("<U5")
    unassigned = np.flatnonzero(split == "")
    if len(unassigned):
        order = unassigned[np.random.RandomState(seed).permutation(len(unassigned))]
        bounds = np.round(np.cumsum(CSV_FRACTIONS[:-1]) * len(order)).astype(int)
        for name, rows in zip(SPLITS, np.split(order, bounds), strict=True):
            split[rows] = name
    elif "val" not in split:
        official = np.flatnonzero(split == "train")
        split[official[validation_rows(len(official), seed)]] = "val"
    for name in needed:
        if name not in split:
            raise MlcError(
                f"labels: no image is in split {name!r}, of {len(table)} images; "
                "mark some in the split column, or add images"
            )
    return replace(table, split=split)


def validation_rows(
    images: int, seed: int = OFFICIAL_SEED, fraction: float = VAL_FRACTION
) -> NDArray[np.intp]:
    """Return the sorted rows, of ``images`` training rows, that become the validation split.

    The tail of ``RandomState(seed).permutation``: ``datasets.py`` of the MLSPL release.
    """
    count = int(np.round(fraction * images))
    permutation = np.random.RandomState(seed).permutation(images)
    return np.sort(permutation[images - count :])


def observe(
    true: NDArray[np.bool_], *, positives: int = 1, negatives: int = 0, seed: int = OFFICIAL_SEED
) -> NDArray[np.int8]:
    """Hide all but a few labels of each image.

    Bit-exact with ``generate_observed_labels.py`` of the MLSPL release: each row shuffles its
    positives and then its negatives, whatever number is kept of them.

    Args:
        true: (N, L) bool.
        positives: how many positives of an image stay observed.
        negatives: how many negatives of an image stay observed.
        seed: of numpy's legacy ``RandomState``.

    Returns:
        (N, L) int8: +1 observed positive, -1 observed negative, 0 unknown.
    """
    generator = np.random.RandomState(seed)
    observed = np.zeros(true.shape, dtype=np.int8)
    for row, values in zip(true, observed, strict=True):
        for rows, keep, value in (
            (np.flatnonzero(row), positives, 1),
            (np.flatnonzero(~row), negatives, -1),
        ):
            generator.shuffle(rows)
            values[rows[:keep]] = value
    return observed


def _observed(
    true: NDArray[np.bool_], split: NDArray[np.str_], labels: Labels, seed: int
) -> NDArray[np.int8]:
    """Corrupt the official training part and the test part, each with a generator of its own."""
    observed = full_labels(true)
    if labels == "full":
        return observed
    negatives = {
        "single-positive": 0,
        "one-positive-one-negative": 1,
        "one-positive-all-negatives": true.shape[1],
    }[labels]
    test = split == "test"
    for part in (~test, test):
        observed[part] = observe(true[part], negatives=negatives, seed=seed)
    return observed
