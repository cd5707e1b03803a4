"""compare(): two stores of the same images, side by side: what narrower numbers cost.

Of every feature array, how far the stored vectors are apart, and the mAP of heads that were trained
and tested on each store: linear ones, and on tokens one with attention.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress, silent
from mlc.datasets.labels import LabelTable
from mlc.heads.config import TrainConfig, check_config, settle_knobs, splits_in_views
from mlc.heads.fit import prepare
from mlc.heads.inputs import Features, read_labels
from mlc.heads.metrics import evaluate
from mlc.heads.modules import HEADS
from mlc.heads.train import probabilities, train_block
from mlc.heads.trained import Diverged
from mlc.report.store_pair import StorePair
from mlc.store import schema
from mlc.store.features import FeatureArray
from mlc.store.quantize import Cost, cost, decode_numpy
from mlc.store.reader import FeatureStore, labels_path

SAMPLE_IMAGES = 256  # or fewer if they are large
SAMPLE_BYTES = 256 << 20  # of float32, from each store
SAMPLE_SEED = 0
READ_BYTES = 64 << 20  # of tokens, at once
SEEDS = (0, 1, 2)
EPOCHS = 10  # fewer than the papers' 25: what is asked is a difference, not the best head


@dataclass(frozen=True)
class ArrayDifference:
    """How far one feature array of two stores is apart, on a sample of images.

    Attributes:
        array: its name.
        dtypes: as the two stores have it.
        images: of the sample, in all cached views.
        cost: of the second against the first; its items are vectors, one for each token.
        clipped: share of all numbers that the dtype of each store could not hold, from 0 to 1.
    """

    array: str
    dtypes: tuple[str, str]
    images: int
    cost: Cost
    clipped: tuple[float, float]


@dataclass(frozen=True)
class HeadDifference:
    """Test mAP of heads that were trained and tested on each of two stores.

    Attributes:
        head: a key of HEADS.
        array: whose first view the heads saw; of tokens a linear head sees the mean.
        seeds: of the heads.
        mean_ap: percentages by seed, of the first store and of the second.
    """

    head: str
    array: str
    seeds: tuple[int, ...]
    mean_ap: tuple[tuple[float, ...], tuple[float, ...]]

    def inputs(self) -> str:
        """Return what the heads saw, in words."""
        of_mean = self.array.endswith(schema.TOKENS) and HEADS[self.head].reads == schema.POOLED
        return f"the mean of {self.array}" if of_mean else self.array

    def differences(self) -> list[float]:
        """Return by how much the second store is better, seed by seed."""
        return [now - was for was, now in zip(*self.mean_ap, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """What compare() found.

    Attributes:
        paths: of the stores.
        images: that are good in both.
        arrays: of both stores.
        heads: of the arrays that differ in dtype, or of one if none does.
        notes: sentences on what is not compared.
    """

    paths: tuple[Path, Path]
    images: int
    arrays: list[ArrayDifference]
    heads: list[HeadDifference]
    notes: list[str]


def compare(
    first: Path,
    second: Path,
    config: TrainConfig | None = None,
    seeds: Sequence[int] = SEEDS,
    progress: Progress = silent,
) -> Comparison:
    """Compare two stores that differ in format or in what costs accuracy alone.

    That is the dtypes and kinds of features, the decoder, the precision and the engine.

    Args:
        first: the store with the labels beside it, unless the config names others.
        second: the other.
        config: of the heads; by default bce on full labels, with fewer epochs than ``mlc
            train-head`` has.
        seeds: of the heads.
        progress: told of epochs.

    Raises:
        MlcError: a store is damaged or unfinished, the stores have too little in common (see
            ``StorePair.of``), or the config asks for several views; see also ``read_labels``,
            ``prepare`` and ``train_block``.
    """
    config = TrainConfig(epochs=EPOCHS) if config is None else config
    check_config(config)
    if splits_in_views(config):
        raise MlcError("compare: its heads see the first view; leave view options out")
    with FeatureStore(first) as one, FeatureStore(second) as other:
        pair = StorePair.of(one, other)
        notes = pair.notes()
        arrays = [_array_difference(pair, array) for array in pair.arrays]
        if config.labels_file is None and config.data is None and not labels_path(first).is_file():
            notes.append(f"no heads were trained: {labels_path(first)} is not there")
            return Comparison((first, second), len(pair.image_id), arrays, [], notes)
        table = read_labels(config, first)
        heads = [
            _head_difference(pair, array, table, each, tuple(seeds), progress)
            for array in pair.different()
            for each in _configs_of(array, config)
        ]
    return Comparison((first, second), len(pair.image_id), arrays, heads, notes)


def array_records(comparison: Comparison) -> list[dict[str, str]]:
    """Return a record for each feature array."""
    return [
        {
            "array": each.array,
            "dtypes": " / ".join(each.dtypes),
            "images": f"{each.images:,}",
            "cosine mean": f"{each.cost.cosine_mean:.6f}",
            "worst": f"{each.cost.cosine_worst:.6f}",
            "max difference": f"{each.cost.max_difference:.3g}",
            "relative RMS": f"{each.cost.relative_rms:.2e}",
            "clipped": " / ".join(f"{100 * share:.2g} %" for share in each.clipped),
        }
        for each in comparison.arrays
    ]


def head_records(comparison: Comparison) -> list[dict[str, str]]:
    """Return a record for each array that heads were trained on."""
    return [
        {
            "head": f"{each.head} on {each.inputs()}",
            "seeds": ",".join(map(str, each.seeds)),
            "mAP first": _spread(each.mean_ap[0]),
            "mAP second": _spread(each.mean_ap[1]),
            "difference": _spread(each.differences(), "+"),
        }
        for each in comparison.heads
    ]


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Return e.g. ``61.20 ± 0.05``: mean and standard deviation, of one value no deviation."""
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.3f}{spread}"


