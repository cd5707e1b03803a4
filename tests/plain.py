"""The plain path of training: autograd through everything, and dense Adam from torch."""

from collections.abc import Mapping
from typing import Any

import torch

from mlc.heads.inputs import Split
from mlc.heads.linear import LinearHead
from mlc.losses.method import wanted
from mlc.losses.role import ESTIMATOR_LR_FACTOR, initial_estimator_logits
from mlc.losses.table import LOSSES
from mlc.losses.value import loss_value


class PlainTraining:
    """One linear head, and ROLE's table, all of whose rows Adam moves at every step."""

    def __init__(
        self, loss: str, knobs: Mapping[str, Any], train: Split, lr: float, seed: int = 0
    ) -> None:
        self.method, self.knobs, self.train = LOSSES[loss], knobs, train
        width, classes = train.features.shape[1], train.observed.shape[1]
        generator = torch.Generator().manual_seed(seed)
        dtype = train.features.dtype
        self.head = LinearHead(width, classes, generator).to(dtype)
        groups: list[dict[str, Any]] = [{"params": list(self.head.parameters())}]
        self.table = None
        if self.method.has_estimator:
            start = initial_estimator_logits(train.observed, generator).to(dtype)
            self.table = torch.nn.Parameter(start)
            groups.append({"params": [self.table], "lr": lr * ESTIMATOR_LR_FACTOR})
        self.optimiser = torch.optim.Adam(groups, lr=lr)
        self.labels, self.now = train.observed.clone(), dict(knobs)
        self.of_cells: dict[str, torch.Tensor] = {}

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        method = self.method
        if method.schedule is not None:
            self.now |= method.schedule(epoch, epochs, **wanted(method.schedule, self.knobs))
        warm_up = self.knobs.get("warm_up", method.knobs().get("warm_up", 0))
        if method.recompute is not None and epoch > warm_up:
            with torch.no_grad():
                logits = self.head(self.train.features)
            known = {**self.knobs, **self.of_cells}
            found = method.recompute(
                logits, self.labels, epoch, epochs, **wanted(method.recompute, known)
            )
            self.of_cells = {name: each for name, each in found.items() if each.ndim == 2}
            self.now |= {name: each[None] for name, each in found.items() if each.ndim == 1}

    def step(self, rows: torch.Tensor) -> float:
        logits = self.head(self.train.features[rows])
        now = self.now | {name: each[rows] for name, each in self.of_cells.items()}
        loss = loss_value(
            self.method,
            logits,
            self.labels[rows],
            knobs=now,
            estimator_logits=None if self.table is None else self.table[rows],
        )
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        if (rewrite := self.method.rewrite) is not None:
            labels = rewrite(logits.detach(), self.labels[rows], **wanted(rewrite, now))
            self.labels[rows] = labels
        return loss.item()

    def epoch(self, batches: torch.Tensor) -> float:
        return sum(self.step(rows) for rows in batches) / len(batches)
