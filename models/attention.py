"""Where a head looks: its attention over the photo, and how often that is on the object."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress, silent
from mlc.datasets.boxes import boxes_of
from mlc.datasets.source import DataConfig, read_images
from mlc.extract.config import worker_count
from mlc.extract.shards import batches_of
from mlc.extract.stream import stream_features
from mlc.extract.views import VIEWS, View
from mlc.heads.evaluate import choose_split, labels_of_run
from mlc.heads.inputs import mean_of_views
from mlc.heads.train import probabilities
from mlc.models.whole import WholeModel
from mlc.store.schema import TOKENS, feature

Points = NDArray[np.float64]  # (..., 2): x and y as shares of the photo's width and height
WHOLE = (0.0, 0.0, 1.0, 1.0)  # of the photo, as the crop of a view
CENTRE = np.array([0.5, 0.5])
Label = tuple[int, str, bool, float, bool]  # of an image, a class, and what ``_throws`` returns


@dataclass(frozen=True)
class AttentionBatch:
    """Where a head looks in B images.

    Attributes:
        rows: which of the listed images.
        maps: (B, L, H, W) float32, of sum 1 over a map; of the first view that the run is scored
            in, turned back upright. They lie on what the view shows of the photo.
        probs: (B, L) float32 in [0, 1].
        error: (B,) text, empty where nothing is wrong; else the rest is meaningless.
    """

    rows: range
    maps: NDArray[np.float32]
    probs: NDArray[np.float32]
    error: NDArray[np.str_]


def attention_maps(
    model: WholeModel, files: Sequence[Path], progress: Progress = silent
) -> Iterator[AttentionBatch]:
    """Yield where a model's head looks, for each class, in batches of images.

    Args:
        model: its head has ``attention``: tokens (B, T, C) -> (B, L, T), of sum 1 over the tokens.
        files: N images.
        progress: told after each batch.

    Raises:
        MlcError: the head has no attention, or its layer no grid.
    """
    attend = _attention_of(model)
    layer = model.backbone.key.layers[0]
    view, grid = VIEWS[model.backbone.key.views[0]], model.backbone.grids[layer]
    batches = batches_of(range(len(files)), model.backbone.batch_size)
    bad = 0
    for batch in stream_features(model.backbone, files, batches, worker_count(None)):
        tokens = batch.features[feature(layer, TOKENS)].unbind(1)
        with torch.inference_mode():
            maps = attend(tokens[0]).float().cpu().numpy()
            logits = mean_of_views([model.head(each) for each in tokens]).float().cpu().numpy()
        bad += int((batch.error != "").sum())
        progress(batch.rows.stop, len(files), f"{bad} bad" if bad else "")
        maps = upright(maps.reshape(*maps.shape[:2], *grid), view)
        yield AttentionBatch(batch.rows, maps, probabilities(logits), batch.error)


def upright(maps: NDArray[Any], view: View) -> NDArray[Any]:
    """Return maps (..., H, W) of a view as they lie on the photo before the view turns it.

    >>> upright(np.array([[1, 2], [3, 4]]), VIEWS["flip"]).tolist()
    [[2, 1], [4, 3]]
    """
    turn: Callable[[NDArray[Any]], NDArray[Any]] | None = view.turn
    if turn is None:
        return maps
    height, width = maps.shape[-2:]
    cells = turn(np.arange(height * width).reshape(height, width, 1)).ravel()
    turned = np.empty_like(maps).reshape(*maps.shape[:-2], -1)
    turned[..., cells] = maps.reshape(turned.shape)
    return turned.reshape(maps.shape)


def cell_centres(grid: tuple[int, int], view: View) -> Points:
    """Return where on the photo the centre of each cell of an upright map is, (H, W, 2).

    >>> cell_centres((1, 2), VIEWS["orig"]).tolist()
    [[[0.25, 0.5], [0.75, 0.5]]]
    """
    left, upper, right, lower = view.crop or WHOLE
    height, width = grid
    x = left + (np.arange(width) + 0.5) / width * (right - left)
    y = upper + (np.arange(height) + 0.5) / height * (lower - upper)
    return np.stack(np.meshgrid(x, y), axis=-1)


def peak_of(map_: NDArray[np.float32]) -> tuple[int, int]:
    """Return the row and the column of a map's (H, W) highest cell, of several the first."""
    row, column = np.unravel_index(int(map_.argmax()), map_.shape)
    return int(row), int(column)


