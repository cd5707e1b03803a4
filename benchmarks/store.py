"""The store against a raw file of the same bytes: writing, loading, shuffled epochs off the disk.

    python benchmarks/store.py [--folder DIR] [--tokens-gb 8] [--small-gb 4] [--rounds 3]

In each round every contestant is timed right after the raw file, and a ratio is of the two rates.
A write ends when all is on the disk; before a read the page cache is dropped. Beside mlc the usual
tools used the plain way, without compression, as the raw file is: one round, of a slice that the
table states. The numbers are random, so no disk can compress them away. Stores are open before a
read is timed, and what opening takes is a row of its own; the others' times include it.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import click
import memory
import numpy as np
import torch
from memory import DROP_CACHES, back_memory, drop_cache, may_drop_caches
from plain_stores import PLAIN, TAKES, load_plain, read_plain, write_plain
from store_case import BATCH, GB, Case, make_case, size_of, synced, write_store

from mlc.report.console import print_table
from mlc.store.batches import READ_AHEAD_BYTES, open_batches, shuffled
from mlc.store.reader import FeatureStore

RAW_READ = 8 << 20  # bytes of a sequential read
TOKENS, SMALL, POOLED = (196, 2048), (49, 1280), (2048,)  # of ResNet-50 at 448 px, lite0 at 224
COCO = 122_218  # images
RAW = "raw"
STORES = {"mlc zarr": "mlc.zarr", "mlc hdf5": "mlc.h5"}

FILES = {RAW: "raw.bin", **STORES, **PLAIN}
CHECKS = ((True, ""), (False, ", unchecked"))

Job = Callable[[], int]  # returns the bytes that it has read or written


@dataclass(frozen=True)
class Contest:
    """Rates of a contestant, bytes a second, round by round, and of the raw file beside it."""

    job: str
    name: str
    rates: list[float]
    raw: list[float]
    size: str

    def record(self) -> dict[str, str]:
        """Return a row of the table."""
        ratios = [rate / raw for rate, raw in zip(self.rates, self.raw, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else ""
        return {
            "job": self.job,
            "who": self.name,
            "GB/s": f"{median(self.rates) / GB:.3f}",
            "raw GB/s": f"{median(self.raw) / GB:.3f}",
            "over raw": f"{median(ratios):.2f}",
            "range": spread,
            "of": self.size,
        }


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=".", help="On the disk to time.")
@click.option("--tokens-gb", default=8.0, help="Of tokens of 0.8 MB an image; 0 is none.")
@click.option("--small-gb", default=4.0, help="Of tokens of 125 kB an image; 0 is none.")
@click.option("--images", default=COCO, help="Of which pooled features are loaded; or 0.")
@click.option("--rounds", default=3)
@click.option("--read-ahead-mb", default=READ_AHEAD_BYTES >> 20, help="Of an epoch off the disk.")
def main(
    folder: Path, tokens_gb: float, small_gb: float, images: int, rounds: int, read_ahead_mb: int
) -> None:
    """Print one table; everything that is written is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the files are removed
    with tempfile.TemporaryDirectory(prefix="mlc-store-", dir=folder) as name:
        make = partial(make_case, Path(name))
        cases = (
            make("tokens", "float16", TOKENS, gb=tokens_gb),
            make("tokens", "float16", SMALL, gb=small_gb),
            make("pooled", "float32", POOLED, images=images),
        )
        require_space(folder, cases)
        ahead = read_ahead_mb << 20
        tokens, small, pooled = cases
        contests, notes = [], []
        if tokens.images:
            contests += [*write(tokens, rounds), *epoch(tokens, rounds, ahead)]
            notes += [peak_record(tokens, name, ahead) for name in STORES]
        if small.images:
            contests += written(small, epoch, rounds, ahead)
        if pooled.images:
            contests += written(pooled, load, rounds)
            notes += [open_record(pooled, name, rounds) for name in STORES]
    print(
        f"{os.cpu_count()} cores, {rounds} rounds, medians; page cache dropped by "
        f"{DROP_CACHES if may_drop_caches() else 'posix_fadvise'}; read-ahead {read_ahead_mb} MiB"
    )
    print_table([*(each.record() for each in contests), *notes])


def require_space(folder: Path, cases: Sequence[Case]) -> None:
    """Raise unless the files of the largest case fit: raw, two stores, three of the usual tools."""
    need = max(
        (3 * each.images + 3 * each.plain_images) * 1.02 * each.image_bytes for each in cases
    )
    free = shutil.disk_usage(folder).free
    if free < need:
        raise click.ClickException(
            f"{folder.resolve()}: {need / GB:.1f} GB are needed, got {free / GB:.1f} GB free; pass "
            "--folder on a disk with more, or a smaller --tokens-gb and --small-gb"
        )


def compare(
    job: str,
    size: str,
    raw: Job,
    contestants: Mapping[str, Job],
    rounds: int,
    before: Callable[[str], None],
) -> list[Contest]:
    """Time contestants in turn, each right after the raw file and what must come before it."""
    contests = [Contest(job, name, [], [], size) for name in contestants]
    for _ in range(rounds):
        for contest, run in zip(contests, contestants.values(), strict=True):
            before(RAW)
            back_memory()
            contest.raw.append(rate(raw))
            before(contest.name)
            back_memory()
            contest.rates.append(rate(run))
    return contests


def rate(job: Job) -> float:
    """Return bytes a second of a job."""
    start = time.perf_counter()
    done = job()
    return done / (time.perf_counter() - start)


# Writing


