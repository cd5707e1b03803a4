"""Which data set a command means: a name of DATASETS, or the path of a CSV."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mlc.configs import Config
from mlc.configs.errors import MlcError, nearest
from mlc.datasets.coco import read_coco
from mlc.datasets.csv_file import Unlisted, read_csv
from mlc.datasets.digits import read_digits
from mlc.datasets.formatted import read_formatted
from mlc.datasets.images import ImageSet
from mlc.datasets.voc import read_voc

# A reader takes the root folder and ``keep_unlabelled``; to add a data set, add its line here.
# The formatted ones, NUS-WIDE and CUB are the MLSPL authors' ``formatted_*.npy``.
DATASETS: dict[str, Callable[[Path, bool], ImageSet]] = {
    "coco": read_coco,
    "coco-formatted": partial(read_formatted, "coco"),
    "cub": partial(read_formatted, "cub"),
    "digits": read_digits,
    "nuswide": partial(read_formatted, "nuswide"),
    "voc": read_voc,
    "voc-formatted": partial(read_formatted, "voc"),
}


class DataConfig(Config):
    """Where images and labels come from.

    Attributes:
        data: a key of DATASETS, or the path of a CSV of ``file,labels``.
        root: the folder of the images; by default ``data/NAME`` (or ``$MLC_DATA/NAME``), and the
            folder of the CSV.
        keep_unlabelled: COCO, VOC: keep the images without annotations, as Query2Label does.
        unlisted: CSV: what a class is that a row does not list.
    """

    data: str = "coco"
    root: Path | None = None
    keep_unlabelled: bool = False
    unlisted: Unlisted = "absent"


def read_images(config: DataConfig) -> ImageSet:
    """Read the images and labels that a config names.

    Raises:
        MlcError: the data set is unknown or not there; the sentence says how to get it.
    """
    if config.data in DATASETS:
        root = config.root or default_root(config.data)
        return DATASETS[config.data](root, config.keep_unlabelled)
    path = Path(config.data)
    if path.suffix.lower() != ".csv":
        raise MlcError(
            f"unknown data set {config.data!r}; {nearest(config.data, DATASETS)}, "
            "or give the path of a .csv"
        )
    return read_csv(path, config.root or path.parent, config.unlisted)


def default_root(data: str) -> Path:
    """Return where a data set of DATASETS is looked for if no root is given."""
    return Path(os.environ.get("MLC_DATA", "data")) / data
