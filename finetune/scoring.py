"""Images of a data set as they are streamed, and score(): a model's logits of a split."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.configs.cores import usable_cores
from mlc.configs.errors import MlcError
from mlc.extract.views import Squares
from mlc.finetune.config import FinetuneConfig
from mlc.finetune.loader import ImageBatch, Photo, plain, stream_images
from mlc.finetune.prepare import PreparedImages
from mlc.finetune.processes import Processes
from mlc.finetune.training import Scorer

SCORED_AT_ONCE = 64  # images, of a process


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
            take_bad(config, images, split, rows, batch)
            good = torch.from_numpy(batch.good).to(batch.pixels.device)
            for scorer, each in zip(scorers, logits, strict=True):
                scored = scorer(batch.pixels)
                each.append(scored * good[:, None].to(scored.dtype))
    classes = images.prepared.prepared.splits[split].true.shape[1]
    empty = torch.zeros(0, classes, device=processes.device)
    return [
        processes.gather(torch.cat([empty, *each]), len(files)).cpu().numpy() for each in logits
    ]


def take_bad(
    config: FinetuneConfig,
    images: Images,
    split: str,
    rows: NDArray[np.intp],
    batch: ImageBatch,
) -> None:
    """Remember the bad images of a batch.

    Args:
        config: of the training.
        images: remembers.
        split: that they are of.
        rows: (B,) of the split.
        batch: of these rows.

    Raises:
        MlcError: one is bad, and ``on_error`` is "raise".
    """
    images.note_bad(split, rows, batch)
    if batch.errors and config.on_error == "raise":
        place, reason = next(iter(batch.errors.items()))
        raise MlcError(
            f"{images.prepared.files[split][int(rows[place])]}: {reason}; mend it, or leave out "
            "--on-error raise, which stops at a bad image"
        )


def good_rows(images: Images, split: str) -> NDArray[np.bool_]:
    """Return which images (n,) of a split are not known to be bad."""
    good = np.ones(len(images.prepared.files[split]), dtype=np.bool_)
    good[list(images.bad.get(split, ()))] = False
    return good


def share_bad(images: Images, processes: Processes) -> None:
    """Have every process know the bad images of all."""
    for said in processes.collect(images.bad):
        assert isinstance(said, dict)
        for split, found in said.items():
            images.bad.setdefault(split, {}).update(found)


def workers_of(config: FinetuneConfig, processes: Processes) -> int:
    """Return how many threads decode: as asked, else this process's share of the cores."""
    return config.workers or max(1, usable_cores() // processes.count)
