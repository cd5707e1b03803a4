"""Boxes: where in an image the objects of a class are, from annotations in COCO's format."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.datasets.coco import PARTS
from mlc.datasets.coco_json import SPLITS_OF
from mlc.datasets.labels import LabelTable
from mlc.datasets.source import DATASETS, DataConfig, data_files, default_root, read_images

# By image id and class: (n, 4) left, upper, right, lower, as shares of the image's width and
# height, from 0 to 1. Of an image's classes only those are there whose every object has a box.
Boxes = Mapping[str, Mapping[str, NDArray[np.float64]]]


def boxes_of(config: DataConfig, *, crowds: bool = False) -> Boxes:
    """Return the boxes of a data set, by the image ids that ``read_images`` gives.

    Args:
        config: of the data set.
        crowds: see ``read_boxes``.

    Raises:
        MlcError: it is neither COCO nor a COCO-format JSON, no annotation has a box, or see
            ``read_boxes``.
    """
    paths = _annotation_files(config)
    parts = [read_boxes(path, crowds=crowds) for path in paths]
    if not any(each for part in parts for each in part.values()):
        raise MlcError(
            f"{paths[0]}: no annotation has a box, only labels; pass the annotations with bbox"
        )
    ids = [image_id for part in parts for image_id in part]
    if len(set(ids)) < len(ids):  # as in read_coco_json
        parts = [
            {f"{split}/{image_id}": each for image_id, each in part.items()}
            for split, part in zip(SPLITS_OF[len(paths)], parts, strict=True)
        ]
    return {image_id: each for part in parts for image_id, each in part.items()}


def boxes_below(config: DataConfig, folder: Path) -> Boxes:
    """Return the boxes of a data set's images below a folder, by their path relative to it.

    Raises:
        MlcError: see ``read_images`` and ``boxes_of``.
    """
    images, boxes, base = read_images(config), boxes_of(config), folder.resolve()
    places = {
        str(image_id): (images.root / str(file)).resolve()
        for image_id, file in zip(images.image_id, images.file, strict=True)
    }
    return {
        place.relative_to(base).as_posix(): boxes[image_id]
        for image_id, place in places.items()
        if place.is_relative_to(base)
    }


def label_areas(config: DataConfig, table: LabelTable) -> NDArray[np.float64]:
    """Return the area (N, L) of a class in an image: that of its boxes together, crowds too.

    It is a share of the image, and above 1 where boxes lie on each other. 0 for a class that is
    not there.

    Raises:
        MlcError: a positive has no box, or see ``boxes_of``.
    """
    boxes, areas = boxes_of(config, crowds=True), np.zeros(table.observed.shape)
    positive = table.observed == 1 if table.true is None else table.true
    for row, column in np.argwhere(positive):
        image_id, name = str(table.image_id[row]), table.classes[column]
        if name not in boxes[image_id]:
            raise MlcError(
                f"data: image {image_id!r} has a {name!r} without a box, so its size is not known; "
                "pass annotations with a bbox for each object"
            )
        left, upper, right, lower = boxes[image_id][name].T
        areas[row, column] = ((right - left) * (lower - upper)).sum()
    return areas


def read_boxes(path: Path, *, crowds: bool = False) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Read the boxes of one JSON, for every image that it lists.

    A crowd's box is around many objects and what is between them, so that a point in it need not
    be on any. Of an image that has a crowd of a class, or an object without a box, nobody can say
    of every point whether it is on the class: that class is left out there, not its crowd alone,
    which would count points on the crowd as misses.

    Args:
        path: of the JSON.
        crowds: take a crowd's box for one of an object.

    Returns:
        By image id as text and by class, (n, 4) float64; see ``Boxes``. What reaches out of the
        image is cut off.

    Raises:
        MlcError: there is no such file, it is not COCO's format, or a box is no box.
    """
    found: dict[tuple[str, str], list[list[float]]] = {}
    unknown: set[tuple[str, str]] = set()
    try:
        content = json.loads(path.read_bytes())
        classes = {each["id"]: str(each["name"]) for each in content["categories"]}
        images = {str(each["id"]): each for each in content["images"]}
        for annotation in content["annotations"]:
            label = (str(annotation["image_id"]), classes[annotation["category_id"]])
            if (annotation.get("iscrowd") and not crowds) or not annotation.get("bbox"):
                unknown.add(label)
            else:
                box = _relative(path, annotation, images[label[0]])
                found.setdefault(label, []).append(box)
    except OSError as error:
        raise MlcError(f"{path}: cannot be read ({error.strerror}); name a COCO JSON") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MlcError(f"{path}: not COCO annotations ({error!r}); export it again") from None
    boxes: dict[str, dict[str, NDArray[np.float64]]] = {image_id: {} for image_id in images}
    for (image_id, name), own in found.items():
        if (image_id, name) not in unknown:
            boxes[image_id][name] = np.array(own)
    return boxes


def _relative(path: Path, annotation: Mapping[str, Any], image: Mapping[str, Any]) -> list[float]:
    """Return COCO's (x, y, width, height) in pixels as shares of the image's sides."""
    x, y, width, height = annotation["bbox"]
    sides = image.get("width"), image.get("height")
    numbers = [x, y, width, height, *(side or 0 for side in sides)]
    if not all(map(math.isfinite, numbers)) or min(width, height) < 0 or min(numbers[4:]) <= 0:
        raise MlcError(
            f"{path}: annotation {annotation.get('id')} has bbox {annotation['bbox']} in an image "
            f"of width and height {sides}; expected pixels, x, y, width, height"
        )
    edges = (x, y, x + width, y + height)
    return [
        min(max(edge / side, 0.0), 1.0) for edge, side in zip(edges, numbers[4:] * 2, strict=True)
    ]


def _annotation_files(config: DataConfig) -> Sequence[Path]:
    if config.data == "coco":
        root = config.root or default_root(config.data)
        return [root / "annotations" / f"instances_{part}.json" for part in PARTS]
    paths = [] if config.data in DATASETS else data_files(config.data)
    if not paths or {path.suffix.lower() for path in paths} != {".json"}:
        raise MlcError(
            f"data: boxes are read of coco and of COCO-format JSON, got {config.data!r}; "
            "pass one of these"
        )
    return paths
