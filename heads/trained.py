"""TrainedHead: what training gives, by whatever solver."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mlc.configs.errors import MlcError
from mlc.heads.inputs import Split


@dataclass(frozen=True)
class TrainedHead:
    """What training gives.

    Attributes:
        state: the head's tensors at the best epoch.
        best_epoch: counted from 1; of the full-batch solver the best strength.
        history: a line of ``metrics.jsonl`` for each epoch, or each strength.
        logits: (n, L) float32 at the best epoch, for "val" and "test".
        estimates: (n, L) float32, at the best epoch what a label estimator takes the probabilities
            of the training images to be; None if there is none.
    """

    state: dict[str, Tensor]
    best_epoch: int
    history: list[dict[str, float]]
    logits: dict[str, NDArray[np.float32]]
    estimates: NDArray[np.float32] | None = None


class Diverged(MlcError):
    """Scores are not finite."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: training diverged, scores are not finite; try a smaller lr")


def selection_targets(val: Split, val_labels: str) -> NDArray[np.bool_]:
    """Return (n, L) bool: the positives that select, by "clean" or by "observed" labels."""
    observed: NDArray[np.bool_] = (val.observed == 1).cpu().numpy()
    return val.true if val_labels == "clean" else observed