def are_inside(points: Points, boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return (...) whether points (..., 2) are in any of the boxes (n, 4), or on its edge."""
    x, y = points[..., :1], points[..., 1:]
    left, upper, right, lower = boxes.T
    return np.asarray(((left <= x) & (x <= right) & (upper <= y) & (y <= lower)).any(axis=-1))


def point_on_images(
    model: WholeModel, config: DataConfig, split: str = "test", progress: Progress = silent
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return ``pointing_game`` of a split of a data set, and its bad images.

    Raises:
        MlcError: see ``pointing_game``, ``boxes_of`` and ``labels_of_run``.
    """
    _attention_of(model)
    choose_split(split)
    images = read_images(config)
    table = labels_of_run(model.run, images.labels, split).part(split)
    boxes = boxes_of(config)
    own = [boxes.get(str(image_id), {}) for image_id in table.image_id]
    known = np.array([not each.keys().isdisjoint(model.run.classes) for each in own], dtype=bool)
    files = [images.root / str(name) for name in table.file[known]]
    boxed = [each for each, keep in zip(own, known, strict=True) if keep]
    result, bad = pointing_game(model, files, boxed, progress)
    return result, {str(table.file[known][row]): reason for row, reason in bad.items()}


def pointing_game(
    model: WholeModel,
    files: Sequence[Path],
    boxes: Sequence[Mapping[str, NDArray[np.float64]]],
    progress: Progress = silent,
) -> tuple[dict[str, Any], dict[int, str]]:
    """Return how often a head's attention for a class peaks on an object of the class.

    A label is an image and a class that has boxes there. It is a hit if the centre of the highest
    cell of the class's map is inside one of them. Large objects are easy to hit, and photographers
    aim: so beside it stand the share of a cell drawn at random and that of the photo's centre.

    Args:
        model: see ``attention_maps``.
        files: N images.
        boxes: of each image, by class; see ``datasets.boxes``. Classes that the run has not are
            left out.
        progress: told after each batch.

    Returns:
        ``pointing``, ``random`` and ``centre``, all in per cent of the ``labels``; ``class_mean``
        has their means over classes, ``per_class`` those of each class with its ``labels``;
        ``over_centre`` is the 95 % interval of pointing minus centre, labels of an image going
        together, None of one image; ``images``; ``grid``. And the reason of each bad image by its
        index.

    Raises:
        MlcError: see ``attention_maps``; no class of the run has a box in a readable image.

    Reference: Zhang et al., ECCV 2016, https://arxiv.org/abs/1608.00507, who count a peak within
    15 pixels of an object as a hit too, and take means over classes.
    """
    view = VIEWS[model.backbone.key.views[0]]
    column = {name: index for index, name in enumerate(model.run.classes)}
    labels: list[Label] = []
    bad: dict[int, str] = {}
    grid = (0, 0)
    for batch in attention_maps(model, files, progress):
        grid = batch.maps.shape[-2:]
        centres = cell_centres(grid, view)
        for row, maps, error in zip(batch.rows, batch.maps, batch.error, strict=True):
            if error:
                bad[row] = str(error)
                continue
            labels += [
                (row, name, *_throws(maps[column[name]], each, centres))
                for name, each in boxes[row].items()
                if name in column
            ]
    if not labels:
        raise MlcError(
            f"{model.run.path}: no class of the run has a box in any of {len(files)} images, "
            f"{len(bad)} of them bad; pass annotations of its classes"
        )
    return _shares(labels) | {"grid": list(grid)}, bad


def _throws(
    map_: NDArray[np.float32], boxes: NDArray[np.float64], centres: Points
) -> tuple[bool, float, bool]:
    """Return whether the peak hits, the share of cells that do, and whether the centre does."""
    inside = are_inside(centres, boxes)
    return bool(inside[peak_of(map_)]), float(inside.mean()), bool(are_inside(CENTRE, boxes))


def _shares(labels: Sequence[Label]) -> dict[str, Any]:
    images = np.unique([row for row, *_ in labels], return_inverse=True)[1]
    names = np.array([name for _, name, *_ in labels])
    throws = 100 * np.array([each for _, _, *each in labels], dtype=np.float64)
    per_class = {
        str(name): {"labels": int((names == name).sum())} | _named(throws[names == name].mean(0))
        for name in np.unique(names)
    }
    kinds = list(_named(throws[0]))
    means = [[each[kind] for kind in kinds] for each in per_class.values()]
    return _named(throws.mean(axis=0)) | {
        "labels": len(labels),
        "images": int(images.max()) + 1,
        "over_centre": _interval(throws[:, 0] - throws[:, 2], images),
        "class_mean": _named(np.mean(means, axis=0)),
        "per_class": per_class,
    }


def _interval(values: NDArray[np.float64], images: NDArray[np.intp]) -> tuple[float, float] | None:
    """Return the normal 95 % interval of the mean of (n,) values, which go together by image.

    A ratio of sums over images: Cochran, Sampling Techniques, 1977, section 6.
    """
    count, mean = int(images.max()) + 1, float(values.mean())
    if count == 1:
        return None
    rest = np.bincount(images, values - mean)
    half = 1.96 * float(np.sqrt(count / (count - 1) * (rest**2).sum())) / len(values)
    return mean - half, mean + half


def _named(shares: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(("pointing", "random", "centre"), shares.tolist(), strict=True))


def _attention_of(model: WholeModel) -> Callable[[torch.Tensor], torch.Tensor]:
    attend = getattr(model.head, "attention", None)
    if attend is None:
        raise MlcError(
            f"{model.run.path}: head {model.run.config.head} looks at no part of a photo in "
            "particular; pass a run of a head with attention, as attention-pool or q2l"
        )
    layer = model.backbone.key.layers[0]
    if layer not in model.backbone.grids:
        raise MlcError(f"{model.run.path}: the tokens of layer {layer} form no grid of (H, W)")
    checked: Callable[[torch.Tensor], torch.Tensor] = attend
    return checked
