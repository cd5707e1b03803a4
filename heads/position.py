"""sine_position(): where a token lies on its grid, as a vector."""

import math

import torch
from torch import Tensor

TEMPERATURE = 10_000
EPSILON = 1e-6


def sine_position(grid: tuple[int, int], width: int) -> Tensor:
    """Return the sine position code (T, width) float32 of a grid (H, W), T = H * W, row by row.

    The first half of the width tells the row, the second the column. With the i-th of n rows, from
    1, at the angle 2 pi i / (n + 1e-6), pair k of the w/2 pairs of a half (w wide) holds::

        sin(angle / 10000^(2k / w)), cos(angle / 10000^(2k / w))

    The last row is at 2 pi on every grid: on another one the code is made anew.

    Args:
        grid: H and W.
        width: a multiple of 4.

    Source: Carion et al. 2020 (DETR), https://arxiv.org/abs/2005.12872; as Query2Label's code.
    """
    half = width // 2
    rates = TEMPERATURE ** (2 * torch.arange(half // 2, dtype=torch.float32) / half)
    rows, columns = (_axis(size, rates) for size in grid)
    height, breadth = grid
    return torch.cat(
        [
            rows[:, None].expand(height, breadth, half),
            columns[None].expand(height, breadth, half),
        ],
        dim=2,
    ).reshape(height * breadth, width)


def _axis(size: int, rates: Tensor) -> Tensor:
    angles = torch.arange(1, size + 1, dtype=torch.float32) / (size + EPSILON) * (2 * math.pi)
    phases = angles[:, None] / rates
    return torch.stack([phases.sin(), phases.cos()], dim=2).flatten(1)
