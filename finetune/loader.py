"""stream_images(): threads read, decode and augment images while the model is on those before."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.extract.images import Decode, LoadedImage, as_shown, decode_views, load_image, open_image
from mlc.extract.views import Squares
from mlc.finetune.augment import AugmentConfig, augment
from mlc.heads.order import stream_seed

BATCHES_AHEAD = 3


@dataclass(frozen=True)
class Photo:
    """An image that is asked for.

    Attributes:
        path: the file.
        decode: gives its square.
    """

    path: Path
    decode: Decode


@dataclass(frozen=True)
class ImageBatch:
    """Squares of some images.

    Attributes:
        pixels: (B, S, S, 3) uint8 on the device, black where an image is bad.
        good: (B,) bool.
        errors: the reason of each bad image, by its place in the batch.
    """

    pixels: Tensor
    good: NDArray[np.bool_]
    errors: dict[int, str]


def stream_images(
    batches: Iterable[Sequence[Photo]], squares: Squares, workers: int, device: torch.device
) -> Iterator[ImageBatch]:
    """Yield batches of images in order; what they are does not depend on the workers.

    Args:
        batches: what is asked for; an empty batch has no images.
        squares: side and interpolation.
        workers: threads.
        device: of the pixels; to a GPU they are copied from pinned memory, beside its work.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        waiting: deque[tuple[Tensor, list[Future[LoadedImage]]]] = deque()
        try:
            for batch in batches:
                waiting.append(_submit(pool, batch, squares, pinned=device.type == "cuda"))
                if len(waiting) > BATCHES_AHEAD:
                    yield _finish(*waiting.popleft(), device)
            while waiting:
                yield _finish(*waiting.popleft(), device)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def plain(path: Path) -> Photo:
    """Return an image as evaluation sees it."""
    return Photo(path, decode_views)


def augmented(path: Path, config: AugmentConfig, *seed: int) -> Photo:
    """Return an image as a step sees it.

    Args:
        path: the file.
        config: of the augmentation.
        seed: numbers that tell this look at the image from all others.
    """
    return Photo(path, partial(_decode_augmented, config, seed))


def _decode_augmented(
    config: AugmentConfig, seed: Sequence[int], data: bytes, *asked: Squares
) -> Iterator[NDArray[np.uint8]]:
    with open_image(data) as image:
        shown = as_shown(image)
    random = np.random.default_rng(stream_seed(*seed))
    for each in asked:
        yield augment(shown, each.size_px, each.interpolation, config, random)


def _submit(
    pool: ThreadPoolExecutor, batch: Sequence[Photo], squares: Squares, *, pinned: bool
) -> tuple[Tensor, list[Future[LoadedImage]]]:
    shape = (len(batch), squares.size_px, squares.size_px, 3)
    pixels = torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned)
    places = pixels.numpy()
    loads = [
        pool.submit(
            load_image, photo.path, {squares: places[index : index + 1]}, decode=photo.decode
        )
        for index, photo in enumerate(batch)
    ]
    return pixels, loads


def _finish(pixels: Tensor, loads: list[Future[LoadedImage]], device: torch.device) -> ImageBatch:
    loaded = [load.result() for load in loads]
    errors = {index: each.error for index, each in enumerate(loaded) if not each.decoded}
    good = np.array([each.decoded for each in loaded], dtype=np.bool_)
    return ImageBatch(pixels.to(device, non_blocking=True), good, errors)
