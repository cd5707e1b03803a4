"""What a store holds: names of arrays and attributes, the same in every format.

Root attributes: ``schema_version``, ``key`` (FeatureKey), ``complete``, ``shard_rows``,
``batch_size``, ``made_by`` (versions, command, weights and their licence: recorded, not compared).

Arrays, a row for each image: the names below, and for each layer ``<layer>/pooled`` (N, V, D).
A bad image keeps its row, zeros in the features, and its reason in ``error``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlc.configs.errors import MlcError, choose
from mlc.store.backend import Backend
from mlc.store.hdf5 import Hdf5Backend
from mlc.store.zarr_v3 import ZarrBackend

SCHEMA_VERSION = 1

IMAGE_ID = "image_id"
FILE = "file"
CONTENT_HASH = "content_hash"
STATUS = "status"
ERROR = "error"

PENDING, OK, BAD = 0, 1, 2  # values of STATUS
STATUS_DTYPE = np.dtype(np.uint8)

HASH_CHARS = 32  # BLAKE2b of 16 bytes, in hexadecimal
ERROR_BYTES = 200

FORMATS: dict[str, type[Backend]] = {"hdf5": Hdf5Backend, "zarr": ZarrBackend}
SUFFIXES = {backend.suffix: name for name, backend in FORMATS.items()}


def pooled(layer: str) -> str:
    """Return the name of a layer's pooled features."""
    return f"{layer}/pooled"


def format_of(path: Path) -> type[Backend]:
    """Return the format that a store's path names.

    Raises:
        MlcError: the path ends in neither ``.zarr`` nor ``.h5``.
    """
    if path.suffix not in SUFFIXES:
        raise MlcError(f"{path}: a store's name ends in {' or '.join(sorted(SUFFIXES))}")
    return choose(FORMATS, SUFFIXES[path.suffix], "format")


def require_version(path: Path, attributes: Mapping[str, Any]) -> None:
    """Raise an MlcError if attributes are not those of a store of this version."""
    version = attributes.get("schema_version")
    if version != SCHEMA_VERSION:
        raise MlcError(
            f"{path}: expected a feature store of version {SCHEMA_VERSION}, "
            f"got version {version}; extract it again"
        )


def read_errors(backend: Backend) -> dict[str, str]:
    """Return why each bad image is bad, by file."""
    file, error = backend.read(FILE), backend.read(ERROR)
    return {str(file[row]): str(error[row]) for row in np.flatnonzero(error != "")}
