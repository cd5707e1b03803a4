"""repair(): what is damaged in a store, extracted again, and nothing else."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress, silent
from mlc.datasets.images import ImageSet
from mlc.datasets.source import DataConfig, read_images
from mlc.extract.config import worker_count
from mlc.extract.fill import Work, fill
from mlc.extract.images import hash_content, read_file
from mlc.extract.origin import Where, load_origin, photo_files, require_photos
from mlc.extract.shards import Target
from mlc.store import schema
from mlc.store.checksums import row_crc32c
from mlc.store.damage import mark_damaged, replace_names
from mlc.store.lock import writer_lock
from mlc.store.problems import BROKEN, Problem, bad_rows
from mlc.store.verify import verify
from mlc.store.writer import StoreWriter

NAMES = (schema.IMAGE_ID, schema.FILE)


@dataclass(frozen=True)
class Repair:
    """What a repair did.

    Attributes:
        problems: what was damaged.
        rows: how many images were extracted again.
        left: how many images are still to be extracted, as they were before.
    """

    problems: list[Problem]
    rows: int
    left: int


def repair(path: Path, where: Where, progress: Progress = silent) -> Repair:
    """Extract again what is damaged in a store.

    Whole batches are run, so that the same bytes come out. Killed, it leaves an unfinished store,
    which the same call or the same ``mlc extract`` ends.

    Args:
        path: the store.
        where: its images and weights are now.
        progress: told after each piece that was looked at, and after each batch.

    Raises:
        MlcError: what is damaged cannot be made again: names of images that the data set does not
            tell, scales, imported features, or photos that are gone or have changed.
    """
    with writer_lock(path):
        with _readable(path):
            schema.format_of(path).restore_length(path)
            problems = verify(path, progress).problems
            if any(each.array in (*NAMES, schema.ROW_CRC32C) for each in problems):
                problems = _restore_names(path, where, problems, progress)
        for each in problems:
            if not len(each.rows) or each.array.endswith("_scale"):
                raise MlcError(f"{each.describe()}; extract the images again to another --out")
        return Repair(problems, *_extract_again(path, where, bad_rows(problems), progress))


def _extract_again(
    path: Path, where: Where, rows: NDArray[np.intp], progress: Progress
) -> tuple[int, int]:
    """Extract rows, and those that an earlier repair left; return how many, and what is left."""
    with _readable(path):
        known = _read_known(path)
    pending = known.status == schema.PENDING
    wanted = pending & (known.content_hash != "")  # they were extracted once
    wanted[rows] = True
    if not wanted.any():
        return 0, int(pending.sum())
    if known.made_by["backbone_config"] is None:  # mlc import writes what is pending
        mark_damaged(path, np.flatnonzero(wanted))
    # All that can fail comes first: what is damaged is then left as it is.
    backbone = load_origin(path, known.key, known.made_by, known.batch_size, where)
    files = photo_files(known.made_by, known.file, where)
    _mend_hashes(path, files, np.flatnonzero(wanted), known.content_hash)
    require_photos(path, files, np.flatnonzero(wanted), known.content_hash)
    with _readable(path):
        mark_damaged(path, np.flatnonzero(wanted))
        writer = StoreWriter.open(path)
    left = int((pending & ~wanted).sum())
    with writer.filling(finish=not left):
        target = Target(writer, backbone, wanted)
        fill([target], Work(files, worker_count(None)), progress)
    return int(wanted.sum()), left


def _mend_hashes(
    path: Path, files: list[Path], rows: NDArray[np.intp], content_hash: NDArray[np.str_]
) -> None:
    """Take a photo's own hash where the row's checksum says that the stored one is damaged."""
    with closing(schema.format_of(path).open(path)) as backend:
        arrays = list(schema.feature_arrays(backend))
        names = schema.small_arrays(arrays)
        for row in rows.tolist():
            with suppress(*BROKEN):  # what cannot be read says nothing
                found = hash_content(read_file(files[row]))
                small = {name: backend.read(name, row, row + 1) for name in names}
                small[schema.CONTENT_HASH] = np.array([found])
                # A killed repair left it pending; its checksum is of what it was before.
                good = small[schema.ERROR] == ""
                status = np.where(good, schema.OK, schema.BAD)
                small[schema.STATUS] = status.astype(schema.STATUS_DTYPE)
                if (row_crc32c(small, arrays) == small[schema.ROW_CRC32C]).all():
                    content_hash[row] = found


@dataclass(frozen=True)
class _Known:
    """What a damaged store still says: (N,) status, file and content hash, none where unknown."""

    key: dict[str, Any]
    made_by: dict[str, Any]
    batch_size: int
    file: NDArray[np.str_]
    status: NDArray[np.uint8]
    content_hash: NDArray[np.str_]


def _read_known(path: Path) -> _Known:
    with closing(schema.format_of(path).open(path)) as backend:
        attributes = backend.attributes()
        rows = attributes["rows"]
        status = np.zeros(rows, schema.STATUS_DTYPE)
        content_hash = np.full(rows, "", dtype=f"<U{schema.HASH_CHARS}")
        for start in range(0, rows, attributes["shard_rows"]):
            part = slice(start, min(start + attributes["shard_rows"], rows))
            for name, values in ((schema.STATUS, status), (schema.CONTENT_HASH, content_hash)):
                with suppress(*BROKEN):
                    values[part] = backend.read(name, part.start, part.stop)
        file = backend.read(schema.FILE, 0, rows)
        key, made_by, batch_size = (attributes[each] for each in ("key", "made_by", "batch_size"))
        return _Known(key, made_by, batch_size, file, status, content_hash)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say of what libraries raise over a store that too little of it can be read."""
    try:
        yield
    except MlcError:
        raise
    except BROKEN as error:
        raise MlcError(
            f"{path}: damaged beyond what can be mended ({type(error).__name__}: {error}); "
            "extract the images again to another --out"
        ) from None


def _restore_names(
    path: Path, where: Where, problems: list[Problem], progress: Progress
) -> list[Problem]:
    """Take damaged names from the data set; return what is still bad then.

    Raises:
        MlcError: the data set has other images than the store.
    """
    backend = schema.format_of(path).open(path)
    try:
        attributes = backend.attributes()
    finally:
        backend.close()
    made_by = attributes["made_by"]
    if "data_config" not in made_by:
        return problems
    images = _data_set(made_by["data_config"], where)
    if len(images.image_id) != attributes["rows"]:
        raise MlcError(
            f"{path}: names of its {attributes['rows']:,} images are damaged, and "
            f"{made_by['data']} has {len(images.image_id):,} now, which do not tell them; "
            "extract them again to another --out"
        )
    replace_names(path, images.image_id, images.file)
    return verify(path, progress).problems


def _data_set(config: dict[str, object], where: Where) -> ImageSet:
    settings = config if where.root is None else config | {"root": where.root}
    return read_images(DataConfig.model_validate(settings))
