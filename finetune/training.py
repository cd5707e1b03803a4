"""FineTuning: one model while it is trained end to end, step by step."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from mlc.configs.errors import MlcError
from mlc.finetune.config import FinetuneConfig
from mlc.finetune.loader import ImageBatch
from mlc.finetune.model import ImageModel
from mlc.finetune.objective import Objective
from mlc.finetune.processes import Processes
from mlc.heads.average import MovingAverage
from mlc.heads.best_epoch import BestEpoch
from mlc.heads.optimiser import make_optimiser, set_rate
from mlc.heads.order import stream_seed
from mlc.store.schema import TOKENS

Scorer = Callable[[Tensor], Tensor]  # pixels (B, S, S, 3) uint8 -> logits (B, L)


@dataclass(frozen=True)
class Part:
    """Images of a step that go through the model at once, of all processes.

    Attributes:
        index: of the part, from 0.
        last: of the step.
        share: of the step's images.
        places: (B,) rows of the training split.
    """

    index: int
    last: bool
    share: float
    places: NDArray[np.intp]


class FineTuning:
    """A model, its optimiser, its moving average, its objective, and its epochs so far.

    Attributes:
        best: its epochs; once they have ended it is not trained any more.
        objective: its loss and label estimator.
        estimates: (n, L) of the estimator at the best epoch, on the CPU; None if there is none.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: ImageModel,
        objective: Objective,
        processes: Processes,
        steps: int,
    ) -> None:
        """Take a model on the device of training.

        Args:
            config: checked.
            model: whose parameters are trained, but for what it has frozen.
            objective: what they are trained for.
            processes: that train together.
            steps: of the whole training.
        """
        self._config, self._processes, self._steps = config, processes, steps
        self._model, self.objective = model, objective
        self._run = _runner(config, model, processes)
        rates = [(model.backbone, config.backbone_lr or config.lr), (model.head, config.lr)]
        self._optimiser = make_optimiser(rates, config, config.weight_decay)
        self._scaler = torch.amp.GradScaler(
            processes.device.type, enabled=config.precision == "float16"
        )
        self._average: MovingAverage | None = None
        if config.ema_decay is not None:
            self._average = MovingAverage(model, config.ema_decay, warm_up=config.ema_warm_up)
        self.best = BestEpoch(model.state_dict(), config.patience)
        self.estimates: Tensor | None = None
        self._loss = torch.zeros((), device=processes.device)  # of the epoch so far

    def add(self, part: Part, batch: ImageBatch, step: int, step_of_epoch: int) -> Tensor:
        """Add the gradient of a part of a step's images; return its share of the loss.

        Args:
            part: of all processes.
            batch: this process's images of it.
            step: from 0.
            step_of_epoch: likewise.
        """
        # What dropout draws depends on the seed, the step, the part and the process alone.
        torch.manual_seed(stream_seed(self._config.seed, step, part.index, self._processes.rank))
        # A process without a good image runs a black one, as the others wait for its gradients; no
        # BatchNorm is to count it.
        self._model.train(bool(batch.good.any()))
        good = torch.from_numpy(batch.good).to(batch.pixels.device)
        seen = batch.pixels if batch.good.all() else batch.pixels[good]
        if not len(seen):
            seen = torch.zeros_like(batch.pixels[:1]) if len(batch.pixels) else _black(batch)
        with self._apart(part):
            logits = self._logits(seen)
            loss, gradient = self._gradient(part, logits, good, step_of_epoch)
            factor = self._config.loss_scale * self._processes.count * part.share
            logits.backward(self._scaler.scale(gradient * factor))  # type: ignore[no-untyped-call]
        share = loss * part.share
        self._loss += share
        return share

    def step(self, step: int) -> None:
        """Take a step, counted from 0, along the gradients that were added."""
        set_rate(self._optimiser, self._config, step, self._steps)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._optimiser.zero_grad()
        if self._average is not None:
            self._average.update(self._model, step)

    def _gradient(
        self, part: Part, logits: Tensor, good: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a part of all processes, and its gradient by this one's logits."""
        own = logits.new_zeros(len(good), logits.shape[1] + 1)
        if good.any():
            own[good] = torch.cat([logits.detach(), logits.new_ones(len(logits), 1)], dim=1)
        everyone = self._processes.gather(own, len(part.places))
        places = torch.from_numpy(part.places).to(logits.device)
        loss, gradient = self.objective.gradient(
            everyone[:, :-1], places, everyone[:, -1] > 0, step
        )
        mine = torch.from_numpy(self._processes.own(np.arange(len(places)))).to(logits.device)
        of_own = gradient[mine][good]
        return loss, of_own if len(of_own) else torch.zeros_like(logits)

    def _logits(self, pixels: Tensor) -> Tensor:
        try:
            logits: Tensor = self._run(pixels)
        except ValueError as error:  # of a BatchNorm that sees one number of each channel
            raise MlcError(
                f"batch_size: {len(pixels)} images at once are too few ({error}); pass a larger "
                "--batch-size or --micro-batch, or --set frozen_batch_norm=true"
            ) from None
        return logits

    def _apart(self, part: Part) -> AbstractContextManager[object]:
        """Have gradients summed over processes once for a step, with its last part."""
        if isinstance(self._run, DistributedDataParallel) and not part.last:
            return self._run.no_sync()
        return nullcontext()

    def scorers(self) -> list[Scorer]:
        """Return what gives logits now: the model and, if there is one, its average."""
        self._processes.copy_of_first(self._model.buffers())
        model = self._model.eval()
        if self._average is None:
            return [model]
        averaged = self._average.state
        self._processes.copy_of_first(averaged.values())
        return [model, lambda pixels: functional_call(model, averaged, (pixels,))]

    def best_scorer(self) -> Scorer:
        """Return what gives the logits of the best epoch; nothing is trained after it."""
        self._model.load_state_dict(self.best.state)
        return self._model.eval()

    def end_epoch(
        self,
        logits: Sequence[NDArray[np.float32]],
        targets: NDArray[np.bool_],
        steps: int,
        more: dict[str, float],
    ) -> None:
        """Take the scores of an epoch.

        Args:
            logits: (n, L) of each of ``scorers()``.
            targets: (n, L), the positives that select.
            steps: of the epoch.
            more: of the epoch's line.
        """
        states = [self._model.state_dict(), self._average.state if self._average else {}]
        if self.best.add(float(self._loss) / steps, logits, targets, states, more):
            estimates = self.objective.estimates()
            self.estimates = None if estimates is None else estimates.cpu()
        self.objective.end_epoch()
        self._loss.zero_()

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        return {
            "model": self._model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": self._average.state if self._average else {},
            "objective": self.objective.state(),
            "best": self.best.saved(),
            "estimates": self.estimates,
            "loss": self._loss,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self._model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            for name, each in self._average.state.items():
                each.copy_(state["average"][name])
        self.objective.restore(state["objective"])
        self.best.restore(state["best"])
        self.estimates = state["estimates"]
        self._loss.copy_(state["loss"])


def _runner(config: FinetuneConfig, model: ImageModel, processes: Processes) -> nn.Module:
    """Return what runs a model in training: itself, compiled, with others, as asked."""
    run: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]
    if processes.count == 1:
        return run
    # What the backbone does behind tokens, or behind another layer, is not run backward.
    return DistributedDataParallel(
        run,
        device_ids=[processes.device] if processes.device.type == "cuda" else None,
        find_unused_parameters=model.reads == TOKENS or config.layer is not None,
    )


def _black(batch: ImageBatch) -> Tensor:
    return batch.pixels.new_zeros(1, *batch.pixels.shape[1:])
