"""BestEpoch: the epochs of a training so far, and the tensors of the best of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.heads.explain import estimated_positives
from mlc.heads.metrics import mean_ap


class BestEpoch:
    """Selects by mAP, of the trained tensors themselves or of their moving average.

    Args:
        start: the tensors before any epoch.
        patience: see RecipeConfig.

    Attributes:
        history: a line of ``metrics.jsonl`` for each epoch.
        state: the tensors at the best epoch, on the CPU.
        epoch: the best, counted from 1.
        map: its mAP in per cent.
        diverged: scores are not finite.
    """

    def __init__(self, start: Mapping[str, Tensor], patience: int | None) -> None:
        self._patience = patience
        self.history: list[dict[str, float]] = []
        self.state, self.epoch, self.map = on_cpu(start), 0, -math.inf
        self.diverged = False

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to train: it diverged, or has waited for too long."""
        waited = len(self.history) - self.epoch
        return self.diverged or (self._patience is not None and waited > self._patience)

    def add(
        self,
        loss: float,
        logits: Sequence[NDArray[np.float32]],
        targets: NDArray[np.bool_],
        states: Sequence[Mapping[str, Tensor]],
        more: Mapping[str, float] | None = None,
    ) -> bool:
        """Take the scores of an epoch; return whether it is the best so far.

        Args:
            loss: mean of its steps.
            logits: (n, L) of the trained tensors and, if there is one, of their average.
            targets: (n, L), the positives that select.
            states: the tensors that gave each of the logits.
            more: of the epoch's line.
        """
        if not all(np.isfinite(each).all() for each in logits):
            self.diverged = True
            return False
        probs = [torch.from_numpy(each).sigmoid() for each in logits]
        maps = [float(mean_ap(each.numpy(), targets)) for each in probs]
        chosen = int(np.argmax(maps))
        line = {"epoch": len(self.history) + 1, "loss": loss, "val_mAP": maps[chosen]}
        if len(maps) > 1:
            line |= {"val_mAP_raw": maps[0], "val_mAP_average": maps[1]}
        line |= {"val_estimated_positives": estimated_positives(probs[chosen]), **(more or {})}
        self.history.append(line)
        better = maps[chosen] > self.map
        if better:
            self.state, self.map = on_cpu(states[chosen]), maps[chosen]
            self.epoch = len(self.history)
        return better

    def saved(self) -> dict[str, Any]:
        """Return all that there is to know, for ``restore``."""
        return {
            "history": self.history,
            "state": self.state,
            "epoch": self.epoch,
            "map": self.map,
            "diverged": self.diverged,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``saved`` gave."""
        self.history, self.state = saved["history"], saved["state"]
        self.epoch, self.map, self.diverged = saved["epoch"], saved["map"], saved["diverged"]


def on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors on the CPU."""
    return {name: each.detach().cpu().clone() for name, each in state.items()}
