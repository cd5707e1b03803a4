"""train_block(): heads that see the same batches, by the MLSPL linear protocol."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlc.configs.device import one_thread
from mlc.configs.progress import Progress, silent
from mlc.heads import metrics_torch
from mlc.heads.block import LinearBlock, Start
from mlc.heads.config import TrainConfig
from mlc.heads.explain import estimated_positives, estimator_quality
from mlc.heads.inputs import EvalViews, Split, mean_of_views
from mlc.heads.metrics import mean_ap
from mlc.heads.order import batches_of_epoch, order_generators
from mlc.heads.train_full_batch import train_full_batch
from mlc.heads.train_tokens import score_split, train_tokens
from mlc.heads.trained import Diverged, TrainedHead, selection_targets
from mlc.losses.table import LOSSES


def train_head(
    config: TrainConfig, splits: Mapping[str, Split], progress: Progress = silent
) -> TrainedHead:
    """Train one head: a block of one, whose numbers are those that it has in any block.

    Args:
        config: checked, its knobs settled.
        splits: "train", "val" and "test", on the device of training.
        progress: told after each epoch.

    Raises:
        Diverged: the head's scores are not finite.
    """
    (trained,) = train_block([config], splits, progress)
    if isinstance(trained, Diverged):
        raise trained
    return trained


def train_block(
    configs: Sequence[TrainConfig],
    splits: Mapping[str, Split],
    progress: Progress = silent,
    check: Callable[[], None] = lambda: None,
) -> list[TrainedHead | Diverged]:
    """Train heads on "train", select the epoch of each on "val", score "val" and "test" with it.

    Adam without schedule: ``linear_fixed_features`` of the MLSPL release, but for the evaluation of
    every image, as its loaders drop the last partial batch of val and test too. Or, if the solver
    is "lbfgs", see ``train_full_batch``.

    Args:
        configs: checked, their knobs settled; they differ in ``lr``, ``weight_decay`` and
            ``seed`` alone.
        splits: "train", "val" and "test", on the device of training; with all views where the
            configs have a use for them, see ``splits_in_views``.
        progress: told after each epoch.
        check: called before each step; whatever it raises ends training.

    Returns:
        For each config its head, or what is wrong with it.
    """
    config, train = configs[0], splits["train"]
    if train.tokens is not None:
        return train_tokens(configs, splits, _checked(progress, check))
    if config.solver == "lbfgs":
        with one_thread():
            return [train_full_batch(each, splits, _checked(progress, check)) for each in configs]
    heads = [_Selection(each.loss) for each in configs]
    with one_thread():
        block = LinearBlock(
            LOSSES[config.loss],
            config.knobs,
            [Start(each.lr, each.weight_decay, each.seed) for each in configs],
            train,
            min(config.batch_size, len(train.image_id)),
        )
        best = block.parameters.clone()
        for epoch, (batches, views) in enumerate(_epochs(config, train), start=1):
            block.begin_epoch(epoch, config.epochs)
            losses = block.epoch(batches, check, views)
            lines = _lines(block, splits, config, epoch, losses.tolist())
            for index, (head, (line, estimates)) in enumerate(zip(heads, lines, strict=True)):
                if head.add(line):
                    best[index], head.estimates = block.parameters[index], estimates
            progress(epoch, config.epochs, f"val mAP {max(head.best for head in heads):.2f}")
        block.parameters.copy_(best)
        return _finish(block, heads, splits, config.eval_views)


def _epochs(config: TrainConfig, train: Split) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the batches of each epoch and, if they are drawn, the views of their images."""
    order, drawn = order_generators(config.order_seed)
    for _ in range(config.epochs):
        batches = batches_of_epoch(len(train.image_id), config.batch_size, order)
        views = None
        if config.view_augment:
            views = torch.randint(len(train.all_views()), batches.shape, generator=drawn)
        yield batches, views


@dataclass
class _Selection:
    """A head's epochs so far, and the best of them."""

    name: str
    history: list[dict[str, float]] = field(default_factory=list)
    best: float = -math.inf
    best_epoch: int = 0
    diverged: bool = False
    estimates: Tensor | None = None  # of the best epoch

    def add(self, line: dict[str, float]) -> bool:
        """Take an epoch's line; return whether it is the best so far."""
        self.diverged |= math.isnan(line["val_mAP"])
        self.history.append(line)
        better = not self.diverged and line["val_mAP"] > self.best
        if better:
            self.best, self.best_epoch = line["val_mAP"], int(line["epoch"])
        return better


