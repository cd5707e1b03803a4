"""StoreDataset: a store as a torch Dataset, for people's own training loops."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mlc.configs.errors import MlcError, choose
from mlc.datasets.labels import load_labels
from mlc.store import schema
from mlc.store.quantize import decode_numpy
from mlc.store.reader import FeatureStore, labels_path


class StoreDataset(Dataset[tuple[Tensor, Tensor]]):
    """Features and labels of one split of a store, for ``torch.utils.data.DataLoader``.

    It holds no open file: workers may be forked or spawned, and each reads what it is asked for.

        loader = DataLoader(StoreDataset(path, "train", kind="tokens"), 64, shuffle=True)

    Attributes:
        image_id: (n,) text.
        classes: L class names.
        labels: (n, L) int8, +1 observed positive, 0 unknown, -1 observed negative.
    """

    def __init__(
        self,
        path: Path,
        split: str = "train",
        *,
        layer: str | None = None,
        kind: str = schema.POOLED,
        view: int = 0,
        check: bool = True,
    ) -> None:
        """Open the good images of a split.

        Args:
            path: the store; its labels lie beside it.
            split: "train", "val" or "test", as the label table has it.
            layer: by default the store's first.
            kind: "pooled" or "tokens".
            view: index of the cached view.
            check: compare with the checksums.

        Raises:
            MlcError: see ``FeatureStore`` and ``load_labels``.
        """
        table = load_labels(labels_path(path))
        choose(dict.fromkeys(table.split.tolist()), split, "split")
        table = table.part(split)
        with FeatureStore(path) as store:
            self._array = store.features(layer, kind, check=check)
            if not 0 <= view < len(self._array.views):
                raise MlcError(
                    f"view: {path} has {len(self._array.views)} of each image "
                    f"({', '.join(self._array.views)}), got {view}; count from 0"
                )
            good = store.status == schema.OK
            row = dict(zip(store.image_id[good].tolist(), np.flatnonzero(good), strict=True))
        table = table.rows(np.isin(table.image_id, list(row)))
        self._rows = np.array([row[each] for each in table.image_id.tolist()], np.intp)
        self._view, self._check = view, check
        self.image_id: NDArray[np.str_] = table.image_id
        self.classes = table.classes
        self.labels = torch.from_numpy(table.observed)

    def __len__(self) -> int:
        """Return n."""
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the features (D,) or (T, C) float32 of an image, and its labels (L,)."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Return some images at once, as DataLoader asks for those of a batch."""
        units = self._array.units_of(self._rows[indices], self._view)
        stored: NDArray[Any] = self._array.read(units, check=self._check)
        features = torch.from_numpy(decode_numpy(stored, self._array.scale))
        return list(zip(features, self.labels[indices], strict=True))
