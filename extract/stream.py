"""The pipeline: threads read and decode ahead while the backbone runs on the batch before."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from mlc.extract.backbone import Backbone
from mlc.extract.images import LoadedImage, load_image

BATCHES_AHEAD = 2  # bounds memory: 2 x 64 images of 448 px are 77 MB


@dataclass(frozen=True)
class FeatureBatch:
    """Features of some rows.

    Attributes:
        rows: which of the listed images.
        features: (B, D) float32; meaningless where there is an error.
        content_hash: (B,) text.
        error: (B,) text, empty where the image is good.
        seconds: time spent on "read", "decode" (both summed over threads) and "infer".
    """

    rows: range
    features: NDArray[np.float32]
    content_hash: NDArray[np.str_]
    error: NDArray[np.str_]
    seconds: dict[str, float]


def stream_features(
    backbone: Backbone, files: Sequence[Path], batches: Iterable[range], workers: int
) -> Iterator[FeatureBatch]:
    """Yield the features of batches of images, in order.

    A bad image takes its place in the batch as black pixels, so its neighbours' features do not
    depend on it.

    Args:
        backbone: what runs.
        files: all images.
        batches: rows of ``files`` that go through the backbone together.
        workers: threads that read and decode.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        ahead: deque[tuple[range, NDArray[np.uint8], list[Future[LoadedImage]]]] = deque()
        try:
            for rows in batches:
                ahead.append(_submit(pool, backbone, files, rows))
                if len(ahead) > BATCHES_AHEAD:
                    yield _infer(backbone, *ahead.popleft())
            while ahead:
                yield _infer(backbone, *ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _submit(
    pool: ThreadPoolExecutor, backbone: Backbone, files: Sequence[Path], rows: range
) -> tuple[range, NDArray[np.uint8], list[Future[LoadedImage]]]:
    size_px = backbone.key.size_px
    pixels = np.zeros((len(rows), size_px, size_px, 3), dtype=np.uint8)
    loads = [
        pool.submit(load_image, files[row], backbone.key.interpolation, place)
        for row, place in zip(rows, pixels, strict=True)
    ]
    return rows, pixels, loads


def _infer(
    backbone: Backbone, rows: range, pixels: NDArray[np.uint8], loads: list[Future[LoadedImage]]
) -> FeatureBatch:
    images = [load.result() for load in loads]
    start = perf_counter()
    features = backbone.features(pixels)
    seconds = {
        "read": sum(image.read_seconds for image in images),
        "decode": sum(image.decode_seconds for image in images),
        "infer": perf_counter() - start,
    }
    return FeatureBatch(
        rows=rows,
        features=features,
        content_hash=np.array([image.content_hash for image in images]),
        error=np.array([image.error for image in images]),
        seconds=seconds,
    )
