"""The released MLSPL design, written as its authors did it: what people run today.

A data set that copies each sample, a loader that collates dictionaries, losses on probabilities
with assertions and boolean masks, a log that turns each row into Python lists, and metrics in
Python: average precision class by class, P@k and R@k image by image, for the true and the observed
labels, for train, val and test, after every epoch. ROLE's table is made for every loss and copied
to numpy after every phase; for ROLE, dense Adam moves all of it at every step. Written anew from a
description of the design; no line is the authors'.

Nobody has days for a benchmark, so ``time_steps`` and ``time_rows`` time a slice, and
``epoch_seconds`` extrapolates: see ``FORMULA``. What it leaves out (loading the features for each
run, keeping the best predictions, logs as JSON) would only add.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

FORMULA = (
    "released design, seconds of an epoch = train steps x step "
    "+ (val + test) x scoring of an image "
    "+ (train + val + test) x (P@k and R@k of an image + AP of an image) + 3 x copy of the table"
)
WARM_UP = 3  # steps that are not timed: they allocate Adam's state and start the workers
AT_K = (1, 3, 5)


@dataclass(frozen=True)
class RowCosts:
    """Seconds of what an epoch does beside its steps, for one image unless said otherwise.

    Attributes:
        scoring: loading, forward pass and log, in val and test.
        at_k: P@k and R@k for k = 1, 3, 5, of true and observed labels.
        ap: its share of the average precisions, of true and observed labels. They sort, so that a
            share taken from fewer rows is a little too small.
        table_copy: of ROLE's table to numpy, once a phase.
    """

    scoring: float
    at_k: float
    ap: float
    table_copy: float


class Samples(Dataset):
    """Features and labels of a split, a dictionary of fresh copies for each image.

    Args:
        features: (n, D) float32.
        true: (n, L) of 0 and 1; kept as float64, as in the released files.
        observed: (n, L) of +1, 0, -1; the same.
    """

    def __init__(self, features: np.ndarray, true: np.ndarray, observed: np.ndarray) -> None:
        self.features = features
        self.true, self.observed = true.astype(np.float64), observed.astype(np.float64)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return {
            "features": torch.FloatTensor(np.copy(self.features[index, :])),
            "true": torch.FloatTensor(np.copy(self.true[index, :])),
            "observed": torch.FloatTensor(np.copy(self.observed[index, :])),
            "index": index,
        }


class Estimator(nn.Module):
    """ROLE's table of label estimates, by position in the training split."""

    def __init__(self, observed: np.ndarray) -> None:
        super().__init__()
        start = torch.empty(observed.shape).uniform_(-math.log(1.5), math.log(1.5))
        start[torch.from_numpy(observed == 1)] = math.log(0.995 / 0.005)
        start[torch.from_numpy(observed == -1)] = -math.log(0.995 / 0.005)
        self.logits = nn.Parameter(start)

    def forward(self, index: Tensor) -> Tensor:
        """Return the estimates of a batch, (B, L) probabilities."""
        return torch.sigmoid(self.logits[index, :])

    def copy(self) -> np.ndarray:
        """Return all estimates."""
        with torch.no_grad():
            return torch.sigmoid(self.logits).detach().cpu().numpy()


