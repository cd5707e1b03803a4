"""The pipeline: threads read and decode ahead while the backbone runs on the batch before."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.configs.errors import MlcError
from mlc.extract.backbone import Backbone
from mlc.extract.fast_images import DECODERS
from mlc.extract.fitting import FittingBatches
from mlc.extract.images import LoadedImage, load_image, never
from mlc.extract.profile import span

BATCHES_AHEAD = 2  # bounds memory: 2 x 64 images of 448 px are 77 MB for each view
NOT_FINITE = "the backbone gives features that are not finite numbers"
UNREAD = LoadedImage("", "", False, 0.0, 0.0)


@dataclass(frozen=True)
class FeatureBatch:
    """Features of some rows.

    Attributes:
        rows: which of the listed images.
        features: (B, V, ...) float32 on the backbone's device, by name of the array; meaningless
            where an image is not decoded, zeros where they would not be finite. They are torch's
            inference tensors: not to be changed in place.
        content_hash: (B,) text; empty where the file was not or cannot be read.
        error: (B,) text, empty where nothing is wrong.
        decoded: (B,) bool: the features are of the photo, not of black pixels in its place.
        seconds: time spent on "read", "decode" (both summed over threads) and "infer".
    """

    rows: range
    features: dict[str, Tensor]
    content_hash: NDArray[np.str_]
    error: NDArray[np.str_]
    decoded: NDArray[np.bool_]
    seconds: dict[str, float]


@dataclass(frozen=True)
class _Loading:
    """A batch on its way: pixels (V, B, S, S, 3) and what becomes of each file."""

    rows: range
    pixels: NDArray[np.uint8]
    loads: list[Future[LoadedImage] | None]


def stream_features(
    backbone: Backbone,
    files: Sequence[Path],
    batches: Iterable[range],
    workers: int,
    *,
    wanted: NDArray[np.bool_] | None = None,
    known: Callable[[str], bool] = never,
) -> Iterator[FeatureBatch]:
    """Yield the features of batches of images, in order.

    An image that is bad, not wanted or known takes its place in the batch as black pixels, so its
    neighbours' features do not depend on it. A batch without any other does not run.

    Args:
        backbone: what runs.
        files: all N images.
        batches: rows of ``files`` that go through the backbone together.
        workers: threads that read and decode.
        wanted: (N,): the other images are not read; their hash and error are empty.
        known: asked with a content hash, by several threads; a photo that is known is read, for
            its hash, and not decoded.

    Raises:
        MlcError: none of a batch's images has finite features, at least two and half of the
            batch, and no image before had: the model is broken. Otherwise such an image is bad.
            Or not one image fits the GPU's memory.
    """
    trusted, run = False, FittingBatches(backbone)
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        submitted = (_submit(pool, backbone, files, rows, wanted, known) for rows in batches)
        try:
            for loading in _loading_ahead(submitted):
                batch = _infer(backbone, run, loading)
                trusted = trusted or _has_finite(batch, backbone)
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)


def _loading_ahead(submitted: Iterable[_Loading]) -> Iterator[_Loading]:
    """Hold each batch back until those after it are on their way too."""
    waiting: deque[_Loading] = deque()
    for loading in submitted:
        waiting.append(loading)
        if len(waiting) > BATCHES_AHEAD:
            yield waiting.popleft()
    yield from waiting


def _submit(
    pool: ThreadPoolExecutor,
    backbone: Backbone,
    files: Sequence[Path],
    rows: range,
    wanted: NDArray[np.bool_] | None,
    known: Callable[[str], bool],
) -> _Loading:
    key = backbone.key
    shape = (len(key.views), len(rows), key.size_px, key.size_px, 3)
    pixels = np.zeros(shape, dtype=np.uint8)
    loads = [
        pool.submit(
            load_image,
            files[row],
            key.interpolation,
            key.views,
            pixels[:, place],
            known,
            DECODERS[key.decode],
        )
        if wanted is None or wanted[row]
        else None
        for place, row in enumerate(rows)
    ]
    return _Loading(rows, pixels, loads)


def _infer(backbone: Backbone, run: FittingBatches, loading: _Loading) -> FeatureBatch:
    with span("wait"):
        images = [UNREAD if load is None else load.result() for load in loading.loads]
    decoded = np.array([image.decoded for image in images], dtype=np.bool_)
    start = perf_counter()
    if decoded.any():
        with span("infer"):
            features, finite = _run_views(run, loading.pixels)
        infer = perf_counter() - start
    else:
        shape = (len(images), len(backbone.key.views))
        features = {
            name: torch.zeros(*shape, *item, device=backbone.device)
            for name, item in backbone.arrays.items()
        }
        finite, infer = np.ones(len(images), dtype=np.bool_), 0.0
    broken = decoded & ~finite
    return FeatureBatch(
        rows=loading.rows,
        features=features,
        content_hash=np.array([image.content_hash for image in images]),
        error=np.where(broken, NOT_FINITE, [image.error for image in images]),
        decoded=decoded,
        seconds={
            "read": sum(image.read_seconds for image in images),
            "decode": sum(image.decode_seconds for image in images),
            "infer": infer,
        },
    )


@torch.inference_mode()
def _run_views(
    run: FittingBatches, pixels: NDArray[np.uint8]
) -> tuple[dict[str, Tensor], NDArray[np.bool_]]:
    """Return the features (B, V, ...) of pixels (V, B, S, S, 3), and which rows (B,) are finite.

    Rows that are not finite become zeros.
    """
    views = [run(view) for view in pixels]
    if len(views) == 1:
        features = {name: values[:, None] for name, values in views[0].items()}
    else:
        features = {name: torch.stack([view[name] for view in views], 1) for name in views[0]}
    finite = np.ones(pixels.shape[1], dtype=np.bool_)
    for values in features.values():
        # A sum is cheap, and never finite if a term is not; only then is each row looked at.
        if not torch.isfinite(values.sum()):
            finite &= torch.isfinite(values.flatten(1)).all(1).cpu().numpy()
    if not finite.all():
        for values in features.values():
            values[torch.from_numpy(~finite).to(values.device)] = 0
    return features, finite


def _has_finite(batch: FeatureBatch, backbone: Backbone) -> bool:
    """Return whether an image of a batch has finite features; raise if that is why none has."""
    broken = int((batch.error == NOT_FINITE).sum())
    if broken == int(batch.decoded.sum()) and broken >= max(2, len(batch.rows) / 2):
        raise MlcError(
            f"{backbone.name}: none of the first {broken} images has finite features, in "
            f"{backbone.key.precision}: the weights are broken or the precision is too low; "
            "pass --set precision=float32, or other --weights"
        )
    return broken < int(batch.decoded.sum())
