"""Folding: a BatchNorm becomes part of the convolution before it, and costs nothing any more."""

from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlc.extract.forward import ForwardPass
from mlc.extract.layers import LayerReader

# By exact type: a subclass may do something else with its weights, as a standardised one does.
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
NORMS = (nn.BatchNorm2d, BatchNormAct2d)


def fold_batchnorms(forward: ForwardPass) -> ForwardPass:
    """Return a forward pass over a copy of the network with its BatchNorms folded.

    In eval mode a BatchNorm is y = (x - mean) * gamma / sqrt(var + eps) + beta of each channel,
    so a convolution can give it: its weights times gamma / sqrt(var + eps), its bias likewise,
    computed in float64. The modules keep their names: a folded BatchNorm is one that does
    nothing, and of timm's BatchNormAct2d the activation is left.

    Returns:
        The pass that was given if there is nothing to fold.
    """
    pairs = foldable(forward.reader)
    if not pairs:
        return forward
    network, old = forward.reader.network, forward.reader
    module = _copy_unread(old)
    for convolution, norm in pairs:
        _fold(module, convolution, norm)
    reader = LayerReader(replace(network, module=module), old.layers, old.kinds)
    return replace(forward, reader=reader)


@torch.no_grad()
def foldable(reader: LayerReader) -> list[tuple[str, str]]:
    """Return names of (convolution, BatchNorm) where the second is all that reads the first.

    Learnt by watching every operation of one forward pass, so of any model that runs: whatever
    else takes the output of a convolution, a layer that is stored included, keeps its BatchNorm.
    """
    module = reader.network.module
    watch = _Watch()
    names = {name: each for name, each in module.named_modules() if type(each) in CONVOLUTIONS}
    norms = {name: each for name, each in module.named_modules() if _is_frozen_norm(each)}
    handles = [
        # Before the reader's own hook, so that its reading of the output is counted.
        each.register_forward_hook(partial(watch.gives, name), prepend=True)
        for name, each in names.items()
        if "weight" in dict(each.named_parameters(recurse=False))
    ]
    handles += [
        each.register_forward_pre_hook(partial(watch.takes, name)) for name, each in norms.items()
    ]
    size_px, device = reader.network.size_px, next(module.parameters()).device
    try:
        with watch:
            reader(torch.zeros(1, 3, size_px, size_px, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return watch.pairs()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts how often each output of a convolution is used."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # held, so that no id is used again
        self._uses: Counter[int] = Counter()
        self._calls: Counter[str] = Counter()
        self._inputs: dict[str, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        self._uses.update({id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)})
        return func(*args, **(kwargs or {}))

    def gives(self, name: str, _: nn.Module, __: object, output: Tensor) -> None:
        """Note the output of a convolution: from here on its uses count."""
        self._calls[name] += 1
        self._outputs[id(output)] = (name, output)
        self._uses[id(output)] = 0

    def takes(self, name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note what a BatchNorm is given if that is the output of a convolution."""
        self._calls[name] += 1
        if id(inputs[0]) in self._outputs:
            self._inputs[name] = id(inputs[0])

    def pairs(self) -> list[tuple[str, str]]:
        """Return the pairs that may be folded: each runs once, and nothing else is between."""
        return [
            (self._outputs[given][0], norm)
            for norm, given in self._inputs.items()
            if self._uses[given] == 1
            and self._calls[norm] == self._calls[self._outputs[given][0]] == 1
        ]


def _is_frozen_norm(module: nn.Module) -> bool:
    return type(module) in NORMS and not module.training and module.running_mean is not None


def _copy_unread(reader: LayerReader) -> nn.Module:
    """Return a copy of a reader's module that the reader does not read."""
    module = deepcopy(reader.network.module)
    for each in module.modules():
        each._forward_hooks.clear()
    # The method that the reader watches is a function that runs the module it was made for.
    module.__dict__.pop(reader.network.final or "", None)
    return module


@torch.no_grad()
def _fold(module: nn.Module, convolution: str, norm: str) -> None:
    conv: Any = module.get_submodule(convolution)
    old: Any = module.get_submodule(norm)
    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(),
        None if conv.bias is None else conv.bias.double(),
        old.running_mean.double(),
        old.running_var.double(),
        old.eps,
        None if old.weight is None else old.weight.double(),
        None if old.bias is None else old.bias.double(),
    )
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    module.set_submodule(norm, _remainder(old))


def _remainder(norm: nn.Module) -> nn.Module:
    """Return what is left of a folded BatchNorm, its submodules under the names they have."""
    children = dict(norm.named_children())
    left = nn.Sequential()
    for name, each in children.items():
        left.add_module(name, each)
    return left.eval() if children else nn.Identity()
