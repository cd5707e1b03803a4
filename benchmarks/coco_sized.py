"""Made-up features of COCO's size, which cost what real ones cost, with real labels if given."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IMAGES = {"train": 65_665, "val": 16_416, "test": 40_137}
WIDTH, CLASSES, POSITIVES = 2048, 80, 2.9
SHOWN = {"bce": "full", "bce_ls": "full", "iun": "iun", "iu": "iu"}  # others: single positives


@dataclass(frozen=True)
class Data:
    """Features and labels; by split, the observed labels of train by what a loss sees.

    Attributes:
        features: (n, D) float32, on the device.
        true: (n, L) bool, on the CPU.
        observed: (n, L) int8 of +1, 0, -1, by the values of SHOWN and "single", on the device.
    """

    features: dict[str, Tensor]
    true: dict[str, Tensor]
    observed: dict[str, Tensor]

    @property
    def images(self) -> dict[str, int]:
        """Images of each split."""
        return {name: len(each) for name, each in self.true.items()}

    def shown(self, loss: str) -> Tensor:
        """Return the observed labels that a loss is trained on."""
        return self.observed[SHOWN.get(loss, "single")]


def make_data(labels: Path | None, scale: float, device: str) -> Data:
    """Make a data set of COCO's size times ``scale``.

    Args:
        labels: an npz whose ``labels`` are packed bits of (n, 80); None makes labels up.
        scale: share of the images.
        device: of the features and observed labels.
    """
    images = {name: round(scale * count) for name, count in IMAGES.items()}
    known = None
    if labels is not None:
        known = torch.from_numpy(np.unpackbits(np.load(labels)["labels"], axis=1)[:, :CLASSES] == 1)
        known = known[torch.randperm(len(known))]
        trained = known[: images["train"] + images["val"]].split(list(images.values())[:2])
        true = dict(zip(images, (*trained, known[torch.randperm(len(known))]), strict=True))
        true["test"] = true["test"][: images["test"]]
    else:
        true = {name: _random_labels(count) for name, count in images.items()}
    features = {name: torch.rand(count, WIDTH).to(device) for name, count in images.items()}
    observed = {name: each.to(device) for name, each in _observed(true["train"]).items()}
    return Data(features, true, observed)


def _random_labels(count: int) -> Tensor:
    true = torch.rand(count, CLASSES) < (POSITIVES - 1) / (CLASSES - 1)
    true[torch.arange(count), torch.randint(CLASSES, (count,))] = True
    return true


def _observed(true: Tensor) -> dict[str, Tensor]:
    """Return what each loss is shown, (n, L) int8; every image has a positive and a negative."""
    rows = torch.arange(len(true))
    positive = (torch.rand(true.shape) * true).argmax(1)
    negative = (torch.rand(true.shape) * ~true).argmax(1)
    single = torch.zeros(true.shape, dtype=torch.int8)
    single[rows, positive] = 1
    one_of_each = single.clone()
    one_of_each[rows, negative] = -1
    return {
        "full": torch.where(true, 1, -1).to(torch.int8),
        "single": single,
        "iun": torch.where(true, single, -1),
        "iu": one_of_each,
    }
