"""prepare(): annotations -> a label table as training would see it."""

from pathlib import Path

from mlc.datasets.boxes import label_areas
from mlc.datasets.images import ImageSet
from mlc.datasets.labels import LabelTable, save_labels
from mlc.datasets.protocol import LABEL_SHARE, NEGATIVES, OFFICIAL_SEED, Labels, apply_protocol
from mlc.datasets.source import DataConfig, read_images


class PrepareConfig(DataConfig):
    """What to show or write.

    Attributes:
        labels: what training would see.
        split_seed: of the validation split.
        corruption_seed: of the choice of single positives.
        label_share: see ``apply_protocol``.
        negatives: likewise.
        out: write the table to this ``.npz``; by default nothing is written.
    """

    labels: Labels = "full"
    split_seed: int = OFFICIAL_SEED
    corruption_seed: int = OFFICIAL_SEED
    label_share: float = LABEL_SHARE
    negatives: int = NEGATIVES
    out: Path | None = None


def prepare(config: PrepareConfig) -> tuple[ImageSet, LabelTable]:
    """Read a data set, apply a protocol, and write the table if a file is named.

    Raises:
        MlcError: see ``read_images``, ``apply_protocol`` and ``label_areas``.
    """
    images = read_images(config)
    by_size = config.labels == "single-positive-by-size"
    table = apply_protocol(
        images.labels,
        config.labels,
        split_seed=config.split_seed,
        corruption_seed=config.corruption_seed,
        label_share=config.label_share,
        negatives=config.negatives,
        areas=label_areas(config, images.labels) if by_size else None,
    )
    if config.out is not None:
        save_labels(table, config.out)
    return images, table
