"""The pipeline: threads read and decode ahead while backbones run on the batch before."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.configs.device import torch_threads
from mlc.configs.errors import MlcError
from mlc.extract.backbone import Backbone
from mlc.extract.decoders import choose_decoder
from mlc.extract.fitting import FittingBatches
from mlc.extract.images import LoadedImage, load_image, never
from mlc.extract.lanes import fewest
from mlc.extract.profile import span
from mlc.extract.views import Squares

T = TypeVar("T")

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
        seconds: time spent on "read", "decode" (both summed over threads, and for all backbones
            together) and "infer".
    """

    rows: range
    features: dict[str, Tensor]
    content_hash: NDArray[np.str_]
    error: NDArray[np.str_]
    decoded: NDArray[np.bool_]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Asked:
    """What is asked of a backbone.

    Attributes:
        backbone: what runs.
        wanted: (N,) bool: it does not see the other images; their hash and error are empty.
            None wants all.
        known: asked with a content hash, by several threads; a photo that is known is read, for
            its hash, and not decoded.
    """

    backbone: Backbone
    wanted: NDArray[np.bool_] | None = None
    known: Callable[[str], bool] = never

    def wants(self, rows: range) -> NDArray[np.bool_]:
        """Return which of some rows are wanted, (B,)."""
        if self.wanted is None:
            return np.ones(len(rows), dtype=np.bool_)
        return self.wanted[rows.start : rows.stop]


@dataclass(frozen=True)
class _Loading:
    """A batch on its way: pixels (V, B, S, S, 3), what becomes of each file, who wants it."""

    rows: range
    wants: list[NDArray[np.bool_]]
    pixels: dict[Squares, NDArray[np.uint8]]
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
    """Yield the features of batches of images, in order; see ``Asked`` and ``stream_each``."""
    asked = Asked(backbone, wanted, known)
    for (batch,) in stream_each([asked], files, batches, workers):
        yield batch


def stream_each(
    asked: Sequence[Asked], files: Sequence[Path], batches: Iterable[range], workers: int
) -> Iterator[list[FeatureBatch]]:
    """Yield the features that each of several backbones gives of batches of images, in order.

    A photo is read and decoded once for all of them. One that is bad, not wanted or known takes
    its place in the batch as black pixels, or as what another backbone with the same input wants
    there; its neighbours' features do not depend on it. A batch without any other does not run.
    On a CPU several batches run at once, see ``Lanes``; meanwhile torch has fewer threads in the
    caller's thread too.

    Args:
        asked: of each backbone; all decode the same way.
        files: all N images.
        batches: rows of ``files`` that go through the backbones together.
        workers: threads that read and decode.

    Raises:
        MlcError: none of a batch's images has finite features, at least two and half of the
            batch, and no image before had: the model is broken. Otherwise such an image is bad.
            Or not one image fits the GPU's memory.
    """
    runs = [FittingBatches(each.backbone) for each in asked]
    trusted = [False] * len(asked)
    lanes = fewest(each.backbone.lanes for each in asked)
    with (
        torch_threads(lanes.threads),
        ThreadPoolExecutor(workers, thread_name_prefix="decode") as decoders,
        ThreadPoolExecutor(lanes.count, thread_name_prefix="infer") as runners,
    ):
        loading = (_submit(decoders, asked, files, rows) for rows in batches)
        running = (
            runners.submit(_infer_each, asked, runs, batch)
            for batch in _held_back(loading, BATCHES_AHEAD)
        )
        try:
            for parts in _held_back(running, lanes.count):
                done = parts.result()
                for index, (each, batch) in enumerate(zip(asked, done, strict=True)):
                    trusted[index] = trusted[index] or _has_finite(batch, each.backbone)
                yield done
        finally:
            decoders.shutdown(wait=False, cancel_futures=True)
            runners.shutdown(wait=False, cancel_futures=True)


def _held_back(items: Iterable[T], count: int) -> Iterator[T]:
    """Hold each item back until so many after it are on their way too."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _submit(
    pool: ThreadPoolExecutor, asked: Sequence[Asked], files: Sequence[Path], rows: range
) -> _Loading:
    """Have the images of a batch loaded that any backbone wants, as those that want some see it."""
    wants = [each.wants(rows) for each in asked]
    pixels = {
        each.backbone.squares: each.backbone.squares.blank(len(rows))
        for each, wanted in zip(asked, wants, strict=True)
        if wanted.any()
    }
    first = asked[0].backbone
    decode = choose_decoder(first.key.decode, first.device)
    loads: list[Future[LoadedImage] | None] = []
    for place, row in enumerate(rows):
        askers = [each for each, wanted in zip(asked, wants, strict=True) if wanted[place]]
        squares = {each.backbone.squares for each in askers}
        places = {each: array[:, place] for each, array in pixels.items() if each in squares}
        known = partial(_known_to_all, askers)
        loads.append(pool.submit(load_image, files[row], places, known, decode) if askers else None)
    return _Loading(rows, wants, pixels, loads)


def _known_to_all(asked: Sequence[Asked], content_hash: str) -> bool:
    return all(each.known(content_hash) for each in asked)


def _infer_each(
    asked: Sequence[Asked], runs: Sequence[FittingBatches], loading: _Loading
) -> list[FeatureBatch]:
    """Run a batch through all backbones, as soon as it is decoded."""
    with span("wait"):
        images = [UNREAD if load is None else load.result() for load in loading.loads]
    return [
        _infer(each.backbone, run, loading, wanted, images)
        for each, run, wanted in zip(asked, runs, loading.wants, strict=True)
    ]


def _infer(
    backbone: Backbone,
    run: FittingBatches,
    loading: _Loading,
    wanted: NDArray[np.bool_],
    images: Sequence[LoadedImage],
) -> FeatureBatch:
    """Run a batch through one backbone, as if there were no other."""
    own = [each if want else UNREAD for each, want in zip(images, wanted, strict=True)]
    decoded = np.array([image.decoded for image in own], dtype=np.bool_)
    start = perf_counter()
    if decoded.any():
        with span("infer"):
            features, finite = _run_views(run, loading.pixels[backbone.squares])
        infer = perf_counter() - start
    else:
        shape = (len(own), len(backbone.key.views))
        features = {
            name: torch.zeros(*shape, *item, device=backbone.device)
            for name, item in backbone.arrays.items()
        }
        finite, infer = np.ones(len(own), dtype=np.bool_), 0.0
    broken = decoded & ~finite
    return FeatureBatch(
        rows=loading.rows,
        features=features,
        content_hash=np.array([image.content_hash for image in own]),
        error=np.where(broken, NOT_FINITE, [image.error for image in own]),
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
