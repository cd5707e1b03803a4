"""Batches of features in any order: from memory or a GPU if they fit there, else off the disk."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.configs.errors import MlcError
from mlc.configs.free_memory import free_memory
from mlc.store.features import THREADS, FeatureArray
from mlc.store.open_files import OpenFiles

MOST_OF_MEMORY = 0.6  # of what is free: the rest is the heads', and other people's
READ_AHEAD_BYTES = 1 << 30  # default of what batches off the disk may take

Place = Literal["gpu", "ram", "disk"]


class Batches(Protocol):
    """Where features are read from in batches, each as it is stored."""

    def read(self, batches: Iterable[NDArray[np.intp]]) -> Iterator[Tensor]:
        """Yield the units (B, ...) of each batch, on the device, in the order of the batches.

        A batch is overwritten when the next but one is taken.
        """
        ...


def shuffled(
    units: NDArray[np.intp], batch_size: int, *, seed: int, epoch: int
) -> list[NDArray[np.intp]]:
    """Return units in batches of a random order that depends on the seed and the epoch alone."""
    order = np.random.default_rng([seed, epoch]).permutation(units)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def place_for(nbytes: int, device: torch.device) -> tuple[Place, str]:
    """Return where features of this size are best held, and a sentence that says why."""
    size = f"{nbytes / 1e9:,.2f} GB of features"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if nbytes <= MOST_OF_MEMORY * free:
            return "gpu", f"{size} are held on {device}, which has {free / 1e9:,.1f} GB free"
    free = free_memory()
    if nbytes <= MOST_OF_MEMORY * free:
        return "ram", f"{size} are held in memory, of which {free / 1e9:,.1f} GB are free"
    return "disk", (
        f"{size} are read off the disk in each epoch, as {free / 1e9:,.1f} GB of memory are free"
    )


def open_batches(
    array: FeatureArray,
    units: NDArray[np.intp],
    device: torch.device,
    place: Place,
    *,
    batch_size: int,
    read_ahead_bytes: int = READ_AHEAD_BYTES,
    check: bool = True,
) -> Batches:
    """Open the features that batches will be made of.

    Args:
        array: of a store.
        units: all that batches may ask for.
        device: where batches are wanted.
        place: as ``place_for`` says.
        batch_size: units of the largest batch.
        read_ahead_bytes: what batches off the disk may take, three of them at least.
        check: compare with the checksums, once or, off the disk, each time.

    Raises:
        MlcError: a unit is damaged.
    """
    if place == "disk":
        return DiskBatches(array, device, batch_size, read_ahead_bytes, check=check)
    return HeldBatches.load(array, units, device, place, check=check)


@dataclass(frozen=True)
class HeldBatches:
    """Features in memory.

    Attributes:
        values: (n, ...) as stored.
        place: (N*V,) where in ``values`` each unit is, -1 if it is not.
        device: of the batches.
    """

    values: Tensor
    place: NDArray[np.intp]
    device: torch.device

    @classmethod
    def load(
        cls,
        array: FeatureArray,
        units: NDArray[np.intp],
        device: torch.device,
        place: Place,
        *,
        check: bool,
    ) -> "HeldBatches":
        """Read units into memory, each once."""
        wanted = np.unique(units)
        where = np.full(array.shape[0] * array.shape[1], -1, np.intp)
        where[wanted] = np.arange(len(wanted))
        values = torch.from_numpy(array.read_many(wanted, check=check))
        if place == "gpu":
            values = values.to(device)
        elif device.type == "cuda":
            values = values.pin_memory()
        return cls(values, where, device)

    def read(self, batches: Iterable[NDArray[np.intp]]) -> Iterator[Tensor]:
        """Yield the units of each batch."""
        for batch in batches:
            if (self.place[batch] < 0).any():
                raise KeyError(f"units {batch[self.place[batch] < 0]} are not held")
            places = torch.from_numpy(self.place[batch]).to(self.values.device)
            yield self.values[places].to(self.device, non_blocking=True)


class DiskBatches:
    """Features on the disk, read by threads some batches ahead into memory that is used again."""

    def __init__(
        self,
        array: FeatureArray,
        device: torch.device,
        batch_size: int,
        read_ahead_bytes: int,
        *,
        check: bool,
    ) -> None:
        batch_bytes = batch_size * array.unit_bytes
        if read_ahead_bytes < 3 * batch_bytes:
            raise MlcError(
                f"read_ahead_bytes: three batches of {batch_size} take {3 * batch_bytes:,} bytes, "
                f"got {read_ahead_bytes:,}; allow more, or take a smaller batch"
            )
        self._array, self._device, self._check = array, device, check
        places = read_ahead_bytes // batch_bytes
        self._ring = _empty((places, batch_size, *array.unit_shape), array.dtype, device)
        # A thread reads as much at once as still leaves work for all.
        self._parts_of_batch = -(-THREADS // (places - 2))
        self._reading = False
        # When the copy of each place of the ring to a GPU has ended.
        self._copied: dict[int, torch.cuda.Event] = {}

    def read(self, batches: Iterable[NDArray[np.intp]]) -> Iterator[Tensor]:
        """Yield the units of each batch, read ahead by threads.

        Raises:
            RuntimeError: another call is not at its end: they would share memory.
        """
        if self._reading:
            raise RuntimeError("batches are being read already; open them a second time")
        self._reading = True
        try:
            yield from self._read(batches)
        finally:
            self._reading = False

    def _read(self, batches: Iterable[NDArray[np.intp]]) -> Iterator[Tensor]:
        ahead: deque[tuple[int, Tensor, list[Future[object]]]] = deque()
        with OpenFiles() as files, ThreadPoolExecutor(THREADS, thread_name_prefix="read") as pool:
            try:
                for turn, batch in enumerate(batches):
                    # Two batches of the ring are the caller's: the last that was yielded, and the
                    # one before, which may still be on its way to a GPU.
                    if len(ahead) > len(self._ring) - 3:
                        yield self._take(*ahead.popleft())
                    ahead.append(self._submit(pool, files, turn, batch))
                while ahead:
                    yield self._take(*ahead.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor, files: OpenFiles, turn: int, batch: NDArray[np.intp]
    ) -> tuple[int, Tensor, list[Future[object]]]:
        """Have threads fill a place of the ring, some units each."""
        place = turn % len(self._ring)
        room = self._ring[place][: len(batch)]
        if place in self._copied:
            self._copied.pop(place).synchronize()
        values = room.numpy()
        step = -(-len(batch) // self._parts_of_batch)
        parts = [slice(start, start + step) for start in range(0, len(batch), step)]
        return (
            place,
            room,
            [
                pool.submit(self._array.read, batch[part], values[part], files, check=self._check)
                for part in parts
            ],
        )

    def _take(self, place: int, room: Tensor, reads: list[Future[object]]) -> Tensor:
        for each in reads:
            each.result()
        taken = room.to(self._device, non_blocking=True)
        if self._device.type == "cuda":
            self._copied[place] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied[place].record(torch.cuda.current_stream(self._device))
        return taken


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any], device: torch.device) -> Tensor:
    """Return room in memory that a device takes batches from."""
    if device.type == "cuda":
        of_torch = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(shape, dtype=of_torch, pin_memory=True)
    return torch.from_numpy(np.empty(shape, dtype))  # in huge pages, for which torch does not ask
