"""Stored numbers: features as float32, float16 or int8, and what that costs.

An int8 value q stands for ``q * scale``, with one float32 scale a channel and no zero point. Every
function works on the device of its tensors. Features are finite here: NaN and infinity are
refused before.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.configs.errors import MlcError, choose
from mlc.store.backend import Array

DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}

LARGEST_FLOAT16 = 65504.0
LARGEST_INT8 = 127  # -128 is left out, so that a value and its negative cost the same

SAMPLE_IMAGES = 256  # that int8 is calibrated with, or fewer if they are large
SAMPLE_BYTES = 128 << 20  # of float32: calibration takes seconds for each 100 MB

# Clips that are tried, as multiples of a channel's largest value, by quarter octaves.
CLIPS = tuple(2 ** (-step / 4) for step in range(-8, 9))
TAIL = 16  # at most so many of a channel's largest values say how fast its tail falls
ENOUGH = 32  # values that are not 0; fewer tell little about the range of a channel
RARE = 10_000  # one value in so many may be an outlier
GAP = 8  # an outlier is more than so many times the largest value that is none


@dataclass(frozen=True)
class Cost:
    """How far stored features are from what they were.

    Attributes:
        cosine_mean: cosine similarity of an item to what it was, mean over the items.
        cosine_worst: of the item that changed most.
        max_difference: largest absolute difference of any value, in the feature's unit.
        relative_rms: root mean square of the differences over that of the values.
    """

    cosine_mean: float
    cosine_worst: float
    max_difference: float
    relative_rms: float


def encode(
    values: Tensor, dtype: str, scale: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return values as they are stored, and how many of each image and view were clipped.

    float16 rounds half to even; beyond +-65504 a value is clipped to that, never infinite.
    int8 is ``values / scale``, rounded half to even and clipped to +-127; counted as clipped are
    the values that rounding alone does not bring there, those beyond +-127.5 steps.

    Args:
        values: (B, V, ..., C) float32, finite.
        dtype: a name in ``DTYPES``.
        scale: (C,) float32, positive, from ``calibrate``; float32 and float16 ignore it.
        out: (B, V, ..., C) on the device, to be filled with the stored values.

    Returns:
        (B, V, ..., C) stored values, ``out`` if given, else of float32 the very tensor;
        (B, V) int64 counts of clipped values.

    Raises:
        MlcError: no such dtype, or int8 without a scale.

    >>> encode(torch.tensor([[[0.24, -0.26, 90.0]]]), "int8", torch.full((3,), 0.5))
    (tensor([[[  0,  -1, 127]]], dtype=torch.int8), tensor([[1]]))
    """
    stored_dtype = choose(DTYPES, dtype, "dtype of features")
    clipped = torch.zeros(values.shape[:2], dtype=torch.int64, device=values.device)
    if dtype == "float32":
        return values if out is None else out.copy_(values), clipped
    device = values.device
    stored = torch.empty(values.shape, dtype=stored_dtype, device=device) if out is None else out
    sources, targets, counts = values.flatten(0, 1), stored.flatten(0, 1), clipped.flatten()
    for block in _blocks(sources):
        fitting, beyond = _fit(sources[block], None if dtype == "float16" else _given(scale))
        targets[block], counts[block] = fitting, beyond
    return stored, clipped


def _given(scale: Tensor | None) -> Tensor:
    if scale is None:
        raise MlcError("int8: expected a scale for each channel, got none; calibrate one first")
    return scale


