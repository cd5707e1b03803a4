"""COCO 2014 with image-level labels, row for row as the MLSPL authors' code makes them."""

from pathlib import Path

import numpy as np

from mlc.configs.errors import MlcError
from mlc.datasets.coco_json import read_part
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
    parts = [read_part(root / "annotations" / f"instances_{name}.json") for name in PARTS]
    if parts[0].classes != parts[1].classes:
        raise MlcError(f"{root}: instances_train2014 and instances_val2014 have other categories")
    both = np.intersect1d(parts[0].image_id, parts[1].image_id)
    if len(both):
        raise MlcError(f"{root}: image id {str(both[0])!r} is there twice, in train and val")
    image_id = np.concatenate([part.image_id for part in parts])
    file = np.concatenate(
        [np.char.add(f"{name}/", part.file) for name, part in zip(PARTS, parts, strict=True)]
    )
    true = np.concatenate([part.true for part in parts])
    split = np.repeat(list(PARTS.values()), [len(part.image_id) for part in parts])
    table = LabelTable(
        image_id=image_id,
        file=file,
        classes=parts[0].classes,
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
