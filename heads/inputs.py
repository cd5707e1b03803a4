"""Inputs of training: stored features joined by image id with labels, cut into splits."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.configs.errors import MlcError
from mlc.datasets.labels import SPLITS, LabelTable, load_labels, select_classes
from mlc.datasets.source import DataConfig, read_images
from mlc.heads.tokens import Tokens
from mlc.store import schema
from mlc.store.features import FeatureArray
from mlc.store.reader import FeatureStore, find_store, labels_path

NAMED_IMAGES = 5  # in a sentence
DATA_SWITCHES = {"root", "keep_unlabelled", "unlisted"}  # of the data set that --data names

EvalViews = Literal["first", "mean"]


class LabelsConfig(DataConfig):
    """Which store, and which labels: beside the store unless ``data`` or ``labels_file`` is given.

    Attributes:
        features: the store; by default the only one in ``features/``.
        eval_views: what scores an image: its "first" view, or the "mean" of the logits of all.
        check: whether features are compared with the checksums that the store has of them.
        data: see DataConfig; read again instead of the labels beside the store.
        labels_file: a label table that ``mlc data prepare --out`` wrote.
        classes: keep these classes, in this order; by default all.
    """

    features: Path | None = None
    eval_views: EvalViews = "first"
    check: bool = True
    data: str | None = None  # type: ignore[assignment]
    labels_file: Path | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Features:
    """Pooled features of a store's good images.

    Attributes:
        path: the store.
        image_id: (M,) text.
        values: (M, D) float32, of the first view.
        key: the store's key.
        made_by: what the store recorded.
        digest: hash of the ids and contents of the images.
        views: (V, M, D) float32, of all views, where they were asked for; ``values`` is the first
            of them. View by view, as one is scored like the only one of another store.
        tokens: spatial features, if a head reads those; ``values`` then has no columns.
        rows: (M,) of the store.
        grid: (H, W) of the tokens, where they have one.
    """

    path: Path
    image_id: NDArray[np.str_]
    values: NDArray[np.float32]
    key: Mapping[str, Any]
    made_by: Mapping[str, Any]
    digest: str
    views: NDArray[np.float32] | None = None
    tokens: FeatureArray | None = None
    rows: NDArray[np.intp] | None = None
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Split:
    """The rows of one split, on one device.

    Attributes:
        image_id: (n,) text.
        features: (n, D) float32, of the first view.
        observed: (n, L) int8 of +1, 0, -1.
        true: (n, L) bool, the truth or, where it is not known, the observed positives.
        views: (V, n, D) float32, of all views, where they are of use; ``features`` is the first of
            them, no copy.
        tokens: spatial features, if a head reads those; ``features`` then has no columns.
    """

    image_id: NDArray[np.str_]
    features: Tensor
    observed: Tensor
    true: NDArray[np.bool_]
    views: Tensor | None = None
    tokens: Tokens | None = None

    def of_tokens(self) -> Tokens:
        """Return the tokens of a split that was joined with them."""
        assert self.tokens is not None
        return self.tokens

    def all_views(self) -> Tensor:
        """Return the features (V, n, D) of all views of a split that was joined with them."""
        assert self.views is not None
        return self.views

    def scored_views(self, eval_views: EvalViews) -> list[Tensor]:
        """Return the features (n, D) of each view that is scored; see ``mean_of_views``."""
        return [self.features] if eval_views == "first" else list(self.all_views())


def read_features(
    path: Path | None,
    layer: str | None = None,
    kind: str = schema.POOLED,
    *,
    all_views: bool = False,
    check: bool = True,
) -> Features:
    """Load the pooled features of a store whole, or open its tokens.

    A view of COCO at 2,048-d is 1 GB; its tokens are 66 GB, and are read when they are needed.

    Args:
        path: the store; by default the only one in ``features/``.
        layer: by default the store's first.
        kind: "pooled" or "tokens".
        all_views: load every cached view, not the first alone.
        check: see LabelsConfig.

    Raises:
        MlcError: see ``find_store`` and ``FeatureStore``; the store lacks the layer, or has one
            view where all are asked for; a feature is NaN or infinite.
    """
    with FeatureStore(find_store(path)) as store:
        _require_layer(store, layer)
        good = store.status == schema.OK
        photos = "\n".join([*store.image_id[good].tolist(), *store.content_hash()[good].tolist()])
        views = tokens = None
        if all_views:
            _require_views(store)
        if kind == schema.TOKENS:
            tokens = store.features(layer, schema.TOKENS, check=check)
            values = np.zeros((int(good.sum()), 0), np.float32)
        elif all_views:
            views = _read_views(store, layer, good, check)
            values = views[0]
        else:
            values = _read_view(store, layer, None, good, check)
        return Features(
            path=store.path,
            image_id=store.image_id[good],
            values=values,
            key=store.key,
            made_by=store.made_by,
            digest=hashlib.sha256(photos.encode(errors="surrogateescape")).hexdigest(),
            views=views,
            tokens=tokens,
            rows=np.flatnonzero(good),
            grid=_grid_of(store, layer),
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
    features: Features,
    table: LabelTable,
    device: torch.device,
    splits: tuple[str, ...] = SPLITS,
    *,
    in_all_views: Collection[str] = (),
) -> dict[str, Split]:
    """Return the splits of a table with their features; bad images are left out.

    Args:
        features: of the store; read with all views if any split is to have them.
        table: whose images are looked for among them.
        device: of the splits.
        splits: which.
        in_all_views: those that get all views: each takes as much memory as the first.

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
        rows = rows[rows >= 0]
        all_views = name in in_all_views and features.tokens is None
        of_first, views = _take(features, rows, device, all_views)
        result[name] = Split(
            image_id=part.image_id,
            features=of_first,
            observed=torch.from_numpy(part.observed).to(device),
            true=part.targets(),
            views=views,
            tokens=_tokens_of(features, rows),
        )
    return result


