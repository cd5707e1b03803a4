"""compare_live(): does a store hold what comes out of the backbone now?"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress, silent
from mlc.extract.config import worker_count
from mlc.extract.origin import Where, load_origin, photo_files, require_photos
from mlc.extract.shards import batches_of
from mlc.extract.stream import stream_features
from mlc.store import schema
from mlc.store.features import FeatureArray
from mlc.store.quantize import Cost, cost, decode, encode
from mlc.store.reader import FeatureStore


@dataclass(frozen=True)
class Live:
    """How far the stored features of an array are from those that come out now.

    Attributes:
        array: its name.
        units: views of images that were compared.
        identical: of them, how many are equal byte for byte.
        cost: of what differs.
    """

    array: str
    units: int
    identical: int
    cost: Cost


def compare_live(path: Path, images: int, where: Where, progress: Progress = silent) -> list[Live]:
    """Extract some images again, and compare what comes out with what is stored.

    Whole batches are run, as a forward pass of another size may differ in the last bits.

    Args:
        path: the store.
        images: about how many, spread evenly over the store.
        where: its images and weights are now.
        progress: told after each batch.

    Raises:
        MlcError: the backbone cannot be had, a photo is gone or has changed, or what is stored is
            damaged.
    """
    with FeatureStore(path, unfinished=True) as store:
        backbone = load_origin(path, store.key, store.made_by, store.batch_size, where)
        files = photo_files(store.made_by, store.file, where)
        good = store.status == schema.OK
        batches = _spread(store, images)
        rows = np.array([row for batch in batches for row in batch if good[row]], np.intp)
        if not len(rows):
            raise MlcError(f"{path}: has no good images to compare with")
        require_photos(path, files, rows, store.content_hash())
        arrays = {name: store.features(*name.rsplit("/", 1)) for name in store.arrays}
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in arrays}
        stream = stream_features(backbone, files, batches, worker_count(None), wanted=good)
        for done, batch in enumerate(stream, 1):
            kept = torch.from_numpy(batch.decoded)
            rows = np.asarray(batch.rows, np.intp)[batch.decoded]
            for name, array in arrays.items():
                live = batch.features[name][kept.to(backbone.device)].cpu()
                pairs[name].append((_stored(array, rows), live))
            progress(done, len(batches), "live")
    return [
        _compare(array, *map(torch.cat, zip(*pairs[name], strict=True)))
        for name, array in arrays.items()
    ]


def _spread(store: FeatureStore, images: int) -> list[range]:
    """Return batches that hold so many images, spread evenly over the store."""
    rows = len(store.image_id)
    shards = [
        range(start, min(start + store.shard_rows, rows))
        for start in range(0, rows, store.shard_rows)
    ]
    batches = [batch for shard in shards for batch in batches_of(shard, store.batch_size)]
    count = min(len(batches), -(-images // store.batch_size))
    return [batches[int(each)] for each in np.linspace(0, len(batches) - 1, count).round()]


def _stored(array: FeatureArray, rows: np.ndarray) -> Tensor:
    """Return the stored numbers (n, V, ...) of rows, as they are stored."""
    views = len(array.views)
    which = (rows[:, None] * views + np.arange(views)).reshape(-1)
    values = array.read(which)
    return torch.from_numpy(values.reshape(len(rows), views, *array.unit_shape))


def _compare(array: FeatureArray, stored: Tensor, live: Tensor) -> Live:
    scale = None if array.scale is None else torch.from_numpy(array.scale)
    now, _ = encode(live, array.dtype.name, scale)
    same = (now == stored).flatten(2).all(2)
    was = decode(stored, scale).flatten(0, 1)
    return Live(
        array=array.name,
        units=same.numel(),
        identical=int(same.sum()),
        cost=cost(live.flatten(0, 1), was),
    )
