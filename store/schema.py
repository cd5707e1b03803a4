"""What a store holds: names of arrays and attributes, the same in every format.

Root attributes: ``schema_version``, ``key`` (FeatureKey), ``complete``, ``rows`` (N; an array that
was being lengthened when a process was killed may be longer), ``shard_rows``, ``batch_size``,
``grids`` ((H, W) of the tokens, by layer), ``scale_crc32c`` (by int8 array), ``made_by`` (versions,
command, weights and their licence: recorded, not compared), ``attributes_crc32c``, ``extraction``
(how the last extraction of images went, as its pace sums it up, and a checksum; {} before one).

Arrays, a row for each image: the names below, and for each layer the feature arrays that the key
asks for, with V views: ``<layer>/pooled`` (N, V, D), ``<layer>/tokens`` (N, V, T, C), and
``<layer>/prefix`` (N, V, P, C), the class token and registers of models that have them. Each has

- ``<array>_crc32c`` (N, V) uint32 of the bytes as stored,
- ``<array>_clipped`` (N, V) uint32, how many numbers its dtype could not hold,
- ``<array>_scale`` (C,) float32 if it is int8: a number is the stored one times its channel's.

``row_crc32c`` covers everything else that is stored of a row, and those checksums. A bad image
keeps its row, zeros in the features, and its reason in ``error``.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from mlc.configs.errors import MlcError, choose
from mlc.store.backend import Backend
from mlc.store.hdf5 import Hdf5Backend
from mlc.store.key import feature_dtypes
from mlc.store.zarr_v3 import ZarrBackend

SCHEMA_VERSION = 2

IMAGE_ID = "image_id"
FILE = "file"
CONTENT_HASH = "content_hash"
STATUS = "status"
ERROR = "error"
ROW_CRC32C = "row_crc32c"
# Attributes that never change, under the checksum ``attributes_crc32c``.
FIXED = ("key", "shard_rows", "batch_size", "grids", "scale_crc32c", "made_by")
ROW_ARRAYS = (IMAGE_ID, FILE, CONTENT_HASH, STATUS, ERROR, ROW_CRC32C)

EXTRACTION = "extraction"  # an attribute that changes
EXTRACTION_BYTES = 2048  # that HDF5 keeps for its JSON: stores are laid out with as many
CRC32C = "crc32c"  # in it, of the rest

PENDING, OK, BAD = 0, 1, 2  # values of STATUS
STATUS_DTYPE = np.dtype(np.uint8)
COUNT_DTYPE = np.dtype(np.uint32)  # of checksums and of clipped numbers
SCALE_DTYPE = np.dtype(np.float32)

HASH_CHARS = 32  # BLAKE2b of 16 bytes, in hexadecimal
ERROR_BYTES = 200

POOLED, TOKENS, PREFIX = "pooled", "tokens", "prefix"  # kinds of feature arrays

FORMATS: dict[str, type[Backend]] = {"hdf5": Hdf5Backend, "zarr": ZarrBackend}
SUFFIXES = {backend.suffix: name for name, backend in FORMATS.items()}


def feature(layer: str, kind: str) -> str:
    """Return the name of a layer's feature array."""
    return f"{layer}/{kind}"


def crc(array: str) -> str:
    """Return the name of a feature array's checksums."""
    return f"{array}_crc32c"


def clipped(array: str) -> str:
    """Return the name of the counts of numbers that a feature array's dtype could not hold."""
    return f"{array}_clipped"


def count_arrays(arrays: Iterable[str]) -> list[str]:
    """Return the names of the (N, V) arrays that belong to some feature arrays."""
    return [name(array) for array in arrays for name in (crc, clipped)]


def small_arrays(arrays: Iterable[str]) -> list[str]:
    """Return the names of everything that is small of a row of a store of some feature arrays."""
    return [*ROW_ARRAYS, *count_arrays(arrays)]


def scale(array: str) -> str:
    """Return the name of a feature array's scales."""
    return f"{array}_scale"


def array_dtypes(key: Mapping[str, Any]) -> dict[str, str]:
    """Return the dtype of each kind of feature array, of a key as JSON: prefix is as tokens."""
    dtypes = feature_dtypes(key["features"])
    if TOKENS in dtypes:
        dtypes[PREFIX] = dtypes[TOKENS]
    return dtypes


def feature_arrays(backend: Backend) -> dict[str, np.dtype[Any]]:
    """Return the feature arrays of a store with their dtypes, layer by layer."""
    key, names = backend.attributes()["key"], backend.names()
    return {
        feature(layer, kind): np.dtype(dtype)
        for layer in key["layers"]
        for kind, dtype in array_dtypes(key).items()
        # Not every layer has prefix tokens; of the others none may be missing.
        if kind != PREFIX or feature(layer, kind) in names
    }


def format_of(path: Path) -> type[Backend]:
    """Return the format that a store's path names.

    Raises:
        MlcError: the path ends in neither ``.zarr`` nor ``.h5``.
    """
    if path.suffix not in SUFFIXES:
        raise MlcError(f"{path}: a store's name ends in {' or '.join(sorted(SUFFIXES))}")
    return choose(FORMATS, SUFFIXES[path.suffix], "format")


def require_version(path: Path, attributes: Mapping[str, Any]) -> None:
    """Raise an MlcError if attributes are not those of a whole store of this version."""
    version = attributes.get("schema_version")
    if version == SCHEMA_VERSION:
        if attributes.get("attributes_crc32c") != attributes_crc32c(attributes):
            raise MlcError(
                f"{path}: damaged, its attributes are not as they were written; extract the images "
                "again to another --out"
            )
        return
    newer = isinstance(version, int) and version > SCHEMA_VERSION
    raise MlcError(
        f"{path}: expected a feature store of version {SCHEMA_VERSION}, got version {version}; "
        + ("update mlc" if newer else "extract it again")
    )


def attributes_crc32c(attributes: Mapping[str, Any]) -> int:
    """Return a checksum of the attributes that never change."""
    return _json_crc32c([attributes.get(name) for name in FIXED])


def record_extraction(backend: Backend, summary: Mapping[str, Any]) -> None:
    """Set the attribute ``extraction`` of a store that was laid out with it; others stay without.

    An entry for which there is no room any more is left out: an extraction is not to fail in the
    end for what is said of it.

    Args:
        backend: open for writing, by no other process.
        summary: JSON values, the important first.
    """
    if EXTRACTION not in backend.attributes():
        return
    kept: dict[str, Any] = {}
    for name, value in summary.items():
        more = kept | {name: value}
        # One byte is left for the padding, by which it is known as text that changes.
        if len(json.dumps(_with_crc32c(more))) < EXTRACTION_BYTES:
            kept = more
    backend.set_attribute(EXTRACTION, _with_crc32c(kept), EXTRACTION_BYTES)


def read_extraction(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was recorded of the last extraction; {} if nothing was, or if it is damaged."""
    stored = attributes.get(EXTRACTION)
    if not isinstance(stored, dict):
        return {}
    summary = {name: value for name, value in stored.items() if name != CRC32C}
    return summary if stored == _with_crc32c(summary) else {}


def _with_crc32c(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {**summary, CRC32C: _json_crc32c(summary)} if summary else {}


def _json_crc32c(value: Any) -> int:
    return int(google_crc32c.value(json.dumps(value, sort_keys=True).encode()))


def read_errors(backend: Backend, rows: int) -> dict[str, str]:
    """Return why each bad image is bad, by file."""
    file, error = backend.read(FILE, 0, rows), backend.read(ERROR, 0, rows)
    return {str(file[row]): str(error[row]) for row in np.flatnonzero(error != "")}
