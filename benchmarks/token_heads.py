"""Query2Label heads trained from a store of tokens, against the same steps on ready tensors.

    python benchmarks/token_heads.py [--folder DIR] [--rounds 3] [--device cpu]

The slim head (width 256) is on tokens of lite0 at 224 px, (49, 1280), the full one on those of
ResNet-101 at 448 px, (196, 2048), both stored as float16. In each round the same number of steps is
taken on float32 batches that are ready, and on batches off the disk, page cache dropped, features
checked; a ratio is of the two rates. On a GPU also the peak of its memory.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import click
import numpy as np
import torch
from memory import back_memory, drop_cache
from store_case import GB, Case, make_case, write_store
from torch import Tensor

from mlc.configs.allocator import keep_freed_memory
from mlc.heads.config import TrainConfig
from mlc.heads.head_size import HeadSize
from mlc.heads.token_training import Part, TokenTraining
from mlc.heads.tokens import TokenReader, Tokens
from mlc.report.console import print_table
from mlc.store.batches import shuffled
from mlc.store.reader import FeatureStore

CLASSES, FILE = 80, "mlc.zarr"
READY = 4  # batches of ready tensors, used again and again


class Kind(NamedTuple):
    """Attributes: hidden_dim, tokens (T, C), grid, batch, steps: of a round, on a CPU and a GPU."""

    hidden_dim: int | None
    tokens: tuple[int, int]
    grid: tuple[int, int]
    batch: int
    steps: tuple[int, int]


KINDS = {
    "slim": Kind(256, (49, 1280), (7, 7), 64, (40, 200)),
    "full": Kind(None, (196, 2048), (14, 14), 16, (3, 60)),
}


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=".", help="On the disk to time.")
@click.option("--rounds", default=3)
@click.option("--device", default="cpu")
@click.option("--batch", type=int, help="Of both heads; default 64 and 16.")
@click.option("--precision", default="float32")
def main(folder: Path, rounds: int, device: str, batch: int | None, precision: str) -> None:
    """Print one table; everything that is written is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the files are removed
    keep_freed_memory()
    records = []
    for name, kind in KINDS.items():
        kind = kind._replace(batch=batch or kind.batch)
        with tempfile.TemporaryDirectory(prefix="mlc-heads-", dir=folder) as made:
            records.append(record(name, kind, Path(made), rounds, torch.device(device), precision))
    print(f"{os.cpu_count()} cores, {device}, {precision}, {rounds} rounds, medians")
    print_table(records)


def record(
    name: str, kind: Kind, folder: Path, rounds: int, device: torch.device, precision: str
) -> dict[str, str]:
    """Return the row of the table of one kind of head."""
    steps = kind.steps[device.type == "cuda"]
    case = make_case(folder, "tokens", "float16", kind.tokens, images=steps * kind.batch)
    write_store(case, FILE)
    config = TrainConfig(
        head="q2l",
        hidden_dim=kind.hidden_dim,
        loss="asl",
        precision=precision,
        device=str(device),
    )
    size = HeadSize(kind.tokens[1], CLASSES, kind.grid)
    training = TokenTraining(config, size, device, steps)
    ready_rates, stored_rates = [], []
    with FeatureStore(folder / FILE) as store:
        tokens = Tokens(store.features(kind="tokens"), np.arange(case.images), kind.grid)
        take_steps(training, ready(case, kind, 1, device), device)
        for _ in range(rounds):
            back_memory()
            ready_rates.append(take_steps(training, ready(case, kind, steps, device), device))
            drop_cache(folder, "mlc zarr")
            back_memory()
            reader = TokenReader.open([tokens], device, kind.batch, place="disk")
            batches = shuffled(tokens.units(), kind.batch, seed=0, epoch=0)
            stored_rates.append(take_steps(training, reader.read(batches), device))
    ratios = [mine / its for mine, its in zip(stored_rates, ready_rates, strict=True)]
    return {
        "head": name,
        "tokens": f"{kind.tokens[0]} x {kind.tokens[1]}",
        "batch": str(kind.batch),
        "ready images/s": f"{median(ready_rates):.1f}",
        "from the store": f"{median(stored_rates):.1f}",
        "over ready": f"{median(ratios):.3f}",
        "range": f"{min(ratios):.3f} to {max(ratios):.3f}",
        "GPU memory": peak_memory(device),
    }


def ready(case: Case, kind: Kind, steps: int, device: torch.device) -> Iterator[Tensor]:
    """Return batches (B, T, C) float32 that are on the device before the first is taken."""
    pool = torch.from_numpy(case.pool[: READY * kind.batch, 0]).to(device)
    parts = pool.split(kind.batch)
    batches = [parts[step % len(parts)] for step in range(steps)]
    return iter([each for each in batches if len(each) == kind.batch] or [pool[: kind.batch]])


def take_steps(training: TokenTraining, batches: Iterable[Tensor], device: torch.device) -> float:
    """Return images a second of a step for each batch."""
    labels = torch.where(torch.rand(1024, CLASSES) < 0.04, 1, -1).to(device, torch.int8)
    start, images = time.perf_counter(), 0
    for step, batch in enumerate(batches):
        training.add(Part(0, 1.0, batch, None, labels[: len(batch)]), step)
        training.step(step)
        images += len(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images / (time.perf_counter() - start)


def peak_memory(device: torch.device) -> str:
    """Return the most memory of a GPU that was in use."""
    if device.type != "cuda":
        return ""
    return f"{torch.cuda.max_memory_reserved(device) / GB:.2f} GB"


if __name__ == "__main__":
    main()