def _lines(
    block: LinearBlock,
    splits: Mapping[str, Split],
    config: TrainConfig,
    epoch: int,
    losses: list[float],
) -> Iterator[tuple[dict[str, float], Tensor | None]]:
    """Yield the line of ``metrics.jsonl`` of each head, and what its estimator estimates."""
    train, val = splits["train"], splits["val"]
    targets = selection_targets(val, config.val_labels)
    for head, logits in enumerate(_scores(block, val, config.eval_views)):
        estimates = None
        line = {"epoch": epoch, "loss": losses[head], "val_mAP": math.nan}
        if torch.isfinite(logits).all():
            probs = logits.sigmoid()
            line["val_mAP"] = _mean_ap(probs, targets)
            line["val_estimated_positives"] = estimated_positives(probs)
        if block.estimator is not None:
            estimates = block.estimator.logits(head).sigmoid()
            line["train_estimated_positives"] = estimated_positives(estimates)
            line |= estimator_quality(estimates, train.observed, train.true)
        yield line, estimates


def _scores(block: LinearBlock, split: Split, eval_views: EvalViews) -> list[Tensor]:
    """Return each head's logits (n, L) of a split."""
    of_views = [block.scores(features) for features in split.scored_views(eval_views)]
    return [mean_of_views(each) for each in zip(*of_views, strict=True)]


def _mean_ap(probs: Tensor, targets: NDArray[np.bool_]) -> float:
    """Return mAP, worked out where the probabilities are: on a CPU numpy is the quicker one."""
    if probs.is_cuda:
        on_device = torch.from_numpy(targets).to(probs.device)
        return float(metrics_torch.mean_ap(probs, on_device))
    return float(mean_ap(probs.numpy(), targets))


def _checked(progress: Progress, check: Callable[[], None]) -> Progress:
    def told(done: int, total: int, note: str = "") -> None:
        check()
        progress(done, total, note)

    return told


def _finish(
    block: LinearBlock,
    heads: Sequence[_Selection],
    splits: Mapping[str, Split],
    eval_views: EvalViews,
) -> list[TrainedHead | Diverged]:
    logits = {name: _scores(block, splits[name], eval_views) for name in ("val", "test")}
    finished: list[TrainedHead | Diverged] = []
    for index, head in enumerate(heads):
        mine = {name: scores[index].cpu().numpy() for name, scores in logits.items()}
        if head.diverged or not all(np.isfinite(each).all() for each in mine.values()):
            finished.append(Diverged(head.name))
            continue
        state = {"weight": block.weight[index], "bias": block.bias[index]}
        state = {
            name: each.cpu().clone(memory_format=torch.contiguous_format)
            for name, each in state.items()
        }
        estimates = None if head.estimates is None else head.estimates.cpu().numpy()
        finished.append(TrainedHead(state, head.best_epoch, head.history, mine, estimates))
    return finished


@torch.inference_mode()
def score(
    head: nn.Module, split: Split, name: str, eval_views: EvalViews = "first", check: bool = True
) -> NDArray[np.float32]:
    """Return a head's logits of a split, (n, L) float32.

    Args:
        head: on the device of the split.
        split: joined with all views if ``eval_views`` is "mean".
        name: of the head, for the error.
        eval_views: see LabelsConfig.
        check: see LabelsConfig.

    Raises:
        Diverged: they are not finite.
    """
    if split.tokens is not None:
        logits = score_split(head, split.tokens, split.features.device, eval_views, check=check)
    else:
        of_views = [head(features) for features in split.scored_views(eval_views)]
        logits = mean_of_views(of_views).cpu().numpy()
    if not np.isfinite(logits).all():
        raise Diverged(name)
    return logits


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the sigmoid in float32, as torch computes it: ties in mAP depend on its rounding."""
    probs: NDArray[np.float32] = torch.from_numpy(logits).sigmoid().numpy()
    return probs