def _tokens_of(features: Features, rows: NDArray[np.intp]) -> Tokens | None:
    if features.tokens is None or features.rows is None:
        return None
    return Tokens(features.tokens, features.rows[rows], features.grid)


def _grid_of(store: FeatureStore, layer: str | None) -> tuple[int, int] | None:
    grid = store.grids.get(layer or store.layers[0])
    return None if grid is None else (grid[0], grid[1])


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


def mean_of_views(logits: Sequence[Tensor]) -> Tensor:
    """Return the mean of the logits (n, L) of some views; those of one view as they are."""
    return logits[0] if len(logits) == 1 else torch.stack(list(logits)).mean(dim=0)


def _take(
    features: Features, rows: NDArray[np.intp], device: torch.device, all_views: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the features (n, D) of some rows and, if asked for, those of all views (V, n, D)."""
    if not all_views:
        return torch.from_numpy(features.values[rows]).to(device), None
    assert features.views is not None
    # Not views[:, rows], which numpy lays out image by image.
    views = torch.from_numpy(np.take(features.views, rows, axis=1)).to(device)
    return views[0], views


def _require_layer(store: FeatureStore, layer: str | None) -> None:
    if layer is not None and layer not in store.layers:
        raise MlcError(
            f"{store.path}: has no layer {layer!r}, it has {', '.join(store.layers)}; "
            "name one of them with --layer, or extract another with mlc extract --layers"
        )


def _require_views(store: FeatureStore) -> None:
    names = store.key["views"]
    if len(names) < 2:
        raise MlcError(
            f"{store.path}: has one view of each image, {names[0]!r}; --view-augment and "
            "--eval-views mean need two at least: mlc extract --views orig,flip makes such a store"
        )


def _read_views(
    store: FeatureStore, layer: str | None, good: NDArray[np.bool_], check: bool
) -> NDArray[np.float32]:
    """Return the features (V, M, D) of all views of the good images."""
    names = store.key["views"]
    first = _read_view(store, layer, names[0], good, check)
    views = np.empty((len(names), *first.shape), np.float32)
    views[0] = first
    for index in range(1, len(names)):
        views[index] = _read_view(store, layer, names[index], good, check)
    return views


def _read_view(
    store: FeatureStore, layer: str | None, view: str | None, good: NDArray[np.bool_], check: bool
) -> NDArray[np.float32]:
    """Return the features (M, D) of one view of the good images, by default the first."""
    values = store.pooled(layer, view, check=check)[good]
    _require_finite(store.path, store.image_id[good], values)
    return values


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
