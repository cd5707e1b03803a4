"""TokenTraining: one head of tokens while it is trained, from its first step to its best epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from mlc.heads.average import MovingAverage
from mlc.heads.best_epoch import BestEpoch
from mlc.heads.changing import Changing
from mlc.heads.config import TrainConfig
from mlc.heads.head_size import HeadSize
from mlc.heads.modules import make_head
from mlc.heads.optimiser import make_optimiser, set_rate
from mlc.heads.order import stream_seed
from mlc.heads.tokens import Scorer
from mlc.losses.table import LOSSES
from mlc.losses.value import loss_value


@dataclass(frozen=True)
class Part:
    """Images of a step that go through a head at once.

    Attributes:
        index: of the part, from 0.
        share: of the step's images.
        tokens: (b, T, C) float32.
        places: (b, T) where on the grid they lie, if some are left out.
        rows: (b,) int64, of the training split.
    """

    index: int
    share: float
    tokens: Tensor
    places: Tensor | None
    rows: Tensor


class TokenTraining:
    """A head, its optimiser, its moving average, and its epochs so far.

    Attributes:
        config: of the head.
        best: its epochs; once they have ended it is not trained any more.
        changing: its labels, and what else of its loss changes.

    Args:
        config: checked, its knobs settled.
        size: of the head.
        observed: (N, L) int8 of the training split, on the device of training.
        steps: of the whole training.
    """

    def __init__(self, config: TrainConfig, size: HeadSize, observed: Tensor, steps: int) -> None:
        self.config, self._steps = config, steps
        device, self._method = observed.device, LOSSES[config.loss]
        self.changing = Changing(self._method, config.knobs, observed, heads=1)
        generator = torch.Generator().manual_seed(config.seed)
        self._head = make_head(config.head, size, config, generator).to(device)
        self._optimiser = make_optimiser([(self._head, config.lr)], config, config.weight_decay)
        self._average: MovingAverage | None = None
        if config.ema_decay is not None:
            self._average = MovingAverage(self._head, config.ema_decay, warm_up=config.ema_warm_up)
        self.best = BestEpoch(self._head.state_dict(), config.patience)
        self._loss = torch.zeros((), device=device)  # of the epoch so far

    def add(self, part: Part, step: int) -> None:
        """Add the gradient of a part of a step's images.

        Its dropout depends on the seed, the step and the part alone.
        """
        torch.manual_seed(stream_seed(self.config.seed, step, part.index))
        self._head.train()
        loss = part.share * self._loss_of(part)
        (self.config.loss_scale * loss).backward()  # type: ignore[no-untyped-call]
        self._loss += loss.detach()

    def step(self, step: int) -> None:
        """Take a step, counted from 0, along the gradients that were added."""
        set_rate(self._optimiser, self.config, step, self._steps)
        self._optimiser.step()
        self._optimiser.zero_grad()
        if self._average is not None:
            self._average.update(self._head, step)

    def _loss_of(self, part: Part) -> Tensor:
        autocast = torch.autocast(
            part.tokens.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"
        )
        with autocast:
            logits = self._head(part.tokens, part.places).float()[None]
        labels, knobs = self.changing.labels(part.rows), self.changing.arguments(part.rows)
        loss = loss_value(self._method, logits, labels, knobs=knobs)[0]
        self.changing.after_step(part.rows, logits.detach(), labels)
        return loss

    def scorers(self) -> list[Scorer]:
        """Return what gives logits (B, L) now: the head and, if there is one, its average."""
        head = self._head.eval()
        if self._average is None:
            return [head]
        averaged = self._average.state
        return [head, lambda tokens: functional_call(head, averaged, (tokens,))]

    def best_scorer(self) -> Scorer:
        """Return what gives the logits (B, L) of the best epoch; nothing is trained after it."""
        self._head.load_state_dict(self.best.state)
        return self._head.eval()

    def end_epoch(
        self, logits: Sequence[NDArray[np.float32]], targets: NDArray[np.bool_], steps: int
    ) -> None:
        """Take the scores of an epoch.

        Args:
            logits: (n, L) of each of ``scorers()``.
            targets: (n, L), the positives that select.
            steps: of the epoch.
        """
        states = [self._head.state_dict(), self._average.state if self._average else {}]
        self.best.add(float(self._loss) / steps, logits, targets, states)
        self._loss.zero_()

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        return {
            "head": self._head.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "average": self._average.state if self._average else {},
            "best": self.best.saved(),
            "loss": self._loss,
            "changing": self.changing.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self._head.load_state_dict(state["head"])
        self._optimiser.load_state_dict(state["optimiser"])
        if self._average is not None:
            for name, each in self._average.state.items():
                each.copy_(state["average"][name])
        self.best.restore(state["best"])
        self._loss.copy_(state["loss"])
        self.changing.restore(state["changing"])
