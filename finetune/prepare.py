"""PreparedImages: the images of each split, with the labels that a protocol shows of them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mlc.configs.errors import MlcError
from mlc.datasets.labels import LabelTable, select_classes
from mlc.datasets.source import DataConfig, read_images
from mlc.finetune.config import FinetuneConfig
from mlc.heads.fit import shown_labels
from mlc.heads.inputs import Split
from mlc.heads.training_labels import check_labels
from mlc.heads.written import Prepared


@dataclass(frozen=True)
class PreparedImages:
    """Images and labels.

    Attributes:
        prepared: as heads on features have it, but for the features.
        files: of each split's images, (n,).
        splits: the names of those that are different.
    """

    prepared: Prepared
    files: Mapping[str, list[Path]]
    splits: tuple[str, ...]

    def without(self, bad: Mapping[str, Collection[int]]) -> Prepared:
        """Return what is left without the bad images of each split, by their rows.

        Raises:
            MlcError: nothing is left of a split.
        """
        kept = {}
        for name, split in self.prepared.splits.items():
            good = np.ones(len(split.image_id), dtype=np.bool_)
            good[list(bad.get(name, ()))] = False
            if not good.any():
                raise MlcError(
                    f"{self.files[name][0].parent}: none of the {len(good):,} images of split "
                    f"{name!r} can be read; pass their folder as --root"
                )
            kept[name] = replace(
                split,
                image_id=split.image_id[good],
                features=split.features[torch.from_numpy(good)],
                observed=split.observed[torch.from_numpy(good).to(split.observed.device)],
                true=split.true[good],
            )
        return replace(self.prepared, splits=kept)


def prepare_images(config: FinetuneConfig, device: torch.device) -> PreparedImages:
    """Read the images and labels that a config names, and apply its protocol.

    Args:
        config: checked.
        device: of the labels.

    Raises:
        MlcError: the data set is not there, see ``read_images``; the labels are none that the loss
            can learn from; or a batch is larger than the training split.
    """
    images = read_images(DataConfig(**config.model_dump(include=set(DataConfig.model_fields))))
    images.check_files()
    table = images.labels
    if config.classes is not None:
        table = select_classes(table, config.classes)
    shown, names = shown_labels(config, table)
    splits = {name: _split(shown.part(name), device) for name in names}
    check_labels(config.loss, splits["train"].observed.cpu().numpy())
    files = {name: [images.root / str(file) for file in shown.part(name).file] for name in names}
    splits.setdefault("val", splits["test"])
    files.setdefault("val", files["test"])
    return PreparedImages(Prepared(table.digest(), shown, splits), files, names)


def _split(part: LabelTable, device: torch.device) -> Split:
    return Split(
        image_id=part.image_id,
        features=torch.zeros(len(part), 0),
        observed=torch.from_numpy(part.observed).to(device),
        true=part.targets(),
    )
