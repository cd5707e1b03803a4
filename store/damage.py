"""mark_damaged(): rows that are bad become pending again, in arrays that can be read again."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.store import schema
from mlc.store.backend import Backend
from mlc.store.problems import BROKEN

SHARDED_TEXT = (schema.CONTENT_HASH, schema.ERROR)


def mark_damaged(path: Path, rows: NDArray[np.intp]) -> None:
    """Have rows extracted again: chunks that cannot be read become blank, and the rows pending.

    Hold the ``writer_lock``. The names of the images must be readable.
    """
    backend = schema.format_of(path).open(path, write=True)
    try:
        attributes = backend.attributes()
        backend.set_attribute("complete", False)
        step = attributes["shard_rows"]
        for shard in np.unique(rows // step).tolist():
            part = range(shard * step, min((shard + 1) * step, attributes["rows"]))
            for name, blank in _blanks(backend, part).items():
                if not _can_be_read(backend, name, part):
                    backend.reset(name, part.start, blank)
            status = backend.read(schema.STATUS, part.start, part.stop)
            status[np.isin(np.asarray(part), rows)] = schema.PENDING
            backend.write(schema.STATUS, part.start, status)
    finally:
        backend.close()


def replace_names(path: Path, image_id: NDArray[np.str_], file: NDArray[np.str_]) -> None:
    """Write the names of all images again. Hold the ``writer_lock``."""
    backend = schema.format_of(path).open(path, write=True)
    try:
        for name, text in ((schema.IMAGE_ID, image_id), (schema.FILE, file)):
            backend.reset(name, 0, text)
    finally:
        backend.close()


def _blanks(backend: Backend, rows: range) -> dict[str, NDArray[Any]]:
    """Return blank rows of the arrays that are written shard by shard, beside the features."""
    blanks: dict[str, NDArray[Any]] = {
        name: np.full(len(rows), "", dtype=np.str_) for name in SHARDED_TEXT
    }
    blanks[schema.STATUS] = np.zeros(len(rows), schema.STATUS_DTYPE)
    blanks[schema.ROW_CRC32C] = np.zeros(len(rows), schema.COUNT_DTYPE)
    views = len(backend.attributes()["key"]["views"])
    for name in schema.count_arrays(schema.feature_arrays(backend)):
        blanks[name] = np.zeros((len(rows), views), schema.COUNT_DTYPE)
    return blanks


def _can_be_read(backend: Backend, name: str, rows: range) -> bool:
    try:
        backend.read(name, rows.start, rows.stop)
    except BROKEN:
        return False
    return True