@dataclass
class Log:
    """Rows of a phase as Python lists."""

    preds: list[list[float]] = field(default_factory=list)
    true: list[list[float]] = field(default_factory=list)
    observed: list[list[float]] = field(default_factory=list)
    loss: float = 0.0

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Append a batch, row by row."""
        preds = batch["preds"].detach().cpu().numpy()
        true = batch["true"].cpu().numpy()
        for row in range(len(preds)):
            self.preds.append(preds[row, :].tolist())
            self.true.append(true[row, :].tolist())
            self.observed.append(batch["observed"][row, :].cpu().numpy().tolist())
        if "loss" in batch:
            self.loss += batch["loss"].item() * len(preds)


def time_steps(
    train: Samples, loss: str, batch_size: int, steps: int, *, workers: int = 0, device: str = "cpu"
) -> float:
    """Return the seconds of one training step, the mean of ``steps`` after a warm-up.

    Args:
        train: the whole training split, because ROLE's table has its size.
        loss: key of LOSSES.
        batch_size: 8 or 16.
        steps: timed.
        workers: of the loader; on a CPU 0 is the quickest, samples are only 8 KB.
        device: of training.
    """
    head = nn.Linear(train.features.shape[1], train.true.shape[1]).to(device)
    table = Estimator(train.observed).to(device)
    optimiser = torch.optim.Adam(
        [{"params": head.parameters(), "lr": 1e-3}, {"params": table.parameters(), "lr": 1e-2}]
    )
    loader = DataLoader(
        train, batch_size, shuffle=True, num_workers=workers, drop_last=True, pin_memory=False
    )
    batches, log = iter(loader), Log()
    for batch in islice(batches, WARM_UP):
        _step(batch, head, table, optimiser, LOSSES[loss], log, device)
    start = time.perf_counter()
    for batch in islice(batches, steps):
        _step(batch, head, table, optimiser, LOSSES[loss], log, device)
    return (time.perf_counter() - start) / (len(log.preds) / batch_size - WARM_UP)


def time_rows(
    split: Samples, batch_size: int, rows: int, *, table_rows: int, device: str = "cpu"
) -> RowCosts:
    """Return the costs beside the steps, from the first ``rows`` of a split.

    Args:
        split: at least ``rows`` images.
        batch_size: of scoring.
        rows: how many are scored and get average precisions; an eighth of them P@k and R@k.
        table_rows: of ROLE's table.
        device: of the forward pass.
    """
    classes = split.true.shape[1]
    head = nn.Linear(split.features.shape[1], classes).to(device)
    table = Estimator(np.zeros((table_rows, classes), np.int8)).to(device)
    part = Samples(split.features[:rows], split.true[:rows], split.observed[:rows])
    log = Log()
    seconds = [time.perf_counter()]
    for batch in DataLoader(part, batch_size, drop_last=True):
        _score(batch, head, log, device)
    seconds.append(time.perf_counter())
    preds = np.array(log.preds)
    targets = [np.array(each) == 1 for each in (log.true, log.observed)]
    few = max(1, len(preds) // 8)
    for each in targets:
        mean_at_k(preds[:few], each[:few])
    seconds.append(time.perf_counter())
    for each in targets:
        mean_average_precision(preds, each)
    seconds.append(time.perf_counter())
    table.copy()
    seconds.append(time.perf_counter())
    scoring, at_k, ap, copy = np.diff(seconds)
    return RowCosts(scoring / len(preds), at_k / few, ap / len(preds), copy)


def epoch_seconds(step: float, rows: RowCosts, images: Mapping[str, int], batch_size: int) -> float:
    """Extrapolate to one epoch by ``FORMULA``.

    Args:
        step: seconds, from ``time_steps``.
        rows: from ``time_rows``.
        images: of "train", "val" and "test".
        batch_size: of the steps.
    """
    scored = images["val"] + images["test"]
    measured = images["train"] + scored
    return (
        images["train"] // batch_size * step
        + scored * rows.scoring
        + measured * (rows.at_k + rows.ap)
        + 3 * rows.table_copy
    )


def mean_average_precision(preds: np.ndarray, targets: np.ndarray) -> float:
    """Return mAP in per cent, class by class; one without positives counts 0."""
    found = np.zeros(preds.shape[1])
    for label in range(preds.shape[1]):
        if np.any(targets[:, label]):
            found[label] = average_precision_score(targets[:, label], preds[:, label])
    return 100 * float(np.mean(found))


def mean_at_k(preds: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return P@k and R@k, an image at a time."""
    result = {}
    for k in AT_K:
        for name, of_image in (("P", _precision_at_k), ("R", _recall_at_k)):
            each = [of_image(preds[row, :], targets[row, :], k) for row in range(len(preds))]
            result[f"{name}@{k}"] = float(np.mean(each))
    return result


def _precision_at_k(preds: np.ndarray, targets: np.ndarray, k: int) -> float:
    return len(_hits(preds, targets, k)) / k


def _recall_at_k(preds: np.ndarray, targets: np.ndarray, k: int) -> float:
    positives = np.sum(targets)
    return len(_hits(preds, targets, k)) / positives if positives else 0.0


