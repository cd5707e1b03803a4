"""train_head(): one head on stored features, by the MLSPL linear protocol."""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from mlc.configs.errors import MlcError, choose
from mlc.configs.progress import Progress, silent
from mlc.datasets.labels import LabelTable
from mlc.datasets.protocol import OFFICIAL_SEED, Labels, check_seed
from mlc.datasets.source import DATASETS
from mlc.heads.inputs import LabelsConfig, Split
from mlc.heads.linear import HEADS
from mlc.heads.losses import LOSSES, Method, check_knobs, loss_value
from mlc.heads.metrics import mean_ap
from mlc.heads.role import ESTIMATOR_LR_FACTOR, initial_estimator_logits


class ProtocolConfig(LabelsConfig):
    """What the heads of a sweep have in common.

    Attributes:
        labels: what training sees; by default single positives for the MLSPL losses and full
            labels for bce on the data sets of DATASETS, and a CSV's labels as given.
        head: a key of HEADS.
        knobs: of the loss, e.g. ``{smoothing: 0.05}``; ``expected_positives`` is by default the
            papers' constant, else the mean of the training split.
        epochs: the head of the best of them is kept.
        order_seed: of the sequence of batches.
        corruption_seed: of the choice of single positives.
        split_seed: of the validation split.
        val_labels: what selects the best epoch: "clean" labels or the "observed" ones.
        threshold: of CP to OF1.
        device: "auto" is the GPU if there is one.
    """

    labels: Labels | None = None
    head: str = "linear"
    knobs: dict[str, float] = Field(default_factory=dict)
    epochs: int = 25
    order_seed: int = 0
    corruption_seed: int = OFFICIAL_SEED
    split_seed: int = OFFICIAL_SEED
    val_labels: Literal["clean", "observed"] = "clean"
    threshold: float = 0.5
    device: str = "auto"


class TrainConfig(ProtocolConfig):
    """One head.

    Attributes:
        loss: a key of LOSSES.
        lr: of Adam; a label estimator's is ten times it.
        batch_size: the last partial batch of an epoch is dropped, as the authors do.
        seed: of the initial weights and the label estimator.
        out: the run folder; by default below ``runs/``, named for what is in it.
    """

    loss: str = "bce"
    lr: float = 1e-3
    batch_size: int = 16
    seed: int = 0
    out: Path | None = None


@dataclass(frozen=True)
class TrainedHead:
    """What training gives.

    Attributes:
        state: the head's tensors at the best epoch.
        best_epoch: counted from 1.
        history: a line of ``metrics.jsonl`` for each epoch.
        logits: (n, L) float32 at the best epoch, for "val" and "test".
    """

    state: dict[str, Tensor]
    best_epoch: int
    history: list[dict[str, float]]
    logits: dict[str, NDArray[np.float32]]


def check_config(config: TrainConfig) -> None:
    """Raise an MlcError for whatever can be seen to be wrong before any work starts."""
    choose(HEADS, config.head, "head")
    check_knobs(config.loss, config.knobs)
    for name in ("batch_size", "epochs"):
        if getattr(config, name) < 1:
            raise MlcError(f"{name}: should be at least 1, got {getattr(config, name)}")
    for name in ("seed", "order_seed", "corruption_seed", "split_seed"):
        check_seed(name, getattr(config, name))
    if not (config.lr > 0 and math.isfinite(config.lr)):
        raise MlcError(f"lr: should be a positive number, got {config.lr}")


def default_labels(config: TrainConfig, table: LabelTable) -> Labels:
    """Return the labels that training sees: as asked, else what the loss is made for."""
    if config.labels is not None:
        return config.labels
    return LOSSES[config.loss].labels if table.dataset in DATASETS else "as-given"


def settle_knobs(config: TrainConfig, table: LabelTable) -> dict[str, float]:
    """Return all knobs of a loss: given, else from the data, else the loss's own default.

    Raises:
        MlcError: the number of expected positives is neither given nor known.
    """
    knobs = {
        name: default
        for name, default in choose(LOSSES, config.loss, "loss").knobs().items()
        if default is not None
    } | config.knobs
    for name, value in knobs.items():
        if value is inspect.Parameter.empty:
            knobs[name] = _from_data(name, table)
    return knobs


def _from_data(knob: str, table: LabelTable) -> float:
    if table.expected_positives is not None:
        return table.expected_positives
    if table.true is None:
        raise MlcError(f"{knob}: not known of partial labels; pass --set knobs.{knob}=NUMBER")
    return float(table.true[table.split == "train"].sum(axis=1).mean())


