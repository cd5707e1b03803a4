"""The forward pass: pixels -> arrays of features, as eager torch runs it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mlc.extract.layers import LayerFeatures, LayerReader
from mlc.store.schema import feature

# Pixels (B, S, S, 3) uint8 -> (B, ...) float32 by name of the array, on the same device.
Engine = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class ForwardPass:
    """The engine that every other one is measured by: eager torch, normalisation first.

    Attributes:
        reader: runs the network and reads the layers that were asked for.
        mean: of the normalisation, per RGB channel, pixels in [0, 1].
        std: of the normalisation.
        dtype: of the arithmetic; float32, or what autocast makes of it on a GPU.
    """

    reader: LayerReader
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        """Return where the network is."""
        return next(self.reader.network.module.parameters()).device

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return what goes into each array for images (B, S, S, 3) uint8 on the device.

        Raises:
            MlcError: a layer does not give what is asked of it.
        """
        # The layout of pixels is channels-last already: this permutes strides, not memory.
        images = pixels.permute(0, 3, 1, 2).float().div_(255)
        images = images.sub_(_constant(self.mean, images)).div_(_constant(self.std, images))
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype != torch.float32):
            layers = self.reader(images)
        return read_arrays(layers, self.reader.kinds)


@dataclass(frozen=True)
class FixedBatch:
    """An engine for batches of any size, made of one that takes batches of one size.

    Attributes:
        engine: takes (size, S, S, 3).
        size: of its batches. Smaller ones are filled up with black images, larger ones split.
    """

    engine: Engine
    size: int

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the arrays of images (B, S, S, 3) uint8."""
        parts = [self._filled_up(part) for part in torch.split(pixels, self.size)]
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _filled_up(self, pixels: Tensor) -> dict[str, Tensor]:
        missing = self.size - len(pixels)
        if not missing:
            return self.engine(pixels)
        black = pixels.new_zeros(missing, *pixels.shape[1:])
        arrays = self.engine(torch.cat([pixels, black]))
        return {name: each[: len(pixels)] for name, each in arrays.items()}


def read_arrays(layers: Mapping[str, LayerFeatures], kinds: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of layers by the names of their arrays."""
    wanted = tuple(kinds)
    return {
        feature(layer, kind): values
        for layer, features in layers.items()
        for kind, values in features.arrays(wanted).items()
    }


def sample_pixels(forward: ForwardPass, count: int) -> Tensor:
    """Return made images (count, S, S, 3) uint8 with shapes and grain, the same every time."""
    size_px = forward.reader.network.size_px
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 7, 7, generator=random)
    shapes = interpolate(coarse, (size_px, size_px), mode="bilinear")
    grain = 0.05 * torch.randn(shapes.shape, generator=random)
    images = (shapes + grain).clamp_(0, 1).mul_(255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().to(forward.device)


def _constant(values: tuple[float, ...], images: Tensor) -> Tensor:
    return torch.tensor(values, device=images.device).view(1, -1, 1, 1)
