"""Tokens: the spatial features of some images, read batch by batch as float32."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.store.batches import Batches, Place, open_batches, place_for
from mlc.store.features import FeatureArray
from mlc.store.quantize import decode

Scorer = Callable[[Tensor], Tensor]  # tokens (B, T, C) -> logits (B, L)


@dataclass(frozen=True)
class Tokens:
    """Spatial features (n, V, T, C) of n images, in a store.

    Attributes:
        array: of the store.
        rows: (n,) rows of the store.
        grid: (H, W), where they have one.
    """

    array: FeatureArray
    rows: NDArray[np.intp]
    grid: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        """C."""
        return self.array.shape[-1]

    @property
    def count(self) -> int:
        """T."""
        return self.array.shape[-2]

    @property
    def views(self) -> int:
        """V."""
        return len(self.array.views)

    def units(
        self, places: NDArray[np.intp] | slice = slice(None), view: int | NDArray[np.intp] = 0
    ) -> NDArray[np.intp]:
        """Return the stored units of images (n,), in one view or each in its own."""
        return self.array.units_of(self.rows[places], view)


@dataclass(frozen=True)
class TokenReader:
    """Reads the tokens of images from where they are best held.

    Attributes:
        array: of the store.
        source: where its units are held.
        device: of what is read.
        note: where that is, and why.
    """

    array: FeatureArray
    source: Batches
    device: torch.device
    note: str

    @classmethod
    def open(
        cls,
        splits: Sequence[Tokens],
        device: torch.device,
        batch_size: int,
        *,
        views: int = 1,
        check: bool = True,
        place: Place | None = None,
    ) -> "TokenReader":
        """Open the tokens of some splits of one store.

        Args:
            splits: whose tokens will be read.
            device: where they are wanted.
            batch_size: of the largest batch.
            views: how many views of each image, from the first.
            check: compare with the checksums.
            place: where to hold them; by default where they fit.

        Raises:
            MlcError: a unit is damaged.
        """
        array = splits[0].array
        units = np.concatenate([each.units(view=view) for each in splits for view in range(views)])
        best, note = place_for(len(units) * array.unit_bytes, device)
        source = open_batches(
            array, units, device, place or best, batch_size=batch_size, check=check
        )
        return cls(array, source, device, note)

    def read(self, batches: Iterable[NDArray[np.intp]]) -> Iterator[Tensor]:
        """Yield the tokens (B, T, C) float32 of batches of units."""
        scale = None
        if self.array.scale is not None:
            scale = torch.from_numpy(self.array.scale).to(self.device)
        for stored in self.source.read(batches):
            yield decode(stored, scale)