def write(case: Case, rounds: int) -> list[Contest]:
    """Write a case's files, and compare how fast that is."""
    raw, before = partial(write_raw, case), partial(make_room, case)
    ours = {name: partial(write_store, case, file) for name, file in STORES.items()}
    contests = compare("write", size_of(case, case.images), raw, ours, rounds, before)
    plain = {tool: partial(write_plain, case, tool) for tool in PLAIN}
    size = size_of(case, case.plain_images)
    return contests + compare("write", size, raw, plain, 1, before)


def make_room(case: Case, name: str) -> None:
    """Have the numbers ready, and nothing of an earlier writer: no file, nothing for the disk."""
    assert len(case.pool) == len(case.stored)
    remove(case.folder / FILES[name])
    os.sync()


def written(
    case: Case, read: Callable[..., list[Contest]], rounds: int, *args: int
) -> list[Contest]:
    """Write the files of a case in place of the last one's, and compare only how they are read."""
    for path in case.folder.iterdir():
        remove(path)
    write(case, 1)
    return read(case, rounds, *args)


def write_raw(case: Case) -> int:
    """Write the numbers one after the other."""
    path = case.folder / FILES[RAW]
    with path.open("wb", buffering=0) as file:
        for _, part in case.batches(case.images):
            left = memoryview(case.stored[part]).cast("B")
            while left:
                left = left[file.write(left) :]
    return synced(path)


# Reading


def epoch(case: Case, rounds: int, ahead: int) -> list[Contest]:
    """Compare one epoch in a random order."""
    job = f"epoch, {case.image_bytes / 1e3:.0f} kB an image"
    raw, before = partial(read_raw, case), partial(drop_cache, case.folder)
    with opened_stores(case) as stores:
        ours = {
            f"{name}{note}": partial(read_epoch, case, store, ahead, check=check)
            for name, store in stores.items()
            for check, note in CHECKS
        }
        contests = compare(job, size_of(case, case.images), raw, ours, rounds, before)
    for name, (tool, take) in TAKES.items():
        done: list[int] = []
        plain = {name: partial(read_plain, case, tool, take, done)}
        (contest,) = compare(job, "", raw, plain, 1, before)
        size = f"{len(done)} batches of {size_of(case, case.plain_images)}"
        contests.append(replace(contest, size=size))
    return contests


def read_raw(case: Case) -> int:
    """Read the raw file from beginning to end."""
    room, total = bytearray(RAW_READ), 0
    with (case.folder / FILES[RAW]).open("rb", buffering=0) as file:
        while count := os.readv(file.fileno(), [room]):
            total += count
    return total


@contextmanager
def opened_stores(case: Case) -> Iterator[dict[str, FeatureStore]]:
    """Open the stores of a case, one of each format."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(FeatureStore(case.folder / file))
            for name, file in STORES.items()
        }


def read_epoch(case: Case, store: FeatureStore, ahead: int, *, check: bool) -> int:
    """Read all units of a store once, in batches."""
    array = store.features(kind=case.array.rpartition("/")[2])
    units = array.units_of(np.arange(case.images))
    cpu = torch.device("cpu")
    batches = open_batches(
        array, units, cpu, "disk", batch_size=BATCH, read_ahead_bytes=ahead, check=check
    )
    return sum(each.nbytes for each in batches.read(shuffled(units, BATCH, seed=0, epoch=0)))


def load(case: Case, rounds: int) -> list[Contest]:
    """Compare loading a whole array into memory."""
    raw, before = partial(load_raw, case), partial(drop_cache, case.folder)
    plain: dict[str, Job] = {
        "zarr-python, [:]": partial(load_plain, case, "zarr-python"),
        "h5py, [:]": partial(load_plain, case, "h5py"),
        "np.load": lambda: np.load(case.folder / PLAIN["np.memmap"]).nbytes,
    }
    with opened_stores(case) as stores:
        ours = {
            f"{name}{note}": partial(load_store, store, check=check)
            for name, store in stores.items()
            for check, note in CHECKS
        }
        contests = compare("load", size_of(case, case.images), raw, ours, rounds, before)
    return contests + compare("load", size_of(case, case.plain_images), raw, plain, 1, before)


def load_raw(case: Case) -> int:
    """Load the raw file."""
    return np.fromfile(case.folder / FILES[RAW], case.dtype).nbytes


def load_store(store: FeatureStore, *, check: bool) -> int:
    """Load the pooled features of a store."""
    return store.pooled(check=check).nbytes


# Opening, memory and files


def open_record(case: Case, name: str, rounds: int) -> dict[str, str]:
    """Return the row of the table that says how long it takes to open a store off the disk."""
    seconds = []
    for _ in range(rounds):
        drop_cache(case.folder, name)
        start = time.perf_counter()
        FeatureStore(case.folder / STORES[name]).close()
        seconds.append(time.perf_counter() - start)
    return note_row("open", name, f"{case.images:,} images, {median(seconds):.2f} s")


def peak_record(case: Case, name: str, ahead: int) -> dict[str, str]:
    """Return the row of the table that says what memory an epoch takes, in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        # A copy of the case has no pool of numbers with it.
        peak = pool.submit(peak_of_epoch, replace(case), STORES[name], ahead).result()
    shown = "not known here" if peak is None else f"{peak / 2**20:,.0f} MiB beyond the libraries"
    return note_row("most memory of an epoch", name, shown)


def peak_of_epoch(case: Case, file: str, ahead: int) -> int | None:
    """Return the most memory of an epoch, opening included."""

    def job() -> None:
        with FeatureStore(case.folder / file) as store:
            read_epoch(case, store, ahead, check=True)

    return memory.peak_bytes(job)


def note_row(job: str, name: str, note: str) -> dict[str, str]:
    """Return a row of the table that holds no rates."""
    blank = dict.fromkeys(("GB/s", "raw GB/s", "over raw", "range"), "")
    return {"job": job, "who": name, **blank, "of": note}


def remove(path: Path) -> None:
    """Remove a file or folder that may be there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
