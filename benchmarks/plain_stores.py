"""zarr-python, h5py and np.memmap, used the plain way beside mlc, without compression."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np
import zarr
from numpy.typing import NDArray
from store_case import BATCH, Case, synced

from mlc.store.batches import shuffled

PLAIN_SECONDS = 10  # batches are read for so long
PLAIN = {"zarr-python": "plain.zarr", "h5py": "plain.h5", "np.memmap": "plain.npy"}

Take = Callable[[Any, NDArray[np.intp], NDArray[Any]], object]  # array, batch, room for it


def write_plain(case: Case, tool: str) -> int:
    """Assign slices of an array of one of the usual tools."""
    path = case.folder / PLAIN[tool]
    with opened(case, tool, create=True) as values:
        for rows, part in case.batches(case.plain_images):
            values[rows.start : rows.stop] = case.stored[part]
    synced(path)
    return case.plain_images * case.image_bytes


@contextmanager
def opened(case: Case, tool: str, *, create: bool = False) -> Iterator[Any]:
    """Open an array of one of the usual tools; tokens are in chunks of an image, within shards."""
    path, shape = case.folder / PLAIN[tool], (case.plain_images, 1, *case.shape)
    shard = (case.shard_rows, *shape[1:])
    chunks = (1, *shape[1:]) if len(case.shape) > 1 else shard
    if tool == "h5py":
        with h5py.File(path, "w" if create else "r") as file:
            if create:
                file.create_dataset("values", shape, case.dtype, chunks=chunks)
            yield file["values"]
    elif tool == "np.memmap":
        yield np.lib.format.open_memmap(path, "w+" if create else "r", case.dtype, shape)
    elif create:
        shards = None if chunks == shard else shard
        yield zarr.create_array(
            path, shape=shape, dtype=case.dtype, chunks=chunks, shards=shards, compressors=None
        )
    else:
        yield zarr.open_array(path, mode="r")


def read_plain(case: Case, tool: str, take: Take, done: list[int]) -> int:
    """Read batches of an epoch for some seconds, and note their sizes."""
    room = np.empty((BATCH, 1, *case.shape), case.dtype)
    end = time.perf_counter() + PLAIN_SECONDS
    with opened(case, tool) as values:
        for batch in shuffled(np.arange(case.plain_images), BATCH, seed=0, epoch=0):
            take(values, batch, room)
            done.append(len(batch))
            if time.perf_counter() > end:
                break
    return sum(done) * case.image_bytes


def row_by_row(values: Any, batch: NDArray[np.intp], room: NDArray[Any]) -> None:
    """Read a batch as HDF5 likes it best."""
    for place, row in enumerate(batch.tolist()):
        values.read_direct(room, np.s_[row], np.s_[place])


def load_plain(case: Case, tool: str) -> int:
    """Load an array of one of the usual tools."""
    with opened(case, tool) as values:
        return int(values[:].nbytes)


# How the usual tools read a batch.
TAKES: dict[str, tuple[str, Take]] = {
    "zarr-python, oindex": ("zarr-python", lambda values, batch, _: values.oindex[batch]),
    "h5py, fancy": ("h5py", lambda values, batch, _: values[np.sort(batch)]),
    "h5py, read_direct": ("h5py", row_by_row),
    "np.memmap, fancy": ("np.memmap", lambda values, batch, _: values[batch]),
}
