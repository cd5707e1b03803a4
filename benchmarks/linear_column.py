"""The linear column of the MLSPL paper on COCO: mlc, the plain script and the released design.

    python benchmarks/linear_column.py [--labels LABELS.npz] [--scale 0.02] [--device cuda]

The job: 72 runs, 9 losses x batch 8 and 16 x 4 learning rates, 25 epochs each, a validation mAP
after every epoch and a test mAP at the end. The data: made-up float32 features of COCO's size
(65,665 + 16,416 + 40,137 rows x 2,048), which cost the same as real ones, with real labels if
``--labels`` names them, else with as many positives. A learning rate does not change a cost.

What is timed, in each of some rounds, contestants in turn, so that the noise of a shared machine
hits all of them; every figure is the median over rounds, every ratio is taken within a round:

- released design (released_design.py): its steps, and what it does for each image beside them,
  extrapolated to an epoch by the formula that is printed. On one thread, its best case; for ROLE,
  whose table is large, the quicker of one thread and of all;
- plain script (plain_script.py): its steps, for each loss and batch size the quicker of one thread
  and of all, and one evaluation of val and of test;
- mlc: a step of all heads of a batch size together, of one head alone, and the same evaluations.

Each slice starts after a warm-up, with new heads. Then for each contestant

    column = sum over batch sizes and losses of 4 x 25 x steps of an epoch x seconds of a step
             + 72 x (25 x evaluation of val + evaluation of test)

where the released design evaluates train, val and test after every epoch instead. The features of
a split and ROLE's tables have their full size in every slice; only steps and images are fewer.

The memory limit: a step of a head reads weights, gradient and two moments, and writes all but the
gradient: 7 x 2,049 x 80 x 4 bytes = 4.6 MB, if its state does not stay in the cache. The table says
how long that takes at the bandwidth of a triad, measured in the same rounds.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
import memory
import numpy as np
import plain_script
import released_design
import torch
from coco_sized import CLASSES, POSITIVES, WIDTH, Data, make_data
from torch import Tensor

from mlc.configs.device import one_thread
from mlc.heads.block import LinearBlock, Start, bytes_of_head
from mlc.heads.inputs import Split
from mlc.heads.metrics import mean_ap
from mlc.heads.plan import CACHE_BYTES
from mlc.losses.table import LOSSES as METHODS
from mlc.report.console import print_table

LOSSES = ("bce", "bce_ls", "iun", "iu", "an", "an_ls", "wan", "epr", "role")
BATCH_SIZES, LRS, EPOCHS = (8, 16), (1e-2, 1e-3, 1e-4, 1e-5), 25
ROLE_HEADS = 8  # of ROLE, and of AN, in the sweep that compares the two
HEAD_STEP_BYTES = 7 * (WIDTH + 1) * CLASSES * 4
WARM_UP = 5  # steps

Seconds = dict[tuple[object, ...], float]


@dataclass(frozen=True)
class Slice:
    """How much is timed.

    Attributes:
        steps: of mlc and the plain script; ROLE's dense Adam and the released design take fewer.
        rows: images that the released design scores.
        workers: of the released design's loader.
    """

    steps: int
    rows: int
    workers: int

    def steps_of(self, who: str, loss: str) -> int:
        """Return how many steps of a contestant are timed."""
        slow = {"mlc": 1, "plain": 4 if loss == "role" else 1}
        return max(4, self.steps // slow.get(who, 16 if loss == "role" else 4))


@click.command()
@click.option("--labels", type=click.Path(path_type=Path), help="npz with packed `labels`.")
@click.option("--scale", default=1.0, help="Share of COCO's images.")
@click.option("--repeats", default=5, help="Rounds.")
@click.option("--steps", default=200, help="Steps of a slice.")
@click.option("--rows", default=4096, help="Images that the released design scores in a slice.")
@click.option("--workers", default=0, help="Of the released design's loader.")
@click.option("--device", default="cpu")
def main(
    labels: Path | None,
    scale: float,
    repeats: int,
    steps: int,
    rows: int,
    workers: int,
    device: str,
) -> None:
    """Print one table: extrapolated seconds, ratios, memory traffic."""
    warnings.simplefilter("ignore")  # classes without positives in a scaled-down set
    torch.manual_seed(0)
    data = make_data(labels, scale, device)
    part = Slice(min(steps, data.images["train"] // 32), min(rows, data.images["val"]), workers)
    rounds = [measure(data, part, device) for _ in range(repeats + 1)][1:]  # the first warms up
    print(_head(data, part, repeats, device))
    print_table([*_records([figures(each, data.images) for each in rounds]), *_memory(data, part)])


def measure(data: Data, part: Slice, device: str) -> Seconds:
    """Return the seconds of one round: of a step, or of an evaluation.

    Keys: (contestant, loss, batch size) of a head alone; ("pass", "others" or "role", batch size)
    of mlc's heads of these losses and all learning rates; ("eight", "an" or "role", batch size) of
    eight heads; (contestant, split); ("released", batch size) of an epoch without its steps;
    ("triad", threads), bytes a second.
    """
    found: Seconds = {}
    for threads in {1, torch.get_num_threads()}:
        found["triad", threads] = memory.triad_bandwidth(threads, device)
    for size in BATCH_SIZES:
        for loss in LOSSES:
            found["released", loss, size] = released_step(data, loss, size, part, device)
            found["plain", loss, size] = plain_step(data, loss, size, part)
            found["mlc", loss, size] = mlc_step(data, (loss,), size, 1, part)
        found["pass", "others", size] = mlc_step(data, LOSSES[:-1], size, len(LRS), part)
        found["pass", "role", size] = mlc_step(data, LOSSES[-1:], size, len(LRS), part)
        for loss in ("an", "role"):
            found["eight", loss, size] = mlc_step(data, (loss,), size, ROLE_HEADS, part)
        found["released", size] = released_rest(data, size, part, device)
    for split in ("val", "test"):
        found["plain", split] = plain_evaluation(data, split)
        found["mlc", split] = mlc_evaluation(data, split)
    return found


def mlc_slice(data: Data, losses: Sequence[str], batch_size: int, heads: int, steps: int) -> float:
    """Return the seconds that mlc takes for some steps of ``heads`` heads of each loss.

    As a sweep does it: blocks of the planned size, as many at once as there are cores, each on one
    thread. Starting the heads and a warm-up are not timed. So that no core waits at the end, which
    in a column of hours does not count, all is done once for each core; the time is divided.

    Args:
        data: all of it; tables of estimates have their full size.
        losses: of LOSSES.
        batch_size: of the steps.
        heads: of each loss; their learning rates are those of the grid, in turn. A head alone is
            alone on the machine.
        steps: timed, the same batches for all heads.
    """
    workers = torch.get_num_threads() if heads > 1 and not data.features["train"].is_cuda else 1
    most = max(1, CACHE_BYTES // bytes_of_head(WIDTH, CLASSES))
    sizes = [len(each) for each in np.array_split(np.arange(heads), -(-heads // most))]
    rows = torch.randperm(data.images["train"])[: (steps + WARM_UP) * batch_size]
    warm_up, timed = rows.view(-1, batch_size).split([WARM_UP, steps])
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        blocks = [
            _block(data, loss, size, batch_size)
            for loss in losses
            for size in sizes
            for _ in range(workers)
        ]
        list(pool.map(lambda block: block.epoch(warm_up).sum().item(), blocks))
        start = time.perf_counter()
        list(pool.map(lambda block: block.epoch(timed).sum().item(), blocks))
        return (time.perf_counter() - start) / workers


def _block(data: Data, loss: str, heads: int, batch_size: int) -> LinearBlock:
    method = METHODS[loss]
    knobs = {"expected_positives": POSITIVES} if "expected_positives" in method.knobs() else {}
    true = data.true["train"].numpy()
    ids = np.arange(len(true)).astype(str)
    train = Split(ids, data.features["train"], data.shown(loss), true)
    starts = [Start(LRS[head % len(LRS)], 0.0, 0) for head in range(heads)]
    return LinearBlock(method, knobs, starts, train, batch_size)


def mlc_evaluation(data: Data, split: str) -> float:
    """Return the seconds of mAP of one head on a split, when every core evaluates heads.

    Like ``mlc_slice``, this is what a sweep does after an epoch.
    """
    features, true = data.features[split], data.true[split].numpy()
    heads = [torch.nn.Linear(WIDTH, CLASSES).to(features.device) for _ in LRS]

    def evaluate(head: torch.nn.Module) -> float:
        with torch.inference_mode():
            return float(mean_ap(head(features).sigmoid().cpu().numpy(), true))

    workers = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        start = time.perf_counter()
        list(pool.map(evaluate, heads))
        return (time.perf_counter() - start) / len(heads)


def mlc_step(data: Data, losses: Sequence[str], size: int, heads: int, part: Slice) -> float:
    """Return the seconds of one step of all these heads."""
    return mlc_slice(data, losses, size, heads, part.steps) / part.steps


def plain_step(data: Data, loss: str, size: int, part: Slice) -> float:
    """Return the seconds of a step of the plain script: the quicker of one and all threads."""
    steps = part.steps_of("plain", loss)
    few = {name: each[:64] for name, each in data.features.items()} | {
        "train": data.features["train"]
    }
    labels = {"train": data.shown(loss)} | {
        name: data.true[name][:64].int() for name in ("val", "test")
    }

    def step() -> float:
        trained = plain_script.train(few, labels, 1e-3, size, 2, loss=loss, steps=steps)
        return trained.step_seconds[1] / steps  # the first epoch is the warm-up

    return quicker(step)


def plain_evaluation(data: Data, split: str) -> float:
    """Return the seconds of one evaluation by the plain script."""
    head = torch.nn.Linear(WIDTH, CLASSES).to(data.features[split].device)
    start = time.perf_counter()
    plain_script.mean_ap(head, data.features[split], data.true[split].int())
    return time.perf_counter() - start


def released_step(data: Data, loss: str, size: int, part: Slice, device: str) -> float:
    """Return the seconds of a step of the released design: see above for the threads."""
    samples = _samples(data, "train", data.shown(loss))
    steps = part.steps_of("released", loss)

    def step() -> float:
        return released_design.time_steps(
            samples, loss, size, steps, workers=part.workers, device=device
        )

    if loss == "role":
        return quicker(step)
    with one_thread():
        return step()


def released_rest(data: Data, size: int, part: Slice, device: str) -> float:
    """Return the seconds of an epoch of the released design beside its steps."""
    samples = _samples(data, "val", torch.where(data.true["val"], 1, -1))
    with one_thread():
        rows = released_design.time_rows(
            samples, size, part.rows, table_rows=data.images["train"], device=device
        )
    return released_design.epoch_seconds(0.0, rows, data.images, size)


def quicker(job: Callable[[], float]) -> float:
    """Return the seconds of a job on all threads or on one, whichever is quicker."""
    with one_thread():
        alone = job()
    return min(alone, job()) if torch.get_num_threads() > 1 else alone


def figures(found: Seconds, images: dict[str, int]) -> dict[str, float]:
    """Return the figures of one round, by what the table calls them."""
    every, result = columns(found, images, LOSSES), {}
    without = columns(found, images, LOSSES[:-1])
    for who, seconds in every.items():
        result[f"column, {who}, s"] = seconds
    for who in ("released", "plain"):
        result[f"column, {who} over mlc"] = every[who] / every["mlc"]
        result[f"  the same without ROLE, {who} over mlc"] = without[who] / without["mlc"]
    for size in BATCH_SIZES:
        result |= _of_batch_size(found, size)
    for split in ("val", "test"):
        result[f"mAP of {split}, plain, s"] = found["plain", split]
        result[f"mAP of {split}, mlc, s"] = found["mlc", split]
    for key, value in found.items():
        if key[0] == "triad":
            result[f"triad, threads: {key[1]}, GB/s"] = value / 1e9
    return result


def columns(found: Seconds, images: dict[str, int], losses: Sequence[str]) -> dict[str, float]:
    """Extrapolate to all runs of some losses, by contestant, in seconds."""
    runs = len(losses) * len(LRS)  # of a batch size
    result = {"released": 0.0, "plain": 0.0, "mlc": 0.0}
    for size in BATCH_SIZES:
        steps = EPOCHS * (images["train"] // size)
        for who in ("released", "plain"):
            result[who] += steps * len(LRS) * sum(found[who, loss, size] for loss in losses)
        result["mlc"] += steps * found["pass", "others", size]
        result["mlc"] += steps * found["pass", "role", size] * ("role" in losses)
        result["released"] += runs * EPOCHS * found["released", size]
        for who in ("plain", "mlc"):
            result[who] += runs * (EPOCHS * found[who, "val"] + found[who, "test"])
    return result


def _of_batch_size(found: Seconds, size: int) -> dict[str, float]:
    heads = len(LOSSES) * len(LRS)
    alone = sum(found["mlc", loss, size] for loss in LOSSES) / len(LOSSES)
    swept = (found["pass", "others", size] + found["pass", "role", size]) / heads
    bandwidth = max(value for key, value in found.items() if key[0] == "triad")
    limit = HEAD_STEP_BYTES / bandwidth
    result = {
        "mlc, step of a head alone, ms": 1e3 * alone,
        "mlc, step per head in the sweep, ms": 1e3 * swept,
        "mlc, in the sweep over alone": swept / alone,
        "4.6 MB at the triad's bandwidth, ms": 1e3 * limit,
        "bandwidth that 4.6 MB a head-step would need, %": 100 * limit / swept,
    }
    for who in ("released", "plain"):
        mean = sum(found[who, loss, size] for loss in LOSSES[:-1]) / (len(LOSSES) - 1)
        result[f"{who}, step without ROLE, ms"] = 1e3 * mean
    for who in ("released", "plain", "mlc"):
        result[f"ROLE over AN, {who}"] = found[who, "role", size] / found[who, "an", size]
    swept_role = found["eight", "role", size] / found["eight", "an", size]
    result[f"ROLE over AN, mlc, {ROLE_HEADS} heads"] = swept_role
    return {f"batch {size}: {name}": value for name, value in result.items()}


def _head(data: Data, part: Slice, repeats: int, device: str) -> str:
    counts = ", ".join(
        f"{who} {part.steps_of(who, 'an')} ({part.steps_of(who, 'role')} of ROLE)"
        for who in ("released", "plain", "mlc")
    )
    return (
        f"{data.images} images, on {device}, {torch.get_num_threads()} threads, {repeats} rounds\n"
        f"slices: steps of {counts}; {part.rows} images scored by the released design, "
        f"P@k and R@k of {part.rows // 8}; one evaluation of val and test each\n"
        f"{released_design.FORMULA}\n"
        "column = 4 learning rates x 25 epochs x steps x step, summed over losses and batch sizes, "
        "+ 72 x (25 x mAP of val + mAP of test), or the released design's own metrics\n"
    )


def _records(rounds: list[dict[str, float]]) -> list[dict[str, str]]:
    records = []
    for name in rounds[0]:
        values = [each[name] for each in rounds]
        spread = f"{min(values):.3g} to {max(values):.3g}"
        records.append({"figure": name, "median": f"{median(values):.3g}", "range": spread})
    return records


def _memory(data: Data, part: Slice) -> list[dict[str, str]]:
    held = {"process, all of the above and the data": memory.peak_of_process()}
    jobs: dict[str, Callable[[], object]] = {
        "mlc, 4 heads of each loss": lambda: mlc_slice(data, LOSSES, 16, len(LRS), WARM_UP),
        "mlc, a head of ROLE": lambda: mlc_slice(data, ("role",), 16, 1, WARM_UP),
        "plain, a head of ROLE": lambda: plain_step(data, "role", 16, part),
    }
    held |= {f"beyond the data, {name}": memory.peak_bytes(job) for name, job in jobs.items()}
    return [
        {"figure": f"peak memory, {name}, MB", "median": f"{value / 1e6:.0f}", "range": ""}
        for name, value in held.items()
        if value is not None
    ]


def _samples(data: Data, split: str, observed: Tensor) -> released_design.Samples:
    features = data.features[split].cpu().numpy()
    return released_design.Samples(features, data.true[split].numpy(), observed.cpu().numpy())


if __name__ == "__main__":
    main()
