"""Pace: how fast images are trained on, and how much of the time is spent waiting for them."""

import time
from collections.abc import Iterator
from typing import TypeVar

import torch

T = TypeVar("T")

GB = 1e9


class Pace:
    """Counts of the epoch so far, in this process; images in all of them.

    Args:
        device: of training.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.restart()

    def restart(self) -> None:
        """Begin to count anew."""
        self._start, self._waited, self._images = time.perf_counter(), 0.0, 0

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield batches, and count the time until each is there."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, images: int) -> None:
        """Count images that were trained on."""
        self._images += images

    @property
    def waited(self) -> float:
        """Return the share of the time that was spent waiting for images."""
        return self._waited / max(self._seconds, 1e-9)

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._start

    def line(self) -> dict[str, float]:
        """Return what a line of ``metrics.jsonl`` says of it."""
        found = {
            "seconds": self._seconds,
            "images_per_second": self._images / max(self._seconds, 1e-9),
            "waited": self.waited,
        }
        if self._device.type == "cuda":
            found["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self._device) / GB
        return found

    def note(self) -> str:
        """Return the same in a few words."""
        found = self.line()
        words = [f"{found['images_per_second']:.1f} images/s", f"waited {found['waited']:.0%}"]
        if "gpu_memory_gb" in found:
            words.append(f"{found['gpu_memory_gb']:.1f} GB")
        return ", ".join(words)
