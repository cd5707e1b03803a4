"""train(): a model on streamed images, from wherever its last state was, to its best epoch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.configs.cores import usable_cores
from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress, silent
from mlc.extract.views import Squares
from mlc.finetune.config import FinetuneConfig
from mlc.finetune.loader import ImageBatch, Photo, augmented, plain, stream_images
from mlc.finetune.pace import Pace
from mlc.finetune.prepare import PreparedImages
from mlc.finetune.processes import Processes
from mlc.finetune.saved import SavedState
from mlc.finetune.stop import StopAsked
from mlc.finetune.training import FineTuning, Part, Scorer
from mlc.heads.order import batches_of_epoch, order_generators
from mlc.heads.trained import Diverged, TrainedHead, selection_targets

SCORED_AT_ONCE = 64  # images, of a process
ASKED_EVERY = 8  # steps, between two questions to the other processes
NAMED_IMAGES = 5  # in a sentence


@dataclass
class Images:
    """Where images come from, and which of them are bad.

    Attributes:
        prepared: images and labels.
        squares: as the model sees them.
        workers: threads.
        bad: the reason of each bad image found so far, by split and row.
    """

    prepared: PreparedImages
    squares: Squares
    workers: int
    bad: dict[str, dict[int, str]] = field(default_factory=dict)

    def note_bad(self, split: str, rows: NDArray[np.intp], batch: ImageBatch) -> None:
        """Remember which images of a batch are bad."""
        found = {int(rows[place]): reason for place, reason in batch.errors.items()}
        if found:
            self.bad.setdefault(split, {}).update(found)


@dataclass(frozen=True)
class Step:
    """A step of the training.

    Attributes:
        number: from 0.
        of_epoch: likewise, of its epoch.
        last: of its epoch.
        parts: images of all processes that go through the model at once.
    """

    number: int
    of_epoch: int
    last: bool
    parts: tuple[Part, ...]


def train(
    config: FinetuneConfig,
    tuning: FineTuning,
    images: Images,
    processes: Processes,
    saved: SavedState,
    progress: Progress = silent,
    record: Callable[[dict[str, float]], None] = lambda line: None,
) -> TrainedHead:
    """Train on "train", select the epoch on "val", score "val" and "test" with it.

    Order, batches and selection are those of heads on features; batch b of an epoch is the same
    images whatever the number of processes, parts and workers.

    Args:
        config: checked.
        tuning: the model, on the device.
        images: of the data set.
        processes: that train together.
        saved: where the state is kept.
        progress: told of each step.
        record: told the line of each epoch.

    Returns:
        Tensors of the whole model, and what else training gives; scores are of good images.

    Raises:
        MlcError: the loss is not a finite number, at images that are named; or an image is bad
            and ``on_error`` is "raise".
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the state is written.
        Diverged: scores are not finite.
    """
    batches = _epochs(config, images)
    steps = config.epochs * next(batches)
    done = saved.restore(tuning, images.bad)
    pace = Pace(processes.device)
    progress(done, steps, f"goes on from step {done:,}" if done else "")
    with StopAsked() as stop:
        for epoch, rows in enumerate(batches, start=1):
            if tuning.best.ended or epoch * len(rows) <= done:
                continue
            tuning.objective.begin_epoch(rows)
            pace.restart()
            first = (epoch - 1) * len(rows)
            left = _steps(config, rows.numpy(), first, done, processes)
            for step, loss in _run_epoch(config, tuning, images, processes, left, epoch, pace):
                _require_finite(loss, step, images)
                if step.last:
                    _end_epoch(config, tuning, images, processes, pace, len(rows))
                    for line in tuning.best.history[-1:]:
                        record(line)
                if _asked(processes, saved, stop, step):
                    saved.save(tuning, images.bad, step.number + 1, processes)
                    _leave_if(stop, saved, processes)
                note = f"epoch {epoch}{_map_of(tuning)}, {pace.note()}"
                progress(step.number + 1, steps, note)
    return _finish(config, tuning, images, processes)


def _epochs(config: FinetuneConfig, images: Images) -> Iterator[Any]:
    """Yield how many steps an epoch has, and then the rows (steps, B) of each."""
    order, _ = order_generators(config.order_seed)
    count = len(images.prepared.prepared.splits["train"].image_id)
    yield max(1, count // config.batch_size)
    for _ in range(config.epochs):
        yield batches_of_epoch(count, config.batch_size, order)


def _steps(
    config: FinetuneConfig, rows: NDArray[np.intp], first: int, done: int, processes: Processes
) -> list[Step]:
    """Return the steps of an epoch that are not done yet.

    Args:
        config: of the training.
        rows: (steps, B) of the epoch.
        first: number of its first step.
        done: how many steps are done, of all epochs.
        processes: that train together.
    """
    size = (config.micro_batch or config.batch_size) * processes.count
    if config.micro_batch is None:
        size = rows.shape[1]
    starts = range(0, rows.shape[1], size)
    return [
        Step(
            first + index,
            index,
            index == len(rows) - 1,
            tuple(
                Part(
                    number,
                    start == starts[-1],
                    len(batch[start : start + size]) / len(batch),
                    batch[start : start + size],
                )
                for number, start in enumerate(starts)
            ),
        )
        for index, batch in enumerate(rows)
        if first + index >= done
    ]


def _run_epoch(
    config: FinetuneConfig,
    tuning: FineTuning,
    images: Images,
    processes: Processes,
    steps: Sequence[Step],
    epoch: int,
    pace: Pace,
) -> Iterator[tuple[Step, Tensor]]:
    """Take steps, and yield each with its loss."""
    files = images.prepared.files["train"]
    wanted = (
        [
            augmented(files[row], config, config.order_seed, epoch, int(row))
            for row in processes.own(part.places)
        ]
        for step in steps
        for part in step.parts
    )
    stream = pace.waiting(stream_images(wanted, images.squares, images.workers, processes.device))
    for step in steps:
        loss = torch.zeros((), device=processes.device)
        for part in step.parts:
            batch = next(stream)
            _take_bad(config, images, "train", processes.own(part.places), batch)
            loss += tuning.add(part, batch, step.number, step.of_epoch)
            pace.add(len(part.places))
        tuning.step(step.number)
        yield step, loss
    next(stream, None)


def score(
    scorers: Sequence[Scorer],
    split: str,
    config: FinetuneConfig,
    images: Images,
    processes: Processes,
) -> list[NDArray[np.float32]]:
    """Return the logits (n, L) of a split, of each scorer; of bad images zeros."""
    files = images.prepared.files[split]
    own = processes.own(np.arange(len(files)))
    parts = [own[start : start + SCORED_AT_ONCE] for start in range(0, len(own), SCORED_AT_ONCE)]
    wanted: Iterator[list[Photo]] = ([plain(files[row]) for row in part] for part in parts)
    logits: list[list[Tensor]] = [[] for _ in scorers]
    stream = stream_images(wanted, images.squares, images.workers, processes.device)
    with torch.no_grad():
        for rows, batch in zip(parts, stream, strict=True):
            _take_bad(config, images, split, rows, batch)
            good = torch.from_numpy(batch.good).to(batch.pixels.device)
            for scorer, each in zip(scorers, logits, strict=True):
                scored = scorer(batch.pixels)
                each.append(scored * good[:, None].to(scored.dtype))
    classes = images.prepared.prepared.splits[split].true.shape[1]
    empty = torch.zeros(0, classes, device=processes.device)
    return [
        processes.gather(torch.cat([empty, *each]), len(files)).cpu().numpy() for each in logits
    ]


def _take_bad(
    config: FinetuneConfig,
    images: Images,
    split: str,
    rows: NDArray[np.intp],
    batch: ImageBatch,
) -> None:
    images.note_bad(split, rows, batch)
    if batch.errors and config.on_error == "raise":
        place, reason = next(iter(batch.errors.items()))
        raise MlcError(
            f"{images.prepared.files[split][int(rows[place])]}: {reason}; mend it, or leave out "
            "--on-error raise, which stops at a bad image"
        )


def _end_epoch(
    config: FinetuneConfig,
    tuning: FineTuning,
    images: Images,
    processes: Processes,
    pace: Pace,
    steps: int,
) -> None:
    line = pace.line()
    logits = score(tuning.scorers(), "val", config, images, processes)
    _share_bad(images, processes)
    targets = selection_targets(images.prepared.prepared.splits["val"], config.val_labels)
    good = _good(images, "val")
    tuning.end_epoch([each[good] for each in logits], targets[good], steps, line)


def _good(images: Images, split: str) -> NDArray[np.bool_]:
    good = np.ones(len(images.prepared.files[split]), dtype=np.bool_)
    good[list(images.bad.get(split, ()))] = False
    return good


def _share_bad(images: Images, processes: Processes) -> None:
    """Have every process know the bad images of all."""
    for said in processes.collect(images.bad):
        assert isinstance(said, dict)
        for split, found in said.items():
            images.bad.setdefault(split, {}).update(found)


def _asked(processes: Processes, saved: SavedState, stop: StopAsked, step: Step) -> bool:
    """Return whether it is time to save: all processes give the same answer."""
    if processes.count > 1 and not step.last and step.number % ASKED_EVERY:
        return False
    due = processes.first and saved.due(epoch_ended=step.last)
    if processes.any(bool(stop.name)):
        stop.name = stop.name or "SIGTERM"
        return True
    return processes.any(due)


def _leave_if(stop: StopAsked, saved: SavedState, processes: Processes) -> None:
    if stop.name:
        raise KeyboardInterrupt(f"{stop.name}: {saved.how_to_go_on}")


def _require_finite(loss: Tensor, step: Step, images: Images) -> None:
    """Raise an MlcError if a step's loss is not a number, before anything is saved."""
    if torch.isfinite(loss):
        return
    ids = images.prepared.prepared.splits["train"].image_id
    rows = np.concatenate([part.places for part in step.parts])
    named = ", ".join(ids[rows[:NAMED_IMAGES]].tolist())
    more = ", ..." if len(rows) > NAMED_IMAGES else ""
    raise MlcError(
        f"step {step.number + 1:,}: the loss is {float(loss)}, at a batch of {len(rows)} images "
        f"(image id {named}{more}); try a smaller lr, or float32; the last state that was saved is "
        "kept"
    )


def _map_of(tuning: FineTuning) -> str:
    return f", val mAP {tuning.best.map:.2f}" if tuning.best.epoch else ""


def _finish(
    config: FinetuneConfig, tuning: FineTuning, images: Images, processes: Processes
) -> TrainedHead:
    if tuning.best.diverged:
        raise Diverged(str(config.out))
    scorer = tuning.best_scorer()
    logits = {}
    for name in ("val", "test"):
        (found,) = score([scorer], name, config, images, processes)
        _share_bad(images, processes)
        logits[name] = found[_good(images, name)]
    estimates = tuning.estimates
    if estimates is not None:
        estimates = estimates[torch.from_numpy(_good(images, "train"))]
    return TrainedHead(
        tuning.best.state,
        tuning.best.epoch,
        tuning.best.history,
        logits,
        None if estimates is None else estimates.numpy(),
    )


def workers_of(config: FinetuneConfig, processes: Processes) -> int:
    """Return how many threads decode: as asked, else this process's share of the cores."""
    return config.workers or max(1, usable_cores() // processes.count)
