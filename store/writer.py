"""StoreWriter: fills a store shard by shard, so that a killed process loses one shard at most."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.configs.device import one_thread
from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.backend import Backend
from mlc.store.full_disk import is_full
from mlc.store.layout import Layout, open_for_writing
from mlc.store.problems import BROKEN
from mlc.store.quantize import encode
from mlc.store.shard import Encoded, ShardWriter

WRITES_AHEAD = 4  # batches that wait to be written, which bounds memory


class StoreWriter:
    """A store that is open for writing; hold its ``writer_lock``.

    Features are written by a thread while the next are made; when it falls behind, ``write`` waits.

    Attributes:
        path: where the store is.
        batch_size: of the forward pass.
        made_by: what was recorded when the store was made.
        key: the fields of its FeatureKey.
        image_id: (N,) text.
        file: (N,) text, relative to the root of the data set.
        status: (N,) uint8, of what is marked.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        attributes = backend.attributes()
        self.path: Path = backend.path
        self.batch_size: int = attributes["batch_size"]
        self.made_by: dict[str, Any] = attributes["made_by"]
        self._rows: int = attributes["rows"]
        self._shard_rows: int = attributes["shard_rows"]
        self.key: dict[str, Any] = attributes["key"]
        self.image_id: NDArray[np.str_] = backend.read(schema.IMAGE_ID, 0, self._rows)
        self.file: NDArray[np.str_] = backend.read(schema.FILE, 0, self._rows)
        self.status: NDArray[np.uint8] = backend.read(schema.STATUS, 0, self._rows)
        self._dtypes = schema.feature_arrays(backend)
        self._scales = {
            array: torch.from_numpy(backend.read(schema.scale(array)))
            for array, dtype in self._dtypes.items()
            if dtype == np.int8
        }
        self._shard = ShardWriter(backend)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._room = BoundedSemaphore(WRITES_AHEAD)
        # Encoded batches go to memory that is used again: fresh pages cost more than encoding
        # while the page cache fills.
        self._free: list[dict[str, Tensor]] = []
        self._failure: BaseException | None = None

    @classmethod
    def create_or_resume(cls, path: Path, layout: Layout, *, alone: bool = True) -> "StoreWriter":
        """Open the store at a path, or lay it out there; images that it lacks are new rows.

        Raises:
            MlcError: a store is there that was made with other settings, or images are to be added
                while others may be writing (``alone`` is False).
        """
        return cls._of(open_for_writing(path, layout, alone=alone))

    @classmethod
    def open(cls, path: Path) -> "StoreWriter":
        """Open the store at a path as it is.

        Raises:
            MlcError: there is none, or it is damaged or of another version.
        """
        return cls._of(schema.format_of(path).open(path, write=True))

    @classmethod
    def _of(cls, backend: Backend) -> "StoreWriter":
        try:
            schema.require_version(backend.path, backend.attributes())
            return cls(backend)
        except BaseException as error:
            backend.close()
            if not isinstance(error, BROKEN) or isinstance(error, MlcError | OSError):
                raise
            raise MlcError(
                f"{backend.path}: damaged ({type(error).__name__}: {error}); "
                "see what with mlc store verify, mend it with mlc store repair"
            ) from None

    def shards(self) -> list[range]:
        """Return the rows of all shards, in order."""
        starts = range(0, self._rows, self._shard_rows)
        return [range(start, min(start + self._shard_rows, self._rows)) for start in starts]

    def content_hash(self) -> NDArray[np.str_]:
        """Return (N,) text: the hash of each image file, empty where it was not read."""
        return self._backend.read(schema.CONTENT_HASH, 0, self._rows)

    def refresh(self, shard: range) -> None:
        """Read again what is done of a shard: another worker may have written to it."""
        self.status[shard.start : shard.stop] = self._backend.read(
            schema.STATUS, shard.start, shard.stop
        )

    def clipped(self) -> dict[str, NDArray[np.uint32]]:
        """Return how many numbers of each image (N, V) its dtype could not hold, by array."""
        return {
            array: self._backend.read(schema.clipped(array), 0, self._rows)
            for array in self._dtypes
        }

    def errors(self) -> dict[str, str]:
        """Return why each bad image is bad, by file."""
        return schema.read_errors(self._backend, self._rows)

    def write(self, rows: range | NDArray[np.intp], features: Mapping[str, Tensor]) -> None:
        """Write the features of rows of one shard, but not of those that are good already.

        Args:
            rows: n of one shard.
            features: (n, V, ...) float32, finite, on any device, of every feature array.

        Raises:
            MlcError: an earlier write failed: the disk is full.
        """
        new = np.asarray(rows, np.intp)
        keep = self.status[new] == schema.OK
        if keep.all():
            return
        if keep.any():
            new = new[~keep]
            features = {
                array: values[torch.from_numpy(~keep)] for array, values in features.items()
            }
        buffers = self._free.pop() if self._free else {}
        encoded = {array: self._encode(array, each, buffers) for array, each in features.items()}
        self._submit(self._write, new, encoded, buffers)

    def copy(self, source: int, row: int) -> None:
        """Give a row the features of another that was written before: of the same photo."""
        self._submit(self._shard.copy, source, row)

    def mark(
        self,
        shard: range,
        content_hash: NDArray[np.str_],
        error: NDArray[np.str_],
        done: NDArray[np.bool_] | None = None,
    ) -> None:
        """Mark a shard done as soon as everything that was written to it is on the disk.

        Args:
            shard: one of ``shards()``.
            content_hash: (n,) text; rows that are good already keep theirs.
            error: (n,) text, empty where the image is good.
            done: (n,) bool, the rows that this is about; by default all.
        """
        new = self.status[shard.start : shard.stop] != schema.OK
        if done is not None:
            new &= done
        self._submit(self._mark, shard, content_hash, _clip_text(error), new)

    def write_shard(
        self,
        shard: range,
        features: Mapping[str, NDArray[np.float32]],
        content_hash: NDArray[np.str_],
        error: NDArray[np.str_],
    ) -> None:
        """Write one whole shard, mark it done, and wait until it is.

        Args:
            shard: one of ``shards()``.
            features: (n, V, ...) of each feature array; rows of bad images are zeroed here.
            content_hash: (n,) text.
            error: (n,) text, empty where the image is good.

        Raises:
            MlcError: a feature is not a finite number, or the disk is full.
        """
        clean = {}
        for array, values in features.items():
            bad = (error != "").reshape(-1, *[1] * (values.ndim - 1))
            clean[array] = torch.from_numpy(np.where(bad, np.float32(0), values))
            if not clean[array].isfinite().all():
                raise MlcError(f"{self.path}: {array} has features that are not numbers")
        self.write(shard, clean)
        self.mark(shard, content_hash, error)
        self.drain()

    def drain(self) -> None:
        """Wait until everything is written.

        Raises:
            MlcError: a write failed: the disk is full.
        """
        self._thread.submit(lambda: None).result()
        self._raise_failure()

    def record(self, summary: Mapping[str, Any]) -> None:
        """Record how the extraction went that ends here, in place of the one before.

        Several workers that fill one store must not: each would set back what others have set.

        Args:
            summary: JSON values; see ``schema.record_extraction`` for what does not fit.

        Raises:
            MlcError: a write failed: the disk is full.
        """
        self.drain()
        schema.record_extraction(self._backend, summary)

    def set_pending(self, rows: NDArray[np.intp]) -> None:
        """Have rows written again: from now on they are pending, and the store is unfinished."""
        self._backend.set_attribute("complete", False)
        self.status[rows] = schema.PENDING
        for shard in self.shards():
            if np.isin(rows, np.asarray(shard)).any():
                part = self.status[shard.start : shard.stop]
                self._backend.write(schema.STATUS, shard.start, part)
        self._backend.flush()

    def finish(self) -> None:
        """Mark the store complete.

        Raises:
            MlcError: rows are still pending.
        """
        self.drain()
        pending = int((self.status == schema.PENDING).sum())
        if pending:
            raise MlcError(
                f"{self.path}: {pending:,} of {self._rows:,} images are still to be extracted; "
                "run the command again that lists them"
            )
        self._backend.set_attribute("complete", True)

    @contextmanager
    def filling(self, *, finish: bool = True) -> Iterator[None]:
        """Finish the store after a block that fills it, and close it whatever happens there.

        Args:
            finish: else it is left unfinished, as other workers fill it too.

        Raises:
            MlcError: rows are still pending, or a write failed.
            KeyboardInterrupt: with a message that says what is kept.
        """
        try:
            yield
            self.drain()
            if finish:
                self.finish()
        except KeyboardInterrupt:
            self._thread.shutdown()  # what waits is written: a shard may be done by it
            done = int((self.status != schema.PENDING).sum())
            raise KeyboardInterrupt(
                f"{self.path}: stopped, {done:,} of {self._rows:,} images are kept; "
                "the same command goes on from there"
            ) from None
        finally:
            self.close()

    def close(self) -> None:
        """Write what waits, and close; what is not marked is written again by the next writer."""
        self._thread.shutdown()
        self._backend.close()

    def _encode(self, array: str, values: Tensor, buffers: dict[str, Tensor]) -> Encoded:
        scale = self._scales.get(array)
        scale = None if scale is None else scale.to(values.device)
        dtype = self._dtypes[array]
        if len(buffers.get(array, ())) < len(values):
            buffers[array] = torch.from_numpy(np.empty(values.shape, dtype))
        out = buffers[array][: len(values)]
        with one_thread():  # two would wait for each other beside the thread that writes
            stored, clipped = encode(values, dtype.name, scale, None if values.is_cuda else out)
        if values.is_cuda:
            out.copy_(stored)
        return Encoded.with_checksums(out.numpy(), clipped.cpu().numpy())

    def _write(
        self,
        rows: NDArray[np.intp],
        encoded: Mapping[str, Encoded],
        buffers: dict[str, Tensor],
    ) -> None:
        self._shard.write(rows, encoded)
        self._free.append(buffers)

    def _mark(
        self,
        shard: range,
        content_hash: NDArray[np.str_],
        error: NDArray[np.str_],
        done: NDArray[np.bool_],
    ) -> None:
        status = self._shard.mark(shard, content_hash, error, done)
        self.status[shard.start : shard.stop] = status

    def _submit(self, job: Callable[..., None], *args: Any) -> None:
        self._raise_failure()
        self._room.acquire()
        self._thread.submit(self._run, job, *args)

    def _run(self, job: Callable[..., None], *args: Any) -> None:
        """Do a job in the thread; after a failure nothing more is done."""
        try:
            if self._failure is None:
                job(*args)
        except BaseException as error:
            self._failure = error
        finally:
            self._room.release()

    def _raise_failure(self) -> None:
        error = self._failure
        if is_full(error):
            done = int((self.status != schema.PENDING).sum())
            raise MlcError(
                f"{self.path}: the disk is full, {done:,} of {self._rows:,} images are kept; "
                "free space, the same command goes on from there"
            ) from None
        if error is not None:
            raise error


def _clip_text(text: NDArray[np.str_]) -> NDArray[np.str_]:
    clipped = [each.encode()[: schema.ERROR_BYTES].decode(errors="ignore") for each in text]
    return np.array(clipped, dtype=np.str_)
