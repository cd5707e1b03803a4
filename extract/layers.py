"""Layers: what modules of a network give in one forward pass, as pooled features and tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from mlc.configs.errors import MlcError, nearest
from mlc.extract.network import Network
from mlc.store.schema import POOLED, PREFIX, TOKENS

LAYER = "pre_logits"  # timm's name of what the classifier would see


@dataclass(frozen=True)
class LayerFeatures:
    """What one layer gives for B images, float32.

    Attributes:
        pooled: (B, D): what the classifier would see, of any other module the mean of its tokens.
        tokens: (B, T, C) patch tokens in the order of the rows of their grid; None if it has none.
        prefix: (B, P, C) class token and registers; None if it has none.
        grid: (H, W) of the tokens, H * W = T.
    """

    pooled: Tensor
    tokens: Tensor | None = None
    prefix: Tensor | None = None
    grid: tuple[int, int] | None = None

    def arrays(self, kinds: Sequence[str]) -> dict[str, Tensor]:
        """Return the tensors of these kinds, by kind; those of the prefix follow the tokens."""
        named = {POOLED: self.pooled, TOKENS: self.tokens, PREFIX: self.prefix}
        wanted = {*kinds, PREFIX} if TOKENS in kinds else set(kinds)
        return {kind: each for kind, each in named.items() if kind in wanted and each is not None}


class LayerReader:
    """Runs a network on images and keeps what the layers that were asked for give.

    Not to be used from two threads at once.
    """

    def __init__(self, network: Network, layers: Sequence[str], kinds: Sequence[str]) -> None:
        """Put a forward hook on each layer; none if pooled features of ``LAYER`` are all.

        Args:
            network: what runs; its module is changed.
            layers: names of its modules, and ``LAYER``, which none means.
            kinds: "pooled", "tokens" or both.

        Raises:
            MlcError: a layer is not there, or has no tokens.
        """
        modules = {name: each for name, each in network.module.named_modules() if name}
        self.network, self.kinds = network, tuple(kinds)
        self.layers = check_layers(layers, list(modules))
        self._found: dict[int, dict[str, LayerFeatures]] = {}  # by thread: it may run in several
        for layer in self.layers:
            if layer != LAYER:
                modules[layer].register_forward_hook(partial(self._keep, layer))
            elif TOKENS in kinds:
                self._watch_final(modules)

    def __call__(self, images: Tensor) -> dict[str, LayerFeatures]:
        """Return the features by layer of images (B, 3, S, S), normalised.

        Raises:
            MlcError: a layer is not run, or more than once, gives no tensor of one of the shapes
                that ``read_layer`` knows, or has no tokens and they are asked for.
        """
        self._found[_thread()] = {}
        output = self.network.module(images)
        found = self._found.pop(_thread())
        if LAYER in self.layers:
            found[LAYER] = self._default_layer(output, found.get(LAYER))
        for layer in self.layers:
            if layer not in found:
                raise MlcError(f"layers: {layer} is not run in a forward pass; name another module")
            _require_rows(layer, found[layer], len(images), TOKENS in self.kinds)
        return {layer: found[layer] for layer in self.layers}

    def _default_layer(self, output: Any, final: LayerFeatures | None) -> LayerFeatures:
        """Return the network's own features, and the tokens that became them."""
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise MlcError(
                f"{self.network.architecture}: gives features of {_describe(output)}, "
                "expected one row for an image"
            )
        # A ViT's class token is a view of all its tokens, which it would keep in memory.
        pooled = output.float().contiguous()
        if final is None:
            return LayerFeatures(pooled)
        return LayerFeatures(pooled, final.tokens, final.prefix, final.grid)

    def _watch_final(self, modules: Mapping[str, nn.Module]) -> None:
        """Read the tokens of ``LAYER``: of a module by a hook, of a method in its place."""
        final, module = self.network.final, self.network.module
        if final is None:
            raise MlcError(
                f"layers: it is not known where {self.network.architecture} has the tokens of "
                f"{LAYER}; name a module with --layers"
            )
        if final in modules:
            modules[final].register_forward_hook(partial(self._keep, LAYER))
            return
        method: Callable[..., object] = getattr(module, final)

        def watched(*arguments: Any, **options: Any) -> object:
            output = method(*arguments, **options)
            self._keep(LAYER, module, arguments, output)
            return output

        setattr(module, final, watched)

    def _keep(self, layer: str, _: nn.Module, __: object, output: object) -> None:
        """Read a layer's output at once: modules after it may work in its memory."""
        found = self._found[_thread()]
        if layer in found:
            raise MlcError(f"layers: {layer} is run several times in a forward pass; name another")
        found[layer] = read_layer(layer, output, self.network)


