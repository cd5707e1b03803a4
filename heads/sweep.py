"""sweep(): a grid of heads on one store, in blocks; finished heads are kept, not trained again."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

import torch

from mlc.configs.device import torch_threads
from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress, silent
from mlc.datasets.labels import LabelTable
from mlc.heads.checkpoint import discard_checkpoint
from mlc.heads.config import (
    TrainConfig,
    check_config,
    default_labels,
    settle_knobs,
)
from mlc.heads.fit import keep, prepare, read_inputs, resolve, run_path
from mlc.heads.grid import ALL, SweepConfig, grid_of
from mlc.heads.head_size import HeadSize
from mlc.heads.inputs import Features
from mlc.heads.plan import Plan, head_steps, plan, plan_tokens
from mlc.heads.run_folder import RESULTS, Run, read_run
from mlc.heads.train import train_block
from mlc.heads.trained import Diverged
from mlc.heads.training_labels import check_labels
from mlc.heads.written import Prepared


@dataclass(frozen=True)
class Swept:
    """What a sweep gives.

    Attributes:
        runs: in the order of the grid.
        notes: sentences on what was left out, and on what the labels lack.
        plan: how those were trained that were not there yet.
    """

    runs: list[Run]
    notes: list[str]
    plan: Plan | None


def sweep(config: SweepConfig, progress: Progress = silent) -> Swept:
    """Train every head of a grid that is not there yet.

    Args:
        config: the grid.
        progress: told of the steps of all heads together.

    Raises:
        MlcError: whatever is wrong with any head, before the first is trained; or heads that
            diverged, after the last.
        KeyboardInterrupt: with a message that says what is kept.
    """
    grid = grid_of(config)
    for each in grid:
        check_config(each)
    if config.out.exists() and not config.out.is_dir():
        raise MlcError(f"{config.out}: is a file; name a folder with --out")
    work = _prepare(config, grid)
    planned = _plan(work)
    try:
        if planned is not None:
            _train(work, planned, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{config.out}: stopped, {sum(map(_is_there, work.configs))} of {len(work.configs)} "
            "heads are kept; the same command goes on from there"
        ) from None
    for each in work.configs:
        if _is_there(each):
            discard_checkpoint(each.out)  # of a pass with others, that was stopped before it ended
    if work.diverged:
        raise _diverged(config.out, work)
    runs = [read_run(each.out) for each in work.configs if each.out]
    return Swept(runs, work.notes, planned)


def _diverged(out: Path, work: "_Work") -> MlcError:
    names = [str(each.out) for each in work.configs if str(each.out) in work.diverged]
    kept = f"; the others are kept, mlc report {out} compares them"
    return MlcError(
        f"{out}: {len(names)} of {len(work.configs)} heads diverged, try a smaller lr: "
        f"{', '.join(names)}{kept if len(names) < len(work.configs) else ''}"
    )


@dataclass
class _Work:
    """A grid, ready to be trained."""

    features: Features
    prepared: dict[str, Prepared]  # by labels and corruption seed
    configs: list[TrainConfig] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)

    def prepared_for(self, config: TrainConfig) -> Prepared:
        """Return labels and splits of a resolved config."""
        return self.prepared[_protocol(config)]


def _prepare(config: SweepConfig, grid: Sequence[TrainConfig]) -> _Work:
    """Read the inputs once, and settle each head."""
    features, table = read_inputs(config)
    work = _Work(features, {})
    source = table.digest()
    unsuited: dict[str, str] = {}
    for each in grid:
        path = run_path(each, features, source, config.out)
        each = each.model_copy(update={"labels": default_labels(each, table), "out": path})
        _add_protocol(work, each, table, config.vary)
        try:
            _require_suited(each, work.prepared_for(each))
        except MlcError as error:  # "all" is those that these labels suit
            if config.losses != ALL:
                raise
            unsuited[each.loss] = str(error)
        else:
            work.configs.append(resolve(each, features, work.prepared_for(each)))
    if not work.configs:
        raise MlcError(f"losses: none suits these labels; {next(iter(unsuited.values()))}")
    work.notes += [f"left out {loss}: {reason}" for loss, reason in unsuited.items()]
    return work


def _require_suited(config: TrainConfig, prepared: Prepared) -> None:
    check_labels(config.loss, prepared.splits["train"].observed.cpu().numpy())
    settle_knobs(config, prepared.table)


def _add_protocol(work: _Work, config: TrainConfig, table: LabelTable, vary: Sequence[str]) -> None:
    name = _protocol(config)
    if name in work.prepared:
        return
    like = next(iter(work.prepared.values()), None)
    prepared = work.prepared[name] = prepare(config, work.features, table, like)
    seed = f" (corruption seed {config.corruption_seed})" if "corruption" in vary else ""
    notes = [sentence + seed for sentence in prepared.notes(config.val_labels)]
    work.notes += [note for note in notes if note not in work.notes]


def _plan(work: _Work) -> Plan | None:
    """Return how to train what is not there yet, if anything."""
    missing = [each for each in work.configs if not _is_there(each)]
    if not missing:
        return None
    train = next(iter(work.prepared.values())).splits["train"]
    if train.tokens is not None:
        size = HeadSize(train.tokens.width, train.observed.shape[1], train.tokens.grid)
        return plan_tokens(missing, len(train.image_id), size, train.features.device)
    images, width = train.features.shape
    return plan(missing, images, width, train.observed.shape[1], train.features.device)


def _train(work: _Work, planned: Plan, progress: Progress) -> None:
    """Train blocks, one on each core."""
    images = len(next(iter(work.prepared.values())).splits["train"].image_id)
    counter = _Counter(planned, images, progress)
    stop = Event()

    def check() -> None:
        if stop.is_set():
            raise InterruptedError

    # A pass over tokens has matrices that are worth sharing; other blocks have a core each.
    threads = torch.get_num_threads() if planned.workers == 1 else 1
    with torch_threads(threads), ThreadPoolExecutor(planned.workers) as pool:
        futures = [
            pool.submit(_train_and_keep, work, block, counter, check) for block in planned.blocks
        ]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _train_and_keep(
    work: _Work, block: list[TrainConfig], counter: "_Counter", check: Callable[[], None]
) -> None:
    prepared = work.prepared_for(block[0])
    trained = train_block(block, prepared.splits, counter.of(block), check)
    for config, head in zip(block, trained, strict=True):
        if isinstance(head, Diverged):
            work.diverged.append(str(config.out))
        else:
            keep(config, head, work.features, prepared)
    discard_checkpoint(block[0].out)
    counter.add(0, heads=len(block))


class _Counter:
    """Tells one progress of what several blocks do."""

    def __init__(self, planned: Plan, images: int, progress: Progress) -> None:
        self._lock = Lock()
        self._progress, self._images = progress, images
        self._steps, self._heads = 0, 0
        self._all_steps = sum(head_steps(block, images) for block in planned.blocks)
        self._all_heads = sum(map(len, planned.blocks))

    def of(self, block: Sequence[TrainConfig]) -> Progress:
        """Return the progress of a block, whatever it counts in."""
        steps, told = head_steps(block, self._images), 0

        def progress(done: int, total: int, note: str = "") -> None:
            nonlocal told
            self.add(steps * done // total - told, heads=0)
            told = steps * done // total

        return progress

    def add(self, steps: int, heads: int) -> None:
        """Take the news of a block."""
        with self._lock:
            self._steps += steps
            self._heads += heads
            note = f"{self._heads} of {self._all_heads} heads"
            self._progress(self._steps, self._all_steps, note)


def _protocol(config: TrainConfig) -> str:
    return f"{config.labels} {config.corruption_seed} {config.label_share} {config.negatives}"


def _is_there(config: TrainConfig) -> bool:
    return config.out is not None and (config.out / RESULTS).is_file()
