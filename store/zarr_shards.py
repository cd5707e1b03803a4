"""The index of a Zarr shard: where in the file each of its chunks lies."""

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from mlc.store.units import LOST
from mlc.store.zarr_chunks import is_little

CRC_BYTES = 4


def is_plain(codec: ShardingCodec, dtype: np.dtype[Any]) -> bool:
    """Return whether chunks are raw little-endian numbers and the index is as we read it."""
    index_codecs = [type(each) for each in codec.index_codecs]
    return (
        len(codec.codecs) == 1
        and is_little(codec.codecs[0], dtype)
        and index_codecs == [BytesCodec, Crc32cCodec]
        and codec.index_location.value == "start"
    )


def make_index(units: int, unit_bytes: int) -> bytes:
    """Return the index of a shard of units in order: (offset, size) of each, and a checksum."""
    pairs = np.empty((units, 2), dtype="<u8")
    pairs[:, 1] = unit_bytes
    pairs[:, 0] = pairs.nbytes + CRC_BYTES + np.arange(units) * unit_bytes
    data = pairs.tobytes()
    return data + _crc32c(data)


def read_index(file: Path, units: int, unit_bytes: int) -> NDArray[np.int64]:
    """Return the offset of each unit of a shard, where a file that is not there would have it."""
    size = units * 2 * 8
    try:
        with file.open("rb") as opened:
            data = opened.read(size + CRC_BYTES)
    except FileNotFoundError:
        data = make_index(units, unit_bytes)
    if _crc32c(data[:size]) != data[size:]:
        return np.full(units, LOST, dtype=np.int64)
    pairs = np.frombuffer(data[:size], dtype="<u8").reshape(-1, 2)
    return np.where(pairs[:, 1] == unit_bytes, pairs[:, 0].astype(np.int64), LOST)


def _crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")