def _thread() -> int:
    """Return a number of the thread that runs; to be compiled it has to be the same one always."""
    return 0 if torch.compiler.is_compiling() else get_ident()


def check_layers(layers: Sequence[str], modules: Sequence[str]) -> tuple[str, ...]:
    """Return names of layers, checked, in the order given; none means ``LAYER``.

    Raises:
        MlcError: a name that is neither a module nor ``LAYER``, or is there twice.
    """
    for layer in layers:
        if layer != LAYER and layer not in modules:
            raise MlcError(f"unknown layer {layer!r}; {nearest(layer, [LAYER, *modules])}")
        if layers.count(layer) > 1:
            raise MlcError(f"layers: got {layer!r} more than once; name each layer once")
    return tuple(layers) or (LAYER,)


def read_layer(layer: str, output: object, network: Network) -> LayerFeatures:
    """Read the output of a module.

    Args:
        layer: its name, for errors.
        output: a row (B, D); tokens (B, P + T, C) of a ViT, or (B, T, C) where the prefix is not
            there yet; or a map, (B, C, H, W) of a CNN or (B, H, W, C) of Swin and its like. A map
            is read the way that makes it square if that is true of one way only, else the
            network's.
        network: whose module it is.

    Returns:
        Copies, float32, contiguous. The pooled features are the mean of the patch tokens.

    Raises:
        MlcError: it is nothing of this kind, or the tokens are not a square.
    """
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        raise MlcError(
            f"layers: {layer} gives {_describe(output)}, expected one tensor of 2, 3 or 4 axes; "
            "name another module"
        )
    if output.ndim == 2:
        return LayerFeatures(_copy(output))
    prefix = 0
    if output.ndim == 4:
        spatial = _spatial_axes(output, network)
        grid = (output.shape[spatial], output.shape[spatial + 1])
        tokens = output.flatten(1, 2) if spatial == 1 else output.flatten(2).transpose(1, 2)
    else:
        prefix, side = _split_tokens(layer, output.shape[1], network.prefix)
        grid, tokens = (side, side), output[:, prefix:]
    tokens = _copy(tokens)
    first = _copy(output[:, :prefix]) if prefix else None
    return LayerFeatures(tokens.mean(1).contiguous(), tokens, first, grid)


def _spatial_axes(output: Tensor, network: Network) -> int:
    """Return the first of the two axes of a map that are its height and width."""
    _, first, second, third = output.shape
    if (first == second) != (second == third):
        return 1 if first == second else 2
    return 1 if network.channels_last else 2


def _split_tokens(layer: str, count: int, prefix: int) -> tuple[int, int]:
    """Return how many of a layer's tokens are its prefix, and the side of the grid of the rest.

    The images are square, and so are grids. A module before the class token, as a patch
    embedding, has patch tokens only.
    """
    for first in dict.fromkeys((prefix, 0)):
        side = isqrt(max(count - first, 0))
        if side and side * side == count - first:
            return first, side
    raise MlcError(
        f"layers: {layer} gives {count} tokens, which are not a square"
        f"{f', with or without {prefix} before them' if prefix else ''}; name another module"
    )


def _copy(values: Tensor) -> Tensor:
    copy = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    return copy.copy_(values)


def _require_rows(layer: str, features: LayerFeatures, batch: int, tokens: bool) -> None:
    if len(features.pooled) != batch:
        raise MlcError(
            f"layers: {layer} gives {len(features.pooled)} rows for {batch} images, as inside of "
            "windows; name another module"
        )
    if tokens and features.tokens is None:
        raise MlcError(
            f"layers: {layer} gives one row of {features.pooled.shape[1]} numbers for an image and "
            "no tokens; ask for its pooled features only, or name another module"
        )


def _describe(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {list(output.shape)}"
    return f"a {type(output).__name__}"
