"""The table of runs: mean and deviation over seeds, and what can be told from the best."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress, silent
from mlc.heads.run_folder import RESULTS, Run, read_run
from mlc.heads.train import probabilities
from mlc.report.bootstrap import resample_weights, resampled_map

SEEDS = frozenset({"seed", "order_seed", "corruption_seed"})
PLACES = frozenset({"out", "device", "features", "root"})
FOLLOWS_LOSS = frozenset({"knobs", "labels"})
KEY = "features."  # before the fields of the features' key
TUNED = ("lr", "batch_size")  # chosen for each row by validation, as the papers' grids are
LEVEL = (2.5, 97.5)  # per cent, of the intervals


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seeds alone.

    Attributes:
        name: the settings in which the rows of a table differ.
        lr: learning rate.
        batch_size: images a step.
        seeds: number of runs.
        val: mean validation mAP, in per cent, like all that follows.
        test: mean test mAP.
        deviation: sample standard deviation of the test mAP; NaN of one run.
        behind: test mAP minus that of the best row.
        interval: of ``behind``, 95 %.
    """

    name: dict[str, str]
    lr: float
    batch_size: int
    seeds: int
    val: float
    test: float
    deviation: float
    behind: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Report:
    """A table of runs on the same test images.

    Attributes:
        rows: best test mAP first.
        prior: mAP of a constant score: the mean share of positives.
        images: number of test images.
        resamples: of the intervals.
        truth_known: whether the test labels are all that is there.
    """

    rows: list[Row]
    prior: float
    images: int
    resamples: int
    truth_known: bool


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs that are, or lie in, the given folders.

    Raises:
        MlcError: a folder is no run and has none in it.
    """
    folders = []
    for path in paths:
        here = (path / RESULTS).is_file()
        found = [path] if here else sorted(each.parent for each in path.glob(f"*/{RESULTS}"))
        if not found:
            raise MlcError(f"{path}: no run folders there; mlc train-head and mlc sweep make them")
        folders += found
    return [read_run(folder) for folder in dict.fromkeys(folders)]


def make_report(
    runs: Sequence[Run],
    *,
    every_setting: bool = False,
    resamples: int = 1000,
    progress: Progress = silent,
) -> Report:
    """Compare runs.

    Runs are grouped over seeds. Of groups that differ only in ``TUNED`` the one with the best
    mean validation mAP stands for them, the papers' protocol. Differences are of means over
    seeds; their intervals are from a paired bootstrap over test images.

    Args:
        runs: of the same test images and classes.
        every_setting: show all groups instead.
        resamples: of the bootstrap.
        progress: told after each run that is resampled.

    Raises:
        MlcError: the runs are of other test images or classes.
    """
    groups = _group(runs)
    if not every_setting:
        groups = _best_settings(groups)
    chosen = [run for group in groups for run in group]
    first = _require_same_test(chosen)
    weights = resample_weights(len(first["true"]), resamples)
    samples = {}
    for done, run in enumerate(chosen, start=1):
        scores = run.scores()
        samples[run.path] = resampled_map(probabilities(scores["logits"]), scores["true"], weights)
        progress(done, len(chosen), run.path.name)
    return Report(
        rows=_rows(groups, samples),
        prior=100 * float(first["true"].mean(axis=0).mean()),
        images=len(first["true"]),
        resamples=resamples,
        truth_known=all(run.results["truth_known"] for run in chosen),
    )


def _settings(run: Run, without: frozenset[str]) -> dict[str, str]:
    """Return what a run is, as text, the hash of its features in the place of their path."""
    config = run.config.model_dump(mode="json", exclude=set(without | PLACES))
    features = run.results["features"]
    config["features"] = f"{features['backbone']} {features['key']['size_px']} px"
    config |= {f"{KEY}{field}": value for field, value in features["key"].items()}
    config |= {"photos": features["digest"][:8], "table": run.results["labels_digest"][:8]}
    return {name: json.dumps(value) for name, value in config.items()}


def _group(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs over seeds; the same head in two folders is one."""
    different = {json.dumps(_settings(run, frozenset())): run for run in runs}
    groups: dict[str, list[Run]] = {}
    for run in different.values():
        groups.setdefault(json.dumps(_settings(run, SEEDS)), []).append(run)
    return list(groups.values())


def _best_settings(groups: list[list[Run]]) -> list[list[Run]]:
    best: dict[str, list[Run]] = {}
    for group in groups:
        method = json.dumps(_settings(group[0], SEEDS | frozenset(TUNED)))
        if method not in best or _selection(group) > _selection(best[method]):
            best[method] = group
    return list(best.values())


def _selection(group: Sequence[Run]) -> float:
    """Return the mean validation mAP, of clean or observed labels as the protocol says."""
    return float(np.mean([run.results["selection_mAP"] for run in group]))


def _test(group: Sequence[Run]) -> float:
    return float(np.mean([run.results["test"]["mAP"] for run in group]))


def _require_same_test(runs: Sequence[Run]) -> dict[str, NDArray[Any]]:
    first = runs[0].scores()
    for run in runs[1:]:
        scores = run.scores()
        for what in ("image_id", "true"):
            if not np.array_equal(scores[what], first[what]):
                raise MlcError(
                    f"{run.path}: its test images or classes are not those of {runs[0].path}; "
                    "report them apart"
                )
    return first


def _rows(groups: list[list[Run]], samples: dict[Path, NDArray[np.float64]]) -> list[Row]:
    names = _names(groups)
    means = [np.mean([samples[run.path] for run in group], axis=0) for group in groups]
    order = sorted(range(len(groups)), key=lambda index: -_test(groups[index]))
    best = order[0]
    rows = []
    for index in order:
        group = groups[index]
        tests = [run.results["test"]["mAP"] for run in group]
        low, high = np.percentile(means[index] - means[best], LEVEL)
        rows.append(
            Row(
                name=names[index],
                lr=group[0].config.lr,
                batch_size=group[0].config.batch_size,
                seeds=len(group),
                val=_selection(group),
                test=float(np.mean(tests)),
                deviation=float(np.std(tests, ddof=1)) if len(tests) > 1 else float("nan"),
                behind=float(np.mean(tests)) - _test(groups[best]),
                interval=(float(low), float(high)),
            )
        )
    return rows


def _names(groups: list[list[Run]]) -> list[dict[str, str]]:
    """Return for each group the loss, and each other setting in which the table's rows differ."""
    settings = [_settings(group[0], SEEDS | frozenset(TUNED)) for group in groups]
    varied = [name for name in settings[0] if name != "loss" and _varies(name, settings)]
    return [
        {"loss": json.loads(each["loss"])} | {name: each[name].strip('"') for name in varied}
        for each in settings
    ]


def _varies(name: str, settings: list[dict[str, str]]) -> bool:
    """Whether a setting differs of its own, not because the loss or the backbone does."""
    values: dict[str, set[str]] = {}
    for each in settings:
        group = each["loss"] if name in FOLLOWS_LOSS else ""
        group += each["features"] if name.startswith(KEY) else ""
        values.setdefault(group, set()).add(each[name])
    return any(len(each) > 1 for each in values.values())