def _hits(preds: np.ndarray, targets: np.ndarray, k: int) -> np.ndarray:
    assert 1 <= k <= len(preds)
    assert preds.shape == targets.shape
    assert np.max(preds) <= 1
    assert np.min(preds) >= 0
    assert set(np.unique(targets)) <= {0, 1}
    best = np.argsort(preds)[::-1][:k]
    return np.intersect1d(best, np.nonzero(targets)[0])


def _step(
    batch: dict[str, Tensor],
    head: nn.Module,
    table: Estimator,
    optimiser: torch.optim.Optimizer,
    loss: Callable[[dict[str, Tensor]], Tensor],
    log: Log,
    device: str,
) -> None:
    batch = {name: each.to(device) for name, each in batch.items()}
    optimiser.zero_grad()
    with torch.set_grad_enabled(True):
        batch["preds"] = torch.sigmoid(head(batch["features"]))
        batch["estimates"] = table(batch["index"])
        _check(batch["preds"], batch["observed"])
        batch["loss"] = loss(batch)
        batch["loss"].backward()
        optimiser.step()
    log.add(batch)


def _score(batch: dict[str, Tensor], head: nn.Module, log: Log, device: str) -> None:
    batch = {name: each.to(device) for name, each in batch.items()}
    with torch.set_grad_enabled(False):
        batch["preds"] = torch.sigmoid(head(batch["features"]))
    log.add(batch)


def _check(preds: Tensor, labels: Tensor) -> None:
    assert torch.max(preds) <= 1
    assert torch.min(preds) >= 0
    assert torch.max(labels) <= 1
    assert torch.min(labels) >= -1
    assert preds.shape == labels.shape


def _nl(values: Tensor) -> Tensor:
    return -torch.log(values + 1e-5)


def _assume_negative(
    batch: dict[str, Tensor], on: float = 1.0, off: float = 0.0, negative: float = 1.0
) -> Tensor:
    preds, observed = batch["preds"], batch["observed"]
    cells = torch.zeros_like(preds)
    cells[observed == 1] = on * _nl(preds[observed == 1])
    cells[observed != 1] = on * negative * _nl(1 - preds[observed != 1])
    if off:
        cells[observed == 1] += off * _nl(1 - preds[observed == 1])
        cells[observed != 1] += off * _nl(preds[observed != 1])
    return cells.mean()


def _known(preds: Tensor, observed: Tensor) -> Tensor:
    cells = torch.zeros_like(preds)
    cells[observed == 1] = _nl(preds[observed == 1])
    cells[observed == -1] = _nl(1 - preds[observed == -1])
    return cells


def _term(preds: Tensor) -> Tensor:
    return ((preds.sum(1).mean() - 2.9) / preds.shape[1]) ** 2


def _iu(batch: dict[str, Tensor]) -> Tensor:
    assert torch.any(batch["observed"] == 1)
    assert torch.any(batch["observed"] == -1)
    return _known(batch["preds"], batch["observed"]).mean()


def _epr(batch: dict[str, Tensor]) -> Tensor:
    assert torch.min(batch["observed"]) >= 0
    return _known(batch["preds"], batch["observed"]).mean() + _term(batch["preds"])


def _role(batch: dict[str, Tensor]) -> Tensor:
    assert torch.min(batch["observed"]) >= 0
    preds, estimates, observed = batch["preds"], batch["estimates"], batch["observed"]
    total = 0.0
    for own, other in ((preds, estimates.detach()), (estimates, preds.detach())):
        cells = _known(own, observed) + other * _nl(own) + (1 - other) * _nl(1 - own)
        total = total + cells.mean() + _term(own)
    return total / 2


LOSSES = {
    "bce": _assume_negative,
    "bce_ls": partial(_assume_negative, on=0.9, off=0.1),
    "iun": _iu,
    "iu": _iu,
    "an": _assume_negative,
    "an_ls": partial(_assume_negative, on=0.9, off=0.1),
    "wan": partial(_assume_negative, negative=1 / 79),
    "epr": _epr,
    "role": _role,
}
