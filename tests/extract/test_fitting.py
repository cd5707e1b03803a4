"""Batches that do not fit are halved, and nothing of them is lost."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.configs.errors import MlcError
from mlc.extract.fitting import FittingBatches


class Gpu:
    """A backbone that gives each image's mean, on a GPU that fits so many images."""

    name = "big"

    def __init__(self, fits: int) -> None:
        self.fits, self.tried, self.made_for = fits, list[int](), list[int]()

    def for_batches(self, batch_size: int) -> "Gpu":
        self.made_for.append(batch_size)
        return self

    def features(self, pixels: NDArray[np.uint8]) -> dict[str, Tensor]:
        self.tried.append(len(pixels))
        if len(pixels) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")
        return {"a/pooled": torch.from_numpy(pixels).float().mean((1, 2, 3))[:, None]}


def fitting(gpu: Any) -> FittingBatches:
    return FittingBatches(gpu)


def pixels(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, 2, 2, 3)).astype(np.uint8)


@pytest.mark.parametrize("count", [1, 7, 8, 64])
@pytest.mark.parametrize("fits", [1, 3, 8, 100])
def test_features_are_those_of_the_whole_batch(count: int, fits: int) -> None:
    run, whole = fitting(Gpu(fits)), Gpu(1000)
    for _ in range(2):
        got = run(pixels(count))
        torch.testing.assert_close(got, whole.features(pixels(count)), rtol=0, atol=0)


def test_what_did_not_fit_is_not_tried_again() -> None:
    gpu = Gpu(3)
    run = fitting(gpu)
    run(pixels(16))
    assert gpu.tried == [16, 8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert gpu.made_for == [8, 4, 2]  # or an engine would fill smaller ones up, and not fit again
    gpu.tried.clear()
    run(pixels(5))
    assert gpu.tried == [2, 2, 1]


def test_an_image_that_does_not_fit_is_told() -> None:
    told = r"big: not one image of 2 px fits the GPU's memory \(CUDA out of memory. Tried .* GiB.\)"
    with pytest.raises(MlcError, match=told):
        fitting(Gpu(0))(pixels(4))


def test_other_errors_are_raised_as_they_are() -> None:
    class Broken(Gpu):
        def features(self, pixels: NDArray[np.uint8]) -> dict[str, Tensor]:
            raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        fitting(Broken(1))(pixels(4))
