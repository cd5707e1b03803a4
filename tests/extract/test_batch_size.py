"""fit_batch_size(): what suits a CPU, and what fits a GPU."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mlc.extract import batch_size
from mlc.extract.batch_size import CPU_BATCH, fit_batch_size


@dataclass
class Network:
    """A forward pass on a GPU that fits so many images, and what was tried on it."""

    fits: int
    size_px: int = 224
    kind: str = "cuda"
    tried: list[int] = field(default_factory=list)

    @property
    def device(self) -> Any:
        return SimpleNamespace(type=self.kind)

    @property
    def reader(self) -> Any:
        return SimpleNamespace(network=SimpleNamespace(size_px=self.size_px))

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        self.tried.append(len(pixels))
        if len(pixels) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {}


@pytest.fixture(autouse=True)
def small_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "sample_pixels", lambda _, count: torch.zeros(count, 1))


def test_a_cpu_takes_what_its_caches_hold_and_nothing_is_tried() -> None:
    network = Network(1000, kind="cpu")
    assert fit_batch_size(network) == CPU_BATCH
    assert not network.tried


@pytest.mark.parametrize(
    ("size_px", "most"), [(32, 256), (224, 256), (225, 128), (448, 64), (576, 32), (5000, 1)]
)
def test_larger_images_go_in_smaller_batches(size_px: int, most: int) -> None:
    network = Network(1000, size_px)
    assert fit_batch_size(network) == most
    assert network.tried in ([most], [])


@pytest.mark.parametrize(("fits", "size"), [(300, 256), (255, 128), (64, 64), (3, 2), (1, 1)])
def test_a_batch_is_halved_until_it_fits(fits: int, size: int) -> None:
    assert fit_batch_size(Network(fits)) == size


def test_an_image_that_does_not_fit_is_left_to_be_told_when_it_runs() -> None:
    assert fit_batch_size(Network(0)) == 1
