"""The MLSPL authors' ``formatted_*.npy``: labels and image names of their four data sets.

The only form in which their NUS-WIDE is published; CUB, COCO and VOC come in the same form.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.datasets import coco, voc
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import LabelTable, full_labels

PARTS = {"train": "train", "val": "test"}
HOW_TO_GET = (
    "get the authors' files from https://zenodo.org/records/10162606, or make them with the "
    "preproc scripts of their release, or pass --root DIR"
)
COCO_NAME = re.compile(r"COCO_(?:train|val)2014_(\d{12})\.jpg")


@dataclass(frozen=True)
class KnownSet:
    """What the files of a data set do not say.

    Attributes:
        classes: number of columns L.
        expected_positives: the authors' constant k.
        image_id: makes the id of an image from its name in the file.
        photos: folders of the photos in the authors' layout; the first that is there counts.
        class_names: L names in the order of the columns, where they are known.
        name_files: files that list the names, the last word of each line; the first that is
            there counts.
    """

    classes: int
    expected_positives: float
    image_id: Callable[[str], str] = str
    photos: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    name_files: tuple[str, ...] = ()


def read_formatted(dataset: str, root: Path, keep_unlabelled: bool = False) -> ImageSet:
    """Read ``formatted_{train,val}_{labels,images}.npy``, row for row.

    The train files are split "train", the val files split "test". Labels are 0 and 1, (N, L) of
    any number type; images are text, the path of each photo in the data set's folder of photos.
    All rows stay, also the 22 % of NUS-WIDE's that have no label, as in the paper. Ids: COCO's
    number ("9" for ``train2014/COCO_train2014_000000000009.jpg``) and VOC's name ("2007_000027"),
    so that rows join to stores of these photos; otherwise the path.

    Where ``formatted_{train,val}_labels_obs.npy`` (+1 positive, 0 unknown, -1 negative) lie beside
    them, they are the table's observed labels: what ``--labels as-given`` trains on.
    ``single-positive`` draws its own from the truth, which with the default corruption seed are
    those of the authors' file, bit for bit; ``full`` shows the truth.

    The files hold no class names. Those of COCO and VOC are known. For NUS-WIDE they are read
    from ``Concepts81.txt``, for CUB from ``attributes.txt``, if that is in the folder; else they
    are "class 0", "class 1" and so on. The order of CUB's columns is that of the attributes'
    numbers; for NUS-WIDE the authors do not state one, so to put ``Concepts81.txt`` there is to
    say that its order is the columns'.

    Source: ``preproc/format_*.py`` and ``datasets.py`` of the MLSPL release (Cole et al., 2021).

    Args:
        dataset: a key of FORMATTED.
        root: the folder of the files.
        keep_unlabelled: no influence: all rows of the files stay.

    Raises:
        MlcError: a file is missing, is not such a file, or contradicts another one.
    """
    known = FORMATTED[dataset]
    _check_layout(root)
    classes = _class_names(root, known)
    true = [_read_labels(root, part, classes) for part in PARTS]
    name = [_read_names(root, part, len(labels)) for part, labels in zip(PARTS, true, strict=True)]
    observed = _read_observed(root, true, classes)
    labels = LabelTable(
        image_id=_image_ids(root, name, known),
        file=np.concatenate(name),
        classes=classes,
        observed=np.concatenate(observed or [full_labels(each) for each in true]),
        true=np.concatenate(true),
        split=np.repeat(list(PARTS.values()), [len(each) for each in true]),
        dataset=dataset,
        expected_positives=known.expected_positives,
    )
    photos = next((root / each for each in known.photos if (root / each).is_dir()), root)
    return ImageSet(root=photos, image_id=labels.image_id, file=labels.file, labels=labels)


def load_array(path: Path, *, mapped: bool = False) -> NDArray[Any]:
    """Load an ``.npy`` file of numbers or text; a pickled one is not opened.

    Args:
        path: the file.
        mapped: leave the values on the disk until they are used.

    Raises:
        MlcError: it is not a whole ``.npy`` file.
    """
    try:
        if mapped:
            return npy.open_memmap(path, mode="r")
        with path.open("rb") as file:
            return npy.read_array(file, allow_pickle=False)
    except ValueError as error:
        reason = str(error).split("\n")[0]
        raise MlcError(
            f"{path}: not an .npy file of numbers or text ({reason}); {HOW_TO_GET}"
        ) from None


def _check_layout(root: Path) -> None:
    wanted = [_file(part, kind) for kind in ("labels", "images") for part in PARTS]
    missing = [name for name in wanted if not (root / name).is_file()]
    if missing:
        raise MlcError(f"{root}: no {', '.join(missing)} there; {HOW_TO_GET}")


def _file(part: str, kind: str) -> str:
    return f"formatted_{part}_{kind}.npy"


def _class_names(root: Path, known: KnownSet) -> tuple[str, ...]:
    if known.class_names:
        return known.class_names
    path = next((root / each for each in known.name_files if (root / each).is_file()), None)
    if path is None:
        return tuple(f"class {column}" for column in range(known.classes))
    lines = [line.split() for line in path.read_text(errors="replace").splitlines()]
    names = tuple(words[-1] for words in lines if words)
    if len(set(names)) != known.classes or len(names) != known.classes:
        raise MlcError(
            f"{path}: expected {known.classes} different class names, one a line, got "
            f"{len(names)} of which {len(set(names))} differ; mend it or move it away"
        )
    return names


def _read_labels(root: Path, part: str, classes: tuple[str, ...]) -> NDArray[np.bool_]:
    path = root / _file(part, "labels")
    values = _read_matrix(path, classes)
    _require_values(path, values, (0, 1), classes)
    return np.asarray(values == 1, dtype=np.bool_)


def _read_matrix(path: Path, classes: tuple[str, ...]) -> NDArray[Any]:
    """Return (N, L) numbers, N at least 1."""
    values = load_array(path)
    if values.dtype.kind not in "biuf" or values.ndim != 2 or not len(values):
        raise MlcError(
            f"{path}: expected a row of numbers for each image, got {values.dtype} of shape "
            f"{values.shape}; {HOW_TO_GET}"
        )
    if values.shape[1] != len(classes):
        raise MlcError(
            f"{path}: expected {len(classes)} classes, got {values.shape[1]} columns; "
            "check which data set --data names"
        )
    return values


def _require_values(
    path: Path, values: NDArray[Any], allowed: tuple[int, ...], classes: tuple[str, ...]
) -> None:
    wrong = np.argwhere(~np.isin(values, allowed))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise MlcError(
            f"{path}: expected {', '.join(map(str, allowed))}, got {values[row, column]} in row "
            f"{row}, class {classes[column]!r}; {HOW_TO_GET}"
        )


def _read_names(root: Path, part: str, rows: int) -> NDArray[np.str_]:
    """Return (N,) text."""
    path = root / _file(part, "images")
    names = load_array(path)
    if names.dtype.kind != "U" or names.ndim != 1:
        raise MlcError(
            f"{path}: expected a list of text, got {names.dtype} of shape {names.shape}; "
            f"{HOW_TO_GET}"
        )
    if len(names) != rows:
        raise MlcError(
            f"{path}: names {len(names):,} images, and {_file(part, 'labels')} has {rows:,} rows; "
            "take both from the same place"
        )
    return names


def _read_observed(
    root: Path, true: list[NDArray[np.bool_]], classes: tuple[str, ...]
) -> list[NDArray[np.int8]] | None:
    """Return (N, L) of +1, 0, -1 for each part, or None where the files are not there."""
    paths = [root / _file(part, "labels_obs") for part in PARTS]
    there = [path for path in paths if path.is_file()]
    if not there:
        return None
    if len(there) < len(paths):
        lacking = next(path for path in paths if path not in there)
        raise MlcError(f"{root}: {there[0].name} is there without {lacking.name}; add or remove it")
    observed = []
    for path, truth in zip(paths, true, strict=True):
        values = _read_matrix(path, classes)
        _require_values(path, values, (-1, 0, 1), classes)
        if len(values) != len(truth):
            raise MlcError(
                f"{path}: has {len(values):,} rows, and the labels {len(truth):,}; "
                "take both from the same place"
            )
        wrong = np.argwhere((values != 0) & ((values == 1) != truth))
        if len(wrong):
            row, column = wrong[0].tolist()
            raise MlcError(
                f"{path}: row {row}, class {classes[column]!r} is observed as "
                f"{int(values[row, column]):+d}, and the labels say otherwise; "
                "the rows of both files should be in the same order"
            )
        observed.append(values.astype(np.int8))
    return observed


def _image_ids(root: Path, names: list[NDArray[np.str_]], known: KnownSet) -> NDArray[np.str_]:
    """Return the ids of the images of all parts, each of which is there once."""
    first: dict[str, str] = {}
    for part, listed in zip(PARTS, names, strict=True):
        path = root / _file(part, "images")
        for name in listed.tolist():
            try:
                image_id = known.image_id(name)
            except ValueError as error:
                raise MlcError(f"{path}: {error}; check which data set --data names") from None
            if image_id in first:
                raise MlcError(
                    f"{path}: image id {image_id!r} is there twice, first in {first[image_id]}"
                )
            first[image_id] = path.name
    return np.array(list(first))


def _coco_id(name: str) -> str:
    match = COCO_NAME.fullmatch(PurePosixPath(name).name)
    if match is None:
        raise ValueError(
            f"expected names like train2014/COCO_train2014_000000000009.jpg, got {name!r}"
        )
    return str(int(match[1]))


def _voc_id(name: str) -> str:
    return PurePosixPath(name).stem


COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

FORMATTED = {
    "coco": KnownSet(
        classes=80,
        expected_positives=coco.EXPECTED_POSITIVES,
        image_id=_coco_id,
        class_names=COCO_CLASSES,
    ),
    "cub": KnownSet(
        classes=312,
        expected_positives=31.4,
        photos=("CUB_200_2011/CUB_200_2011/images", "CUB_200_2011/images", "images"),
        name_files=("attributes.txt", "CUB_200_2011/attributes.txt"),
    ),
    "nuswide": KnownSet(
        classes=81,
        expected_positives=1.9,
        photos=("Flickr", "images"),
        name_files=("Concepts81.txt", "ConceptsList/Concepts81.txt"),
    ),
    "voc": KnownSet(
        classes=20,
        expected_positives=voc.EXPECTED_POSITIVES,
        image_id=_voc_id,
        photos=tuple(f"{place}/{voc.PHOTOS}" for place in reversed(voc.PLACES)),
        class_names=voc.CLASSES,
    ),
}
