"""StorePair: what two stores have in common, in the order of the first."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.features import FeatureArray
from mlc.store.reader import FeatureStore

# Fields of a key that cost accuracy: what two stores are compared for.
COMPARED = ("features", "decode", "precision", "engine")


@dataclass(frozen=True)
class StorePair:
    """What two stores have in common.

    Attributes:
        stores: both.
        arrays: names of the feature arrays that both have.
        image_id: (M,) text, of the images that are good in both.
        rows: (M,) their rows in each store.
    """

    stores: tuple[FeatureStore, FeatureStore]
    arrays: list[str]
    image_id: NDArray[np.str_]
    rows: tuple[NDArray[np.intp], NDArray[np.intp]]

    @classmethod
    def of(cls, one: FeatureStore, other: FeatureStore) -> "StorePair":
        """Find the arrays and images of both, in the order of the first.

        Raises:
            MlcError: they have another key but for the features, other photos, or no array or no
                good image in common.
        """
        _require_same_settings(one, other)
        arrays = [array for array in one.arrays if array in other.arrays]
        if not arrays:
            raise MlcError(
                f"{other.path}: has {', '.join(other.arrays)}, and {one.path} "
                f"{', '.join(one.arrays)}: nothing to compare"
            )
        rows = _common_rows(one, other)
        image_id = one.image_id[rows[0]]
        return cls((one, other), arrays, image_id, rows)

    def notes(self) -> list[str]:
        """Return sentences on what is in one store alone."""
        notes = []
        for store in self.stores:
            alone = [array for array in store.arrays if array not in self.arrays]
            if alone:
                notes.append(f"only {store.path} has {', '.join(alone)}")
            more = int((store.status == schema.OK).sum()) - len(self.image_id)
            if more:
                notes.append(f"{more:,} good images of {store.path} are not in the other")
        return notes

    def features(self, array: str) -> tuple[FeatureArray, FeatureArray]:
        """Return an array of both stores."""
        one, other = (store.features(*array.rsplit("/", 1)) for store in self.stores)
        return one, other

    def different(self) -> list[str]:
        """Return the arrays that heads can see whose dtypes differ, or one if none does."""
        seen = [array for array in self.arrays if not array.endswith(schema.PREFIX)]
        one, other = self.stores
        return [each for each in seen if one.arrays[each] != other.arrays[each]] or seen[:1]


def _require_same_settings(one: FeatureStore, other: FeatureStore) -> None:
    for field, value in one.key.items():
        if field not in COMPARED and other.key[field] != value:
            raise MlcError(
                f"{other.path}: made with other settings than {one.path}: {field}: "
                f"{other.key[field]!r} and {value!r}; compare stores that differ in "
                f"{', '.join(COMPARED)} alone"
            )


def _common_rows(
    one: FeatureStore, other: FeatureStore
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the rows in both stores of the images that are good in both."""
    place = {str(other.image_id[row]): row for row in np.flatnonzero(other.status == schema.OK)}
    rows = [
        (row, place[str(one.image_id[row])])
        for row in np.flatnonzero(one.status == schema.OK)
        if str(one.image_id[row]) in place
    ]
    if not rows:
        raise MlcError(f"{other.path}: has none of the images of {one.path}, or no good ones")
    of_one, of_other = np.array(rows, np.intp).T.copy()
    photos = one.content_hash()[of_one] != other.content_hash()[of_other]
    if photos.any():
        raise MlcError(
            f"{other.path}: was made from other photos than {one.path}, by their content "
            f"({int(photos.sum()):,}, the first is {one.image_id[of_one][photos][0]}); "
            "compare stores of the same images"
        )
    return of_one, of_other