def _fit(values: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return values in float16's range, or steps in int8's; (n,) how many of each were beyond."""
    if scale is None:
        beyond = _beyond(values, LARGEST_FLOAT16)
        return values.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16) if beyond.any() else values, beyond
    steps = values / scale
    beyond = _beyond(steps, LARGEST_INT8 + 0.5)
    return steps.round_().clamp_(-LARGEST_INT8, LARGEST_INT8), beyond


def _beyond(values: Tensor, limit: float) -> Tensor:
    """Return (n,) how many values of each item are beyond +-limit."""
    if not values.is_cuda:  # which would be waited for
        low, high = torch.aminmax(values)
        if -limit <= low and high <= limit:
            return torch.zeros(len(values), dtype=torch.int64)
    # Ones and zeros in float32 add up five times as fast as bools, and exactly up to 2**24.
    return values.abs().gt_(limit).flatten(1).sum(1)


def _blocks(values: Tensor) -> list[slice]:
    """Return blocks of the first axis to work on one after the other.

    On a CPU the temporaries of a block then stay in its cache, and in its allocator: whole batches
    spend most of their time on fresh pages. A GPU needs more work for each launch.
    """
    size = 2**24 if values.is_cuda else 2**20
    rows = max(1, size * len(values) // max(1, values.numel()))
    return [slice(start, start + rows) for start in range(0, len(values), rows)]


def decode(
    stored: Tensor, scale: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the values that stored ones stand for.

    Args:
        stored: (..., C) float32, float16 or int8.
        scale: (C,) float32 for int8, else None.
        dtype: of what is returned; a value beyond its range becomes infinite.

    Returns:
        (..., C), the very tensor that was given where there is nothing to do.

    >>> decode(torch.tensor([[0, -1, 127]], dtype=torch.int8), torch.full((3,), 0.5))
    tensor([[ 0.0000, -0.5000, 63.5000]])
    """
    if stored.dtype != torch.int8:
        return stored.to(dtype)
    return stored.to(torch.float32).mul_(_given(scale)).to(dtype)


def decode_numpy(stored: Array, scale: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Return the values that stored ones stand for: ``decode`` for arrays, as fast.

    numpy itself widens float16 thirty times as slowly as torch.

    Args:
        stored: (..., C) float32, float16 or int8.
        scale: (C,) float32 for int8, else None.

    Returns:
        (..., C) float32, ``stored`` itself where there is nothing to do.
    """
    if stored.dtype == np.float32:
        return stored
    # torch warns of an array that it must not write to.
    source = torch.from_numpy(stored if stored.flags.writeable else stored.copy())
    values: NDArray[np.float32] = decode(
        source, None if scale is None else torch.tensor(scale)
    ).numpy()
    return values


def choose_sample(images: int, image_values: int) -> NDArray[np.intp]:
    """Return which of some images scales are chosen with: the same every time, spread evenly.

    Args:
        images: to choose from, at least 1.
        image_values: numbers of an image's features.
    """
    most = max(1, SAMPLE_BYTES // (image_values * np.dtype(np.float32).itemsize))
    count = min(images, SAMPLE_IMAGES, most)
    return np.linspace(0, images - 1, count).round().astype(np.intp)


def calibrate(sample: Tensor) -> Tensor:
    """Return the scale of each channel that loses least, on a sample and on images like it.

    The largest int8 stands for the clip, ``scale = clip / 127``. Of 17 clips, from 4 times a
    channel's largest absolute value x down to a quarter of it, the one with the least sum of two
    errors is taken:

    - the squared error of storing and reading the sample, the line search of Choukroun et al.,
      ICCV Workshops 2019, https://arxiv.org/abs/1902.06822: the few values of a heavy tail
      (features after a ReLU) are clipped where that leaves all others more precision;
    - what one more value would be expected to lose, were it beyond x: ``2 t**2 exp(-h / t)`` where
      the clip is h >= 0 above x, for an exponential tail (as Banner et al., NeurIPS 2019,
      https://arxiv.org/abs/1810.05723 take the clipped part) whose mean t is how far an eighth of
      the values, 16 at most, exceed the next. It leaves room above a small sample, which other
      images exceed often, and is nothing beside the errors of a large one.

    The squared error alone is not safe from outliers: it gives up a whole channel to keep one value
    of 1e4. So some are left aside: at most one of each 10,000 values that are not 0 (and never less
    than one), where it is more than 8 times the largest of the others. Zeros are not counted, so
    that a channel which seldom fires keeps its firing.

    A channel with fewer than 32 values that are not 0 (or with any 0, in a smaller sample) tells
    too little: it has no outliers, and a scale no smaller than the median of the channels. That
    goes for a channel that is 0 everywhere, too, which other images may wake.

    Args:
        sample: (n, ..., C) float32, finite, n >= 1.

    Returns:
        (C,) float32, positive.

    >>> values = torch.arange(-63.5, 64)
    >>> 127 * calibrate(torch.stack([values, values / 1000, 0 * values], dim=1))
    tensor([89.8026,  0.0898,  0.0898])
    """
    channels = sample.flatten(0, -2).T
    # Copied by blocks of channels, so that memory does not grow with the sample.
    found = [_least_error(channels[block].abs().contiguous()) for block in _blocks(channels)]
    scale, seen = (torch.cat(each) for each in zip(*found, strict=True))
    fired = scale[seen > 0]
    typical = fired.median() if len(fired) else torch.ones_like(scale[0]) / LARGEST_INT8
    return torch.where(seen < min(ENOUGH, channels.shape[1]), scale.maximum(typical), scale)


def _least_error(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Return (c,) the scale with the least error, and how many values are not 0, of (c, n)."""
    seen = magnitudes.sign().sum(1).long()
    magnitudes = _without_outliers(magnitudes, seen)
    # Never so small that a step, or a division by it, leaves the normal numbers.
    largest = magnitudes.amax(1).clamp(min=2**10 * torch.finfo(torch.float32).tiny)
    excess = _excess(magnitudes, seen) / largest
    errors = [
        _sample_error(magnitudes, largest, clip) + _unseen_error(excess, clip) for clip in CLIPS
    ]
    clips = torch.tensor(CLIPS, device=largest.device)
    return largest * clips[torch.stack(errors).argmin(0)] / LARGEST_INT8, seen


def _without_outliers(magnitudes: Tensor, seen: Tensor) -> Tensor:
    """Return (c, n) with 0, which costs nothing at any scale, where an outlier is."""
    outliers = torch.where(seen >= ENOUGH, (seen + RARE - 1) // RARE, 0)
    most = int(outliers.max())
    ordinary = magnitudes.topk(most + 1, dim=1).values.gather(1, outliers[:, None])
    return magnitudes.where(magnitudes <= GAP * ordinary, 0)


def _excess(magnitudes: Tensor, seen: Tensor) -> Tensor:
    """Return (c,) how far the largest of (c, n) values exceed the next one, on average."""
    count = (seen + 7).div(8, rounding_mode="floor").clamp(1, TAIL)[:, None]
    top = magnitudes.topk(min(TAIL + 1, magnitudes.shape[1]), dim=1).values
    top = torch.nn.functional.pad(top, (0, 1))  # a lone value exceeds 0
    return (top.cumsum(1).gather(1, count - 1) / count - top.gather(1, count))[:, 0]


def _sample_error(magnitudes: Tensor, largest: Tensor, clip: float) -> Tensor:
    """Return (c,) the summed squared errors of storing (c, n), in units of the largest value."""
    scale = clip / LARGEST_INT8
    steps = magnitudes / (largest * scale)[:, None]
    return steps.round().clamp_(max=LARGEST_INT8).sub_(steps).square_().sum(1) * scale**2


def _unseen_error(excess: Tensor, clip: float) -> Tensor:
    """Return (c,) the squared error to expect of one value beyond the largest, in its units."""
    excess = excess.clamp(min=1e-6)  # of a channel without a tail
    return 2 * excess.square() * (-max(clip - 1, 0) / excess).exp()


def cost(original: Tensor, restored: Tensor) -> Cost:
    """Return how far restored features are from the original ones.

    Args:
        original: (n, ...) float32; an item, the unit of the cosine, is one of the n >= 1.
        restored: the same shape, float32, as ``decode`` returns it. Items that are both 0 have a
            cosine of 1, else 0 has a cosine of 0.
    """
    was, now = original.flatten(1), restored.flatten(1)
    sums = torch.cat([_sums(was[block], now[block]) for block in _blocks(was)], dim=1)
    dot, was_square, now_square, difference_square, largest = sums
    norms = (was_square * now_square).sqrt()
    cosine = torch.where(norms > 0, dot / norms, (was_square == now_square).double()).clamp(-1, 1)
    lost, whole = difference_square.sum().sqrt().item(), was_square.sum().sqrt().item()
    return Cost(
        cosine_mean=cosine.mean().item(),
        cosine_worst=cosine.min().item(),
        max_difference=largest.max().item(),
        relative_rms=lost / whole if whole > 0 else 0.0 if lost == 0 else math.inf,
    )


def _sums(was: Tensor, now: Tensor) -> Tensor:
    """Return (5, n) float64: dot product, squared norms, squared and largest difference."""
    was, now = was.double(), now.double()
    difference = (now - was).abs_()
    pairs = ((was, now), (was, was), (now, now), (difference, difference))
    return torch.stack([*((one * other).sum(1) for one, other in pairs), difference.amax(1)])
