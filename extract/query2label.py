"""The backbones of the official Query2Label models: which of ours, and the names of their tensors.

Tensors are named here as in the authors' files without the leading ``backbone.0.``.

Reference: Liu et al. 2021, https://arxiv.org/abs/2107.10834
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from mlc.configs.errors import MlcError, choose
from mlc.extract.weights import COUNTERS

INTERPOLATION = "bilinear"  # of the resize to a square, which keeps no aspect ratio
# TResNet was trained with InPlaceABN, whose scale is the absolute value of its weight, plus this.
ABN_EPS = 1e-5
SCALE = re.compile(r"\.bn\.weight$")
RENAMINGS = tuple[tuple[str, str], ...]

SWIN_WINDOW = 12
SWIN_SHIFT = 6
SWIN_GRIDS = (96, 48, 24, 12)  # of the stages at 384 px, for which the authors' masks are stored
SWIN_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.norm1\.weight$")


@dataclass(frozen=True)
class OfficialBackbone:
    """An official backbone.

    Attributes:
        backbone: our name of it.
        stride: of its last map: an image of S px has S / stride places along each side.
        renamings: (pattern, replacement), all applied in order: our names -> official ones.
        mean: of the normalisation, per RGB channel, pixels in [0, 1].
        std: of the normalisation.
        abn: its norms were InPlaceABN, see ``ABN_EPS``.
        counters: its file has BatchNorm's counters; frozen BatchNorms have none.
        buffers: our names -> tensors that the file holds and our model computes itself.
    """

    backbone: str
    stride: int
    renamings: RENAMINGS
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    abn: bool = False
    counters: bool = True
    buffers: Callable[[Iterable[str]], dict[str, Tensor]] = lambda names: {}


def from_official(
    backbone: str,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *,
    signed_scales: bool = False,
) -> dict[str, Tensor]:
    """Return an official backbone's tensors as those of our model.

    Args:
        backbone: a name of ``BACKBONES``.
        tensors: of the file.
        wanted: ``state_dict()`` of our model without a classifier; only shapes and dtypes count.
        signed_scales: the scales of TResNet's norms are what the file says, as after training
            with plain BatchNorm; else |w| + 1e-5, as the released files mean it.

    Returns:
        All of ``wanted``; BatchNorm's counters that the file does not have are 0.

    Raises:
        MlcError: tensors are missing, not known, or of another shape or content: all are listed.
    """
    official = choose(BACKBONES, backbone, "official backbone")
    names = {name: _official_name(official, name) for name in wanted}
    buffers = official.buffers(wanted)
    shapes = {names[name]: each.shape for name, each in wanted.items()}
    shapes |= {name: each.shape for name, each in buffers.items()}
    floats = {names[name] for name, each in wanted.items() if each.is_floating_point()}
    problems = _misfits(tensors, shapes, floats, buffers)
    if problems:
        raise MlcError(
            f"{backbone}: these weights are not those of the official backbone "
            f"({len(tensors)} tensors for {len(shapes)}): {'; '.join(problems)}; "
            "name the backbone that they were made for"
        )
    absolute = official.abn and not signed_scales
    found = {}
    for name, each in wanted.items():
        # Nothing but a counter can be missing here.
        tensor = tensors.get(names[name])
        tensor = torch.zeros(each.shape) if tensor is None else tensor
        tensor = tensor.to(each.dtype)
        found[name] = _absolute(tensor) if absolute and SCALE.search(name) else tensor
    return found


def to_official(
    backbone: str, tensors: Mapping[str, Tensor], *, signed_scales: bool = False
) -> dict[str, Tensor]:
    """Return our model's tensors as the official backbone's: the inverse of ``from_official``.

    Args:
        backbone: a name of ``BACKBONES``.
        tensors: ``state_dict()`` of our model without a classifier.
        signed_scales: write the scales of TResNet's norms as they are, for code with plain
            BatchNorm; see ``from_official``.

    Returns:
        The keys, shapes and dtypes of the authors' model, in another order.

    Raises:
        MlcError: a scale of TResNet is what |w| + 1e-5 cannot be: after training one may be below
            1e-5, or among the fifth of the numbers near 1e-4 that the rounding of the sum skips.
    """
    official = choose(BACKBONES, backbone, "official backbone")
    absolute = official.abn and not signed_scales
    named = {
        _official_name(official, name): _signed(name, each)
        if absolute and SCALE.search(name)
        else each
        for name, each in tensors.items()
        if official.counters or not name.endswith(COUNTERS)
    }
    return named | official.buffers(tensors)


def _official_name(official: OfficialBackbone, name: str) -> str:
    for pattern, replacement in official.renamings:
        name = re.sub(pattern, replacement, name)
    return name


def _misfits(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    floats: Collection[str],
    buffers: Mapping[str, Tensor],
) -> list[str]:
    """Return a sentence part for each kind of misfit, with all names."""
    missing = [name for name in shapes if name not in tensors and not name.endswith(COUNTERS)]
    unknown = [name for name in tensors if name not in shapes]
    common = [name for name in tensors if name in shapes]
    reshaped = [
        f"{name} is {list(tensors[name].shape)}, expected {list(shapes[name])}"
        for name in common
        if tensors[name].shape != shapes[name]
    ]
    changed = [
        name
        for name in buffers
        if name in tensors
        and tensors[name].shape == shapes[name]
        and not torch.equal(tensors[name].to(buffers[name]), buffers[name])
    ]
    kinds = {
        "missing": missing,
        "unknown": unknown,
        "of another shape": reshaped,
        "of integers": [
            name for name in common if name in floats and not tensors[name].is_floating_point()
        ],
        "not what the model computes": changed,
    }
    return [f"{len(names)} {kind} ({', '.join(names)})" for kind, names in kinds.items() if names]


def _absolute(weight: Tensor) -> Tensor:
    """Return the scale that InPlaceABN makes of its weight."""
    return weight.abs() + ABN_EPS


def _signed(name: str, scale: Tensor) -> Tensor:
    """Return the weight >= 0 of which ``_absolute`` makes a scale, to the bit."""
    nearest = scale - ABN_EPS
    found = torch.full_like(scale, torch.nan)
    # The difference, and then the sum, are rounded: the weight may be the number beside it.
    for weight in (
        torch.nextafter(nearest, torch.full_like(scale, torch.inf)),
        torch.nextafter(nearest, torch.zeros_like(scale)),
        nearest,
    ):
        found = torch.where((weight >= 0) & (_absolute(weight) == scale), weight, found)
    if found.isnan().any():
        lost = scale[found.isnan()]
        raise MlcError(
            f"{name}: scales of TResNet are |w| + {ABN_EPS:g} in an official file, which "
            f"{len(lost)} of {len(scale)} cannot be, got {float(lost[0]):g}; "
            "keep it in a file of our own names"
        )
    return found


def _swin_buffers(names: Iterable[str]) -> dict[str, Tensor]:
    """Return the indices and masks of all blocks that names of tensors tell of."""
    index, buffers = _relative_position_index(SWIN_WINDOW), {}
    for match in filter(None, map(SWIN_BLOCK.match, names)):
        stage, block = int(match[1]), int(match[2])
        prefix = f"layers.{stage}.blocks.{block}"
        buffers[f"{prefix}.attn.relative_position_index"] = index
        # Every second block shifts its windows, unless the grid is one window.
        if block % 2 and SWIN_GRIDS[stage] > SWIN_WINDOW:
            buffers[f"{prefix}.attn_mask"] = _shift_mask(SWIN_GRIDS[stage])
    return buffers


def _relative_position_index(window: int) -> Tensor:
    """Return, for places p and q of a window, the row of p - q in the table of biases."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    rows = y[:, None] - y + window - 1
    return rows * (2 * window - 1) + x[:, None] - x + window - 1