def train_head(
    config: TrainConfig, splits: Mapping[str, Split], progress: Progress = silent
) -> TrainedHead:
    """Train a head on "train", select its epoch on "val", score "val" and "test" with it.

    Adam without decay or schedule. ``linear_fixed_features`` of the MLSPL release, but for the
    evaluation of every image: its loaders drop the last partial batch of val and test too.

    Args:
        config: checked, its knobs settled.
        splits: "train", "val" and "test", on the device of training.
        progress: told after each epoch.

    Raises:
        MlcError: training diverges.
    """
    method = choose(LOSSES, config.loss, "loss")
    train = splits["train"]
    generator = torch.Generator().manual_seed(config.seed)
    width, classes = train.features.shape[1], train.observed.shape[1]
    head = choose(HEADS, config.head, "head")(width, classes, generator).to(train.features.device)
    estimator = _estimator(method, train, generator)
    optimiser = torch.optim.Adam(_groups(config.lr, head, estimator), lr=config.lr, fused=True)
    order = torch.Generator().manual_seed(config.order_seed)
    targets = splits["val"].true if config.val_labels == "clean" else _observed(splits["val"])
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    best_epoch, best_map = 0, -math.inf
    for epoch in range(1, config.epochs + 1):
        batches = batches_of_epoch(len(train.image_id), config.batch_size, order)
        with one_thread():
            loss = run_epoch(method, head, estimator, optimiser, train, batches, config.knobs)
        val_map = mean_ap(probabilities(score(head, splits["val"], config.loss)), targets)
        history.append({"epoch": epoch, "loss": loss, "val_mAP": val_map})
        if val_map > best_map:
            best_epoch, best_map = epoch, val_map
            best = {name: value.detach().clone() for name, value in head.state_dict().items()}
        progress(epoch, config.epochs, f"val mAP {val_map:.2f}")
    head.load_state_dict(best)
    return TrainedHead(
        state={name: value.cpu() for name, value in best.items()},
        best_epoch=best_epoch,
        history=history,
        logits={name: score(head, splits[name], config.loss) for name in ("val", "test")},
    )


def batches_of_epoch(images: int, batch_size: int, order: torch.Generator) -> Tensor:
    """Return (steps, B) rows in random order; the last partial batch is dropped.

    A set smaller than a batch is one batch.
    """
    batch_size = min(batch_size, images)
    steps = images // batch_size
    return torch.randperm(images, generator=order)[: steps * batch_size].view(steps, batch_size)


def run_epoch(
    method: Method,
    head: nn.Module,
    estimator: nn.Parameter | None,
    optimiser: torch.optim.Optimizer,
    train: Split,
    batches: Tensor,
    knobs: Mapping[str, float],
) -> float:
    """Take a step for each batch (steps, B) of rows; return the mean of the losses."""
    total = torch.zeros((), device=train.features.device)
    for rows in batches.to(train.features.device):
        loss = loss_value(
            method,
            head(train.features[rows]),
            train.observed[rows],
            knobs=knobs,
            estimator_logits=None if estimator is None else estimator[rows],
        )
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        total += loss.detach()
    return float(total) / len(batches)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch on one core: the matrices of a step are too small to be worth sharing.

    Two threads are no faster, and several times slower when something else runs beside them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def score(head: nn.Module, split: Split, name: str) -> NDArray[np.float32]:
    """Return a head's logits of a split, (n, L) float32.

    Raises:
        MlcError: they are not finite.
    """
    logits: NDArray[np.float32] = head(split.features).cpu().numpy()
    if not np.isfinite(logits).all():
        raise MlcError(f"{name}: training diverged, scores are not finite; try a smaller lr")
    return logits


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the sigmoid in float32, as torch computes it: ties in mAP depend on its rounding."""
    probs: NDArray[np.float32] = torch.from_numpy(logits).sigmoid().numpy()
    return probs


def _estimator(method: Method, train: Split, generator: torch.Generator) -> nn.Parameter | None:
    if not method.has_estimator:
        return None
    start = initial_estimator_logits(train.observed.cpu(), generator)
    return nn.Parameter(start.to(train.features.device))


def _groups(lr: float, head: nn.Module, estimator: nn.Parameter | None) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [{"params": list(head.parameters())}]
    if estimator is not None:
        groups.append({"params": [estimator], "lr": lr * ESTIMATOR_LR_FACTOR})
    return groups


def _observed(split: Split) -> NDArray[np.bool_]:
    positives: NDArray[np.bool_] = (split.observed == 1).cpu().numpy()
    return positives
