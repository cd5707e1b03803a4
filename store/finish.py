"""finish(): a store that several workers have filled, complete."""

import shutil
from pathlib import Path

import numpy as np

from mlc.configs.errors import MlcError
from mlc.store import schema
from mlc.store.lease import lease_folder, require_no_worker
from mlc.store.lock import writer_lock
from mlc.store.writer import StoreWriter


def finish(path: Path) -> int:
    """Mark a store complete that several workers have filled; return how many images it holds.

    Raises:
        MlcError: a worker is still writing to it, or shards are still to be extracted.
    """
    with writer_lock(path):
        writer = StoreWriter.open(path)
        with writer.filling(finish=False):
            pending = [
                index
                for index, shard in enumerate(writer.shards())
                if (writer.status[shard.start : shard.stop] == schema.PENDING).any()
            ]
            require_no_worker(path)
            if pending:
                raise MlcError(
                    f"{path}: {len(pending)} of {len(writer.shards())} shards are still to be "
                    f"extracted ({_shown(pending)}); run mlc extract again, with --shard or without"
                )
            writer.finish()
            images = int(np.count_nonzero(writer.status == schema.OK))
        shutil.rmtree(lease_folder(path), ignore_errors=True)
    return images


def _shown(shards: list[int], most: int = 8) -> str:
    more = ", ..." if len(shards) > most else ""
    return ", ".join(map(str, shards[:most])) + more
