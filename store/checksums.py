"""row_crc32c(): one checksum for everything small that is stored of an image."""

from collections.abc import Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from mlc.store import schema

TEXTS = (schema.IMAGE_ID, schema.FILE, schema.CONTENT_HASH, schema.ERROR)


def row_crc32c(values: Mapping[str, NDArray[Any]], arrays: Sequence[str]) -> NDArray[np.uint32]:
    """Return a checksum of each row: of its texts, status, and its features' checksums and counts.

    Args:
        values: the arrays (n, ...) of a store, by name.
        arrays: the feature arrays, in the store's order.

    Returns:
        (n,) uint32.
    """
    texts = [values[name].tolist() for name in TEXTS]
    counts = [values[name] for name in schema.count_arrays(arrays)]
    numbers = np.concatenate([values[schema.STATUS][:, None], *counts], axis=1).astype("<u4")
    data, width = numbers.tobytes(), numbers.shape[1] * numbers.itemsize
    rows = (
        "\0".join(row).encode(errors="surrogateescape") + data[index * width : (index + 1) * width]
        for index, row in enumerate(zip(*texts, strict=True))
    )
    return np.fromiter(map(google_crc32c.value, rows), np.uint32, len(numbers))
