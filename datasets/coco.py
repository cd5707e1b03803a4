"""COCO 2014 with image-level labels, row for row as the MLSPL authors' code makes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import LabelTable, full_labels

PARTS = {"train2014": "train", "val2014": "test"}
EXPECTED_POSITIVES = 2.9  # the authors' constant for COCO
HOW_TO_GET = (
    "download train2014.zip, val2014.zip and annotations_trainval2014.zip from "
    "https://cocodataset.org/#download and unpack them there, or pass --root DIR"
)


def read_coco(root: Path, keep_unlabelled: bool = False) -> ImageSet:
    """Read ``{train2014,val2014,annotations/instances_{train,val}2014.json}``.

    Classes are in the order of the JSON's categories. Every annotation counts, crowds and tiny
    boxes too. Rows: train2014 (split "train"), then val2014 (split "test"), each with its ids
    sorted as text. Source: ``preproc/format_coco.py`` of the MLSPL release (Cole et al., 2021),
    whose label matrix of 82,081 + 40,137 rows leaves images without annotations out.

    Args:
        root: the folder of the layout above.
        keep_unlabelled: keep the images without annotations in the label table, all of their
            labels negative: the 82,783 + 40,504 images of Query2Label.

    Returns:
        All listed images, and the labels of those that the switch keeps.

    Raises:
        MlcError: something is missing, is not COCO, or contradicts itself.
    """
    _check_layout(root)
    parts = [_read_part(root, name) for name in PARTS]
    if parts[0][1] != parts[1][1]:
        raise MlcError(f"{root}: instances_train2014 and instances_val2014 have other categories")
    both = np.intersect1d(parts[0][0], parts[1][0])
    if len(both):
        raise MlcError(f"{root}: image id {str(both[0])!r} is there twice, in train and val")
    image_id = np.concatenate([ids for ids, *_ in parts])
    file = np.concatenate([files for *_, files, _ in parts])
    true = np.concatenate([labels for *_, labels in parts])
    split = np.repeat(list(PARTS.values()), [len(ids) for ids, *_ in parts])
    table = LabelTable(
        image_id=image_id,
        file=file,
        classes=parts[0][1],
        observed=full_labels(true),
        true=true,
        split=split,
        dataset="coco",
        expected_positives=EXPECTED_POSITIVES,
    )
    labels = table if keep_unlabelled else table.rows(np.asarray(true.any(axis=1)))
    return ImageSet(root=root, image_id=image_id, file=file, labels=labels)


def _check_layout(root: Path) -> None:
    wanted = [*PARTS, *(f"annotations/instances_{part}.json" for part in PARTS)]
    missing = [name for name in wanted if not (root / name).exists()]
    if missing:
        raise MlcError(f"{root}: no {', '.join(missing)} there; {HOW_TO_GET}")


def _read_part(
    root: Path, part: str
) -> tuple[NDArray[np.str_], tuple[str, ...], NDArray[np.str_], NDArray[np.bool_]]:
    """Return a part's ids (N,), class names, files (N,) and labels (N, L), ids sorted as text."""
    path = root / "annotations" / f"instances_{part}.json"
    images, annotations, categories = _parse(path)
    names = {str(image["id"]): f"{part}/{image['file_name']}" for image in images}
    if len(names) != len(images):
        raise MlcError(f"{path}: image id {_first_repeat(images)} is there twice")
    if not names or not annotations:
        raise MlcError(f"{path}: lists no {'annotations' if names else 'images'}")
    ids = sorted(names)
    row = {image_id: index for index, image_id in enumerate(ids)}
    column = {category["id"]: index for index, category in enumerate(categories)}
    if len(column) != len(categories):
        raise MlcError(f"{path}: a category id is there twice")
    labels = np.zeros((len(ids), len(categories)), dtype=np.bool_)
    for annotation in annotations:
        try:
            labels[row[str(annotation["image_id"])], column[annotation["category_id"]]] = True
        except KeyError as error:
            raise MlcError(
                f"{path}: annotation {annotation.get('id')} names image or category "
                f"{error.args[0]!r}, which the file does not list"
            ) from None
    classes = tuple(str(category["name"]) for category in categories)
    return np.array(ids), classes, np.array([names[each] for each in ids]), labels


def _parse(path: Path) -> tuple[list[Any], list[Any], list[Any]]:
    try:
        content = json.loads(path.read_bytes())
        images, annotations = content["images"], content["annotations"]
        categories = content["categories"]
        for entries in (images, annotations, categories):
            if not isinstance(entries, list):
                raise TypeError(f"a list, where {type(entries).__name__} is,")
        for entries, keys in (
            (images, ("id", "file_name")),
            (annotations, ("image_id", "category_id")),
            (categories, ("id", "name")),
        ):
            for entry in entries:
                for key in keys:
                    hash(entry[key])
    except ValueError as error:
        raise MlcError(f"{path}: not JSON ({error}); unpack COCO's annotations again") from None
    except (KeyError, TypeError, IndexError) as error:
        raise MlcError(
            f"{path}: not COCO annotations, {error} is missing or of another kind; "
            "expected lists of images, annotations and categories"
        ) from None
    return images, annotations, categories


def _first_repeat(images: list[Any]) -> str:
    seen: set[str] = set()
    for image in images:
        if str(image["id"]) in seen:
            break
        seen.add(str(image["id"]))
    return repr(image["id"])
