"""Inputs of training: stored features joined by image id with labels, cut into splits."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.configs.errors import MlcError
from mlc.datasets.labels import SPLITS, LabelTable, load_labels, select_classes
from mlc.datasets.source import DataConfig, read_images
from mlc.store import schema
from mlc.store.reader import FeatureStore, find_store, labels_path

NAMED_IMAGES = 5  # in a sentence
DATA_SWITCHES = {"root", "keep_unlabelled", "unlisted"}  # of the data set that --data names


class LabelsConfig(DataConfig):
    """Which store, and which labels: beside the store unless ``data`` or ``labels_file`` is given.

    Attributes:
        features: the store; by default the only one in ``features/``.
        data: see DataConfig; read again instead of the labels beside the store.
        labels_file: a label table that ``mlc data prepare --out`` wrote.
        classes: keep these classes, in this order; by default all.
    """

    features: Path | None = None
    data: str | None = None  # type: ignore[assignment]
    labels_file: Path | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Features:
    """Pooled features of a store's good images.

    Attributes:
        path: the store.
        image_id: (M,) text.
        values: (M, D) float32.
        key: the store's key.
        made_by: what the store recorded.
        digest: hash of the ids and contents of the images.
    """

    path: Path
    image_id: NDArray[np.str_]
    values: NDArray[np.float32]
    key: Mapping[str, Any]
    made_by: Mapping[str, Any]
    digest: str


@dataclass(frozen=True)
class Split:
    """The rows of one split, on one device.

    Attributes:
        image_id: (n,) text.
        features: (n, D) float32.
        observed: (n, L) int8 of +1, 0, -1.
        true: (n, L) bool, the truth or, where it is not known, the observed positives.
    """

    image_id: NDArray[np.str_]
    features: Tensor
    observed: Tensor
    true: NDArray[np.bool_]


def read_features(path: Path | None) -> Features:
    """Load the pooled features of a store whole: a COCO of 2,048-d features is 1 GB.

    Raises:
        MlcError: see ``find_store`` and ``FeatureStore``; a feature is NaN or infinite.
    """
    with FeatureStore(find_store(path)) as store:
        good = store.status == schema.OK
        photos = "\n".join([*store.image_id[good].tolist(), *store.content_hash()[good].tolist()])
        values = store.pooled()[good]
        _require_finite(store.path, store.image_id[good], values)
        return Features(
            path=store.path,
            image_id=store.image_id[good],
            values=values,
            key=store.key,
            made_by=store.made_by,
            digest=hashlib.sha256(photos.encode(errors="surrogateescape")).hexdigest(),
        )


def read_labels(config: LabelsConfig, store: Path) -> LabelTable:
    """Read the labels that a config names, by default those beside the store.

    Raises:
        MlcError: two sources are named, or the one that is named cannot be read.
    """
    if config.data is not None and config.labels_file is not None:
        raise MlcError("labels: got both --data and --labels-file; pass one")
    if config.data is not None:
        table = read_images(config).labels
    elif ignored := DATA_SWITCHES & config.model_dump(exclude_defaults=True).keys():
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(ignored))
        raise MlcError(f"labels: {names} without --data; pass --data coco or a CSV too")
    else:
        table = load_labels(config.labels_file or labels_path(store))
    return table if config.classes is None else select_classes(table, config.classes)


def join(
    features: Features, table: LabelTable, device: torch.device, splits: tuple[str, ...] = SPLITS
) -> dict[str, Split]:
    """Return the splits of a table with their features; bad images are left out.

    Raises:
        MlcError: none of a split's images has features.
    """
    row = {image_id: index for index, image_id in enumerate(features.image_id.tolist())}
    result = {}
    for name in splits:
        part = table.part(name)
        rows = np.array([row.get(image_id, -1) for image_id in part.image_id.tolist()], np.intp)
        if not (rows >= 0).any():
            raise MlcError(
                f"{features.path}: has features of none of the {len(part)} images of split "
                f"{name!r}; name the store of this data set with --features"
            )
        part = part.rows(rows >= 0)
        result[name] = Split(
            image_id=part.image_id,
            features=torch.from_numpy(features.values[rows[rows >= 0]]).to(device),
            observed=torch.from_numpy(part.observed).to(device),
            true=part.targets(),
        )
    return result


def relabel(splits: Mapping[str, Split], table: LabelTable) -> dict[str, Split]:
    """Return splits with the labels that another protocol shows of the same images.

    Args:
        splits: by ``join``.
        table: with the rows and splits that they were joined from.
    """
    result = {}
    for name, split in splits.items():
        part = table.part(name)
        row = {image_id: index for index, image_id in enumerate(part.image_id.tolist())}
        part = part.rows(np.array([row[each] for each in split.image_id.tolist()], np.intp))
        observed = torch.from_numpy(part.observed).to(split.observed.device)
        result[name] = replace(split, observed=observed, true=part.targets())
    return result


def _require_finite(path: Path, image_id: NDArray[np.str_], values: NDArray[np.float32]) -> None:
    # A sum is NaN or infinite if a term is, and needs no copy of a gigabyte; in float64 it does
    # not overflow, and that infinities of both signs have none is no news.
    with np.errstate(invalid="ignore"):
        bad = image_id[~np.isfinite(values.sum(axis=1, dtype=np.float64))]
    if len(bad):
        shown = ", ".join(bad[:NAMED_IMAGES].tolist()) + (
            ", ..." if len(bad) > NAMED_IMAGES else ""
        )
        raise MlcError(
            f"{path}: features of {len(bad):,} of {len(image_id):,} images are NaN or infinite "
            f"(image id {shown}); extract it again with other weights or in higher precision"
        )
