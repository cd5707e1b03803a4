"""The weights and images that the golden values of the official Query2Label models are made with.

Every tensor is drawn from its name, so that a swapped name, a lost sign or a wrong layout shows.
"""

import math
import zlib
from collections.abc import Sequence

import golden
import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.swin_transformer import SwinTransformerBlock, get_relative_position_index
from torch import Tensor

NAMES = (
    "Q2L-R101-448",
    "Q2L-R101-576",
    "Q2L-TResL-448",
    "Q2L-TResL_22k-448",
    "Q2L-SwinL-384",
    "Q2L-CvT_w24-384",
)
BACKBONE = "backbone.0."
WINDOW = 12  # of Swin-L


def weights(name: str, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a golden file's model whose official names begin so, by these names."""
    keys = golden.load(f"q2l/{name}.json")["keys"]
    return {
        key: tensor(key, shape, dtype)
        for key, (shape, dtype) in keys.items()
        if key.startswith(prefix)
    }


def image(seed: str, index: int, size: int) -> Tensor:
    """A made image (3, size, size) float32 as it goes into the model, by a golden file's seed."""
    rng = generator(f"{seed}-{index}")
    low = rng.standard_normal((3, 8, 8), dtype=np.float32)
    cell = math.ceil(size / 8)
    coarse = low.repeat(cell, axis=1).repeat(cell, axis=2)[:, :size, :size]
    grain = rng.standard_normal((3, size, size), dtype=np.float32)
    return torch.from_numpy(coarse + np.float32(0.25) * grain)


def generator(text: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(text.encode())))


def tensor(key: str, shape: Sequence[int], dtype: str) -> Tensor:
    leaf = key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.tensor(0)
    if leaf == "relative_position_index":
        return get_relative_position_index(WINDOW, WINDOW)
    if leaf == "attn_mask":
        return shift_mask(math.isqrt(shape[0]) * WINDOW)
    if leaf == "pe":
        return torch.from_numpy(position_code(*shape[1:]))
    assert dtype == "float32", key
    v = generator(key).standard_normal(math.prod(shape), dtype=np.float32).reshape(shape)
    return torch.from_numpy(np.asarray(scaled(key, leaf, v), dtype=np.float32))


def scaled(key: str, leaf: str, v: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a tensor is, of standard normal numbers of its shape."""
    if leaf == "running_var":
        return 1 + 0.1 * v**2
    if leaf == "running_mean":
        return 0.1 * v
    if leaf == "relative_position_bias_table":
        return 0.5 * v
    if leaf == "cls_token" or key == "query_embed.weight":
        return v
    if leaf in ("weight", "W", "in_proj_weight") and v.ndim > 1:
        return v / np.float32(np.sqrt(v.shape[-1] if leaf == "W" else math.prod(v.shape[1:])))
    if leaf == "weight":
        return np.where(v < -1, -1, 1) * (1 + 0.1 * v)
    return 0.05 * v


def shift_mask(grid: int) -> Tensor:
    """timm's mask of the windows of Swin-L's shifted blocks on a grid of so many places a side."""
    block = SwinTransformerBlock(8, (grid, grid), 2, window_size=WINDOW, shift_size=WINDOW // 2)
    mask = block.get_attn_mask(dtype=torch.float32)
    assert mask is not None
    return mask


def position_code(dim: int, height: int, width: int) -> NDArray[np.float32]:
    """The sine position code (1, dim, height, width): half for the row, half for the column."""
    half = dim // 2
    wavelength = 10000.0 ** (2 * (np.arange(half) // 2) / half)

    def code(count: int) -> NDArray[np.float64]:
        angle = 2 * np.pi * np.arange(1, count + 1) / (count + 1e-6) / wavelength[:, None]
        return np.where(np.arange(half)[:, None] % 2, np.cos(angle), np.sin(angle))

    rows = np.broadcast_to(code(height)[:, :, None], (half, height, width))
    columns = np.broadcast_to(code(width)[:, None, :], (half, height, width))
    return np.concatenate([rows, columns])[None].astype(np.float32)
