"""Processes: those that train one model together, as torchrun starts them, or this one alone."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from mlc.configs.device import choose_device


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
        device: where it trains.
        rank: which one it is, from 0.
        count: how many there are.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and tells."""
        return self.rank == 0

    def own(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return this process's part of some rows, none of which is in two; it may be empty."""
        return np.array_split(rows, self.count)[self.rank]

    def gather(self, own: Tensor, rows: int) -> Tensor:
        """Return what all processes have of some rows (rows, ...), in their order.

        Args:
            own: (n, ...) of ``own(rows)``.
            rows: how many there are in all.
        """
        if self.count == 1:
            return own
        sizes = [len(part) for part in np.array_split(np.arange(rows), self.count)]
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def any(self, word: bool) -> bool:
        """Return whether any process says yes; all have to ask."""
        if self.count == 1:
            return word
        said = torch.tensor(float(word), device=self.device)
        distributed.all_reduce(said, distributed.ReduceOp.MAX)
        return bool(said)

    def collect(self, own: object) -> list[object]:
        """Return what each process has to say, in their order."""
        if self.count == 1:
            return [own]
        said: list[object] = [None] * self.count
        distributed.all_gather_object(said, own)
        return said

    def copy_of_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        if self.count > 1:
            for each in tensors:
                distributed.broadcast(each, 0)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            distributed.barrier()


@contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, each on a GPU of its own or all on the CPU.

    Args:
        device: see ``choose_device``; "auto" and "cuda" are the GPU of this process.

    Raises:
        MlcError: there is no such device here.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(choose_device(device))
        return
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(chosen)
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(chosen, distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()