def _array_difference(pair: StorePair, array: str) -> ArrayDifference:
    both = pair.features(array)
    image_bytes = prod(both[0].shape[1:]) * np.dtype(np.float32).itemsize
    count = min(len(pair.image_id), SAMPLE_IMAGES, max(1, SAMPLE_BYTES // image_bytes))
    chosen = np.random.default_rng(SAMPLE_SEED).permutation(len(pair.image_id))[:count]
    one, other = (
        torch.from_numpy(_read(each, rows[chosen]))
        for each, rows in zip(both, pair.rows, strict=True)
    )
    return ArrayDifference(
        array=array,
        dtypes=(both[0].dtype.name, both[1].dtype.name),
        images=count,
        cost=cost(one.flatten(0, -2), other.flatten(0, -2)),
        clipped=(_clipped(pair, array, 0), _clipped(pair, array, 1)),
    )


def _read(array: FeatureArray, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return all views of rows, (n * V, ...)."""
    views = array.shape[1]
    which = (rows[:, None] * views + np.arange(views)).reshape(-1)
    return decode_numpy(array.read_many(which), array.scale)


def _clipped(pair: StorePair, array: str, which: int) -> float:
    """Return the share of the numbers of good images that were clipped."""
    path, rows = pair.stores[which].path, pair.rows[which]
    with closing(schema.format_of(path).open(path)) as backend:
        counts = backend.read(schema.clipped(array))[rows]
        numbers = prod(backend.shape(array)[1:]) * len(rows)
    return float(counts.sum(dtype=np.float64) / numbers)


def _head_difference(
    pair: StorePair,
    array: str,
    table: LabelTable,
    config: TrainConfig,
    seeds: tuple[int, ...],
    progress: Progress,
) -> HeadDifference:
    inputs = _tokens if HEADS[config.head].reads == schema.TOKENS else _inputs
    one, other = (
        _mean_aps(inputs(pair, array, which), table, config, seeds, progress) for which in (0, 1)
    )
    return HeadDifference(config.head, array, seeds, (one, other))


def _configs_of(array: str, config: TrainConfig) -> list[TrainConfig]:
    """Return the heads that are trained on an array: on tokens the one that looks at them too."""
    if array.endswith(schema.TOKENS) and HEADS[config.head].reads == schema.POOLED:
        return [config, config.model_copy(update={"head": "attention-pool"})]
    return [config]


def _tokens(pair: StorePair, array: str, which: int) -> Features:
    """Return tokens for a head that reads them, in the order of the images of both stores."""
    store, rows = pair.stores[which], pair.rows[which]
    return Features(
        path=store.path,
        image_id=pair.image_id,
        values=np.zeros((len(rows), 0), np.float32),
        key=store.key,
        made_by=store.made_by,
        digest=f"of {store.path}",  # no run folder is named for it
        tokens=pair.features(array)[which],
        rows=rows,
    )


def _inputs(pair: StorePair, array: str, which: int) -> Features:
    """Return what a linear head sees of an array: pooled features, or the mean of the tokens."""
    store, rows = pair.stores[which], pair.rows[which]
    features = pair.features(array)[which]
    units, step = features.units_of(rows), max(1, READ_BYTES // features.unit_bytes)
    values = np.empty((len(rows), features.shape[-1]), np.float32)
    for start in range(0, len(rows), step):
        part = decode_numpy(features.read_many(units[start : start + step]), features.scale)
        values[start : start + step] = part if part.ndim == 2 else part.mean(axis=1)
    digest = f"of {store.path}"  # no run folder is named for it
    return Features(store.path, pair.image_id, values, store.key, store.made_by, digest)


def _mean_aps(
    features: Features,
    table: LabelTable,
    config: TrainConfig,
    seeds: Sequence[int],
    progress: Progress,
) -> tuple[float, ...]:
    """Return the test mAP, in %, of a head of each seed."""
    prepared = prepare(config, features, table)
    knobs = settle_knobs(config, prepared.table)
    configs = [config.model_copy(update={"seed": seed, "knobs": knobs}) for seed in seeds]
    found = []
    for trained in train_block(configs, prepared.splits, progress):
        if isinstance(trained, Diverged):
            raise trained
        test = prepared.splits["test"]
        probs = probabilities(trained.logits["test"])
        found.append(float(evaluate(probs, test.true, table.classes)["mAP"]))
    return tuple(found)
