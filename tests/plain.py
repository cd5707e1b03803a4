"""The plain path of training: autograd through everything, and dense Adam from torch."""

from collections.abc import Mapping
from typing import Any

import torch

from mlc.heads.inputs import Split
from mlc.heads.linear import LinearHead
from mlc.heads.losses import LOSSES, loss_value
from mlc.heads.role import ESTIMATOR_LR_FACTOR, initial_estimator_logits


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

    def step(self, rows: torch.Tensor) -> float:
        loss = loss_value(
            self.method,
            self.head(self.train.features[rows]),
            self.train.observed[rows],
            knobs=self.knobs,
            estimator_logits=None if self.table is None else self.table[rows],
        )
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.item()

    def epoch(self, batches: torch.Tensor) -> float:
        return sum(self.step(rows) for rows in batches) / len(batches)