def _shift_mask(grid: int) -> Tensor:
    """Return (windows, T, T): -100 between places of a shifted window that were not neighbours.

    After the shift the last window along each axis holds the end of the image and its start.
    """
    part = torch.zeros(grid, dtype=torch.int64)
    part[-SWIN_WINDOW:-SWIN_SHIFT], part[-SWIN_SHIFT:] = 1, 2
    parts = 3 * part[:, None] + part
    count = grid // SWIN_WINDOW
    windows = parts.reshape(count, SWIN_WINDOW, count, SWIN_WINDOW).transpose(1, 2)
    windows = windows.reshape(count * count, SWIN_WINDOW * SWIN_WINDOW)
    return torch.where(windows[:, None] == windows[:, :, None], 0.0, -100.0)


_CONV_AND_BN = ((r"\.conv\.", ".0."), (r"\.bn\.", ".1."), (r"^", "body."))

# By the authors' names. In a TResNet a blur follows the convolution that halves the map, which is
# therefore one level deeper there.
BACKBONES = {
    "resnet101": OfficialBackbone("resnet101.tv_in1k", 32, ((r"^", "body."),), counters=False),
    "tresnetl": OfficialBackbone(
        "tresnet_l.miil_in1k_448",
        32,
        ((r"(layer2\.0\.conv1|layer[34]\.0\.conv2)\.(?=conv|bn)", r"\1.0."), *_CONV_AND_BN),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        abn=True,
    ),
    "tresnetl_v2": OfficialBackbone(
        "tresnet_v2_l.miil_in21k",
        32,
        ((r"(layer[234]\.0\.conv2)\.(?=conv|bn)", r"\1.0."), *_CONV_AND_BN),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        abn=True,
    ),
    "swin_L_384_22k": OfficialBackbone(
        "swin_large_patch4_window12_384.ms_in22k",
        32,
        (
            (r"^layers\.1\.downsample", "layers.0.downsample"),
            (r"^layers\.2\.downsample", "layers.1.downsample"),
            (r"^layers\.3\.downsample", "layers.2.downsample"),
        ),
        buffers=_swin_buffers,
    ),
    "CvT_w24": OfficialBackbone("cvt_w24", 16, ()),
}
