"""PASCAL VOC 2012 with image-level labels, row for row as the MLSPL authors' code makes them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import LabelTable, full_labels

PARTS = {"train": "train", "val": "test"}
PLACES = (".", "VOC2012", "VOCdevkit/VOC2012")  # below the root; the first that is there
LISTS, PHOTOS = "ImageSets/Main", "JPEGImages"
FLAGS = {"1": True, "0": False, "-1": False}  # 0: there, but difficult
EXPECTED_POSITIVES = 1.5  # the authors' constant for VOC
SHOWN = 3
HOW_TO_GET = (
    "download VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ "
    "and unpack it there, or pass --root DIR"
)
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


def read_voc(root: Path, keep_unlabelled: bool = False) -> ImageSet:
    """Read ``ImageSets/Main/{class}_{train,val}.txt`` and name the photos of ``JPEGImages``.

    The 20 classes are in the order of the alphabet. A class is positive where its flag is 1; a
    class whose objects are all difficult (flag 0) counts as absent. Rows: the 5,717 images of
    train (split "train"), then the 5,823 of val (split "test"), each sorted by file name. Ids are
    VOC's own, e.g. "2007_000027". Source: ``preproc/format_pascal.py`` of the MLSPL release (Cole
    et al., 2021), which lists the images that have a positive.

    Args:
        root: the folder that holds ``ImageSets`` and ``JPEGImages``, or the one of ``VOCdevkit``,
            or ``VOCdevkit`` itself.
        keep_unlabelled: keep images without a positive in the label table.

    Returns:
        All listed images, and the labels of those that the switch keeps.

    Raises:
        MlcError: something is missing, is not VOC, or contradicts itself.
    """
    folder = _find(root)
    parts = [_read_part(folder, part) for part in PARTS]
    image_id = np.concatenate([ids for ids, _ in parts])
    both = np.intersect1d(parts[0][0], parts[1][0])
    if len(both):
        raise MlcError(f"{folder}: image {str(both[0])!r} is there twice, in train and val")
    true = np.concatenate([labels for _, labels in parts])
    file = np.array([f"{PHOTOS}/{_photo(each)}" for each in image_id.tolist()])
    table = LabelTable(
        image_id=image_id,
        file=file,
        classes=CLASSES,
        observed=full_labels(true),
        true=true,
        split=np.repeat(list(PARTS.values()), [len(ids) for ids, _ in parts]),
        dataset="voc",
        expected_positives=EXPECTED_POSITIVES,
    )
    labels = table if keep_unlabelled else table.rows(np.asarray(true.any(axis=1)))
    return ImageSet(root=folder, image_id=image_id, file=file, labels=labels)


def _find(root: Path) -> Path:
    """Return the folder of ``ImageSets`` and ``JPEGImages``, all lists being there."""
    places = [root / place for place in PLACES]
    folder = next((each for each in places if (each / LISTS).is_dir()), None)
    if folder is None:
        raise MlcError(
            f"{root}: no {LISTS} there, nor in {' or '.join(PLACES[1:])} below it; {HOW_TO_GET}"
        )
    lists = [f"{LISTS}/{name}_{part}.txt" for part in PARTS for name in CLASSES]
    missing = [name for name in (PHOTOS, *lists) if not (folder / name).exists()]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise MlcError(f"{folder}: no {', '.join(missing[:SHOWN])}{more} there; {HOW_TO_GET}")
    return folder


def _read_part(folder: Path, part: str) -> tuple[NDArray[np.str_], NDArray[np.bool_]]:
    """Return a part's ids (N,), sorted by file name, and labels (N, 20)."""
    paths = [folder / LISTS / f"{name}_{part}.txt" for name in CLASSES]
    columns = [_read_flags(path) for path in paths]
    for path, column in zip(paths, columns, strict=True):
        other = column.keys() ^ columns[0].keys()
        if other:
            raise MlcError(
                f"{path}: lists other images than {paths[0].name}, {min(other)!r} is in one of "
                f"them; {HOW_TO_GET}"
            )
    ids = sorted(columns[0], key=_photo)
    labels = np.array([[column[each] for column in columns] for each in ids], dtype=np.bool_)
    return np.array(ids), labels


def _read_flags(path: Path) -> dict[str, bool]:
    """Return for each image id whether the class of this file is positive."""
    flags: dict[str, bool] = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        image_id, *flag = line.split() or [""]
        if not image_id:
            continue
        if len(flag) != 1 or flag[0] not in FLAGS:
            raise MlcError(f"{path}:{number}: expected an image and 1, 0 or -1, got {line!r}")
        if image_id in flags:
            raise MlcError(f"{path}:{number}: image {image_id!r} is there twice")
        flags[image_id] = FLAGS[flag[0]]
    if not flags:
        raise MlcError(f"{path}: lists no images; {HOW_TO_GET}")
    return flags


def _photo(image_id: str) -> str:
    return f"{image_id}.jpg"
