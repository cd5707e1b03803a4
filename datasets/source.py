"""Which data set a command means: a name of DATASETS, or the path of a CSV or a COCO JSON."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mlc.configs import Config
from mlc.configs.errors import MlcError, nearest
from mlc.datasets.coco import read_coco
from mlc.datasets.coco_json import read_coco_json
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
        data: a key of DATASETS, or the path of a CSV of ``file,labels``, or of a JSON in COCO's
            format; ``train.json,test.json`` and ``train.json,val.json,test.json`` are the splits.
        root: the folder of the images; by default ``data/NAME`` (or ``$MLC_DATA/NAME``), the
            folder of the CSV, and what ``read_coco_json`` finds at the JSON.
        keep_unlabelled: COCO, VOC, JSON: keep the images without annotations, as Query2Label does.
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
    paths = data_files(config.data)
    suffixes = [path.suffix.lower() for path in paths]
    if set(suffixes) == {".json"}:
        return read_coco_json(paths, config.root, config.keep_unlabelled)
    if suffixes == [".csv"]:
        return read_csv(paths[0], config.root or paths[0].parent, config.unlisted)
    raise MlcError(
        f"unknown data set {config.data!r}; {nearest(config.data, DATASETS)}, "
        "or give the path of a .csv or .json"
    )


def data_files(data: str) -> list[Path]:
    """Return the files that ``--data`` names where it is no key of DATASETS.

    >>> [path.name for path in data_files("a,b/train.json,test.json")]
    ['train.json', 'test.json']
    """
    parts = re.split(r"(?<=\.json),", data, flags=re.IGNORECASE)  # a folder may have a comma
    return [Path(part.strip()) for part in parts]


def absolute_data(data: str) -> str:
    """Return a ``--data`` that names the same data set from any folder."""
    if data in DATASETS:
        return data
    return ",".join(str(path.resolve()) for path in data_files(data))


def default_root(data: str) -> Path:
    """Return where a data set of DATASETS is looked for if no root is given."""
    return Path(os.environ.get("MLC_DATA", "data")) / data
