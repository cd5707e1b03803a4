"""Steps: which images each step of a training sees, cut into what goes through at once."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mlc.finetune.config import FinetuneConfig
from mlc.finetune.processes import Processes
from mlc.finetune.training import Part
from mlc.heads.order import batches_of_epoch, order_generators


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


def all_steps(config: FinetuneConfig, images: int) -> int:
    """Return how many steps a training of so many images has."""
    return config.epochs * max(1, images // config.batch_size)


def epochs_of(config: FinetuneConfig, images: int) -> Iterator[Tensor]:
    """Yield the rows (steps, B) of the batches of each epoch, as heads on features see them."""
    order, _ = order_generators(config.order_seed)
    for _ in range(config.epochs):
        yield batches_of_epoch(images, config.batch_size, order)


def steps_of(
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
