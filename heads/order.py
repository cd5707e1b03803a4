"""The order of images and views in training, from ``order_seed`` alone."""

import numpy as np
import torch
from torch import Tensor

VIEWS_STREAM = 0x9E3779B9  # apart from that of the batches: torch keeps 32 bits of a seed


def order_generators(order_seed: int) -> tuple[torch.Generator, torch.Generator]:
    """Return the generators of the batches, and of the views in which their images are seen."""
    return (
        torch.Generator().manual_seed(order_seed),
        torch.Generator().manual_seed(order_seed ^ VIEWS_STREAM),
    )


def stream_seed(*numbers: int) -> int:
    """Return a seed of torch's for some numbers, as a seed, a step and a part of it."""
    # With their count, as numpy takes (7,) and (7, 0) for the same.
    return int(
        np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0] >> 1
    )


def batches_of_epoch(images: int, batch_size: int, order: torch.Generator) -> Tensor:
    """Return (steps, B) rows in random order; the last partial batch is dropped.

    A set smaller than a batch is one batch.
    """
    batch_size = min(batch_size, images)
    steps = images // batch_size
    return torch.randperm(images, generator=order)[: steps * batch_size].view(steps, batch_size)
