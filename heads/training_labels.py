"""Whether labels are what a loss can learn from, and what they lack."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError, choose
from mlc.losses.table import LOSSES

NAMED_CLASSES = 5  # in a sentence; of more, the number is told


def check_labels(loss: str, observed: NDArray[np.int8]) -> None:
    """Raise an MlcError if a loss cannot be trained on labels.

    Args:
        loss: a key of LOSSES.
        observed: (N, L) of +1, 0, -1: the training split.

    Raises:
        MlcError: the loss is unknown, no positive is observed, or there are negatives where the
            loss would take them for unknown, or none where it needs them.
    """
    method = choose(LOSSES, loss, "loss")
    if not (observed == 1).any():
        raise MlcError(
            f"labels: no positive is observed, in {len(observed):,} training images of "
            f"{observed.shape[1]:,} classes; check the labels, and --classes"
        )
    negatives = np.count_nonzero(observed == -1)
    if negatives and method.observed_negatives == "refused":
        raise MlcError(
            f"labels: {loss} makes no use of observed negatives, got {negatives:,} cells "
            f"of -1; use --labels {method.labels}, or --loss bce, which learns from them"
        )
    if not negatives and method.observed_negatives == "needed":
        raise MlcError(
            f"labels: {loss} learns from observed negatives, got none in {len(observed):,} "
            f"training images; use --labels {method.labels}"
        )


def label_gaps(observed: NDArray[np.int8], classes: Sequence[str]) -> list[str]:
    """Return a sentence for each thing that training labels lack, to be said, not refused.

    A fifth of NUS-WIDE's images have no positive, and the authors train on them.

    Args:
        observed: (N, L) of +1, 0, -1: the training split.
        classes: L names.

    Returns:
        Of images without an observed positive, and of classes without one.
    """
    positive = observed == 1
    sentences = []
    if images := len(positive) - np.count_nonzero(positive.any(axis=1)):
        sentences.append(
            f"labels: {images:,} of {len(positive):,} training images have no observed positive; "
            "they are trained on all the same"
        )
    if lacking := [classes[int(column)] for column in np.flatnonzero(~positive.any(axis=0))]:
        more = len(lacking) - NAMED_CLASSES
        names = ", ".join(lacking[:NAMED_CLASSES]) + (f" and {more:,} more" if more > 0 else "")
        sentences.append(
            f"labels: {len(lacking):,} of {len(classes):,} classes have no observed positive in "
            f"training and cannot be learnt: {names}"
        )
    return sentences
