"""Lanes: on a CPU several batches run at once, each on a core of its own."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

MOST_LANES = 8  # each has a batch's activations in memory


@dataclass(frozen=True)
class Lanes:
    """How forward passes share the cores.

    Attributes:
        count: of batches that run at once.
        threads: of torch's or of onnxruntime's that work on one of them.
    """

    count: int
    threads: int


def share_cores() -> Lanes:
    """Return the lanes of as many threads as torch may start.

    One thread a batch, as threads that work on the same one wait for each other after every
    layer: on two cores onnxruntime took 0.9 of the core-time that way. And what it comes to does
    not depend on how many cores there are.
    """
    threads = torch.get_num_threads()
    count = min(threads, MOST_LANES)
    return Lanes(count, threads // count)


def fewest(lanes: Iterable[Lanes]) -> Lanes:
    """Return the lanes of backbones that run together: those of the one that has fewest."""
    return min(lanes, key=lambda each: each.count)
