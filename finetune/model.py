"""ImageModel: backbone and head as one module to be trained."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mlc.configs.errors import MlcError, nearest
from mlc.extract.backbone import build_network, resolve_name
from mlc.extract.forward import ForwardPass
from mlc.extract.layers import LayerReader
from mlc.extract.network import Network, cannot_take
from mlc.finetune.config import FinetuneConfig
from mlc.heads.head_size import HeadSize
from mlc.heads.modules import HEADS, make_head
from mlc.store.schema import TOKENS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ImageModel(nn.Module):
    """Pixels (B, S, S, 3) uint8 -> logits (B, L) float32.

    Attributes:
        backbone: the network's module.
        head: of HEADS.
        network: what is known of the backbone.
        name: of the backbone, with its pretrained tag.
        size: of the head.
        reads: of the backbone, "pooled" or "tokens".
    """

    def __init__(self, config: FinetuneConfig, classes: int, generator: torch.Generator) -> None:
        """Build a model on the CPU.

        Raises:
            MlcError: the backbone cannot be had, a module to be frozen is not there, or the head
                cannot have these sizes.
        """
        super().__init__()
        self.name = resolve_name(config.backbone)
        self.network = build_network(self.name, config.of_backbone())
        layers = () if config.layer is None else (config.layer,)
        kind = HEADS[config.head].reads
        self._reader = LayerReader(self.network, layers, (kind,))
        self.reads, self._dtype = kind, DTYPES[config.precision]
        self.backbone = self.network.module
        self.size = self._head_size(classes)
        self.head = make_head(config.head, self.size, config, generator)
        self._forward_pass = ForwardPass(
            self._reader, self.network.mean, self.network.std, self._dtype
        )
        self._still = frozen_modules(self.backbone, config.freeze)
        if config.frozen_batch_norm:
            self._still += [
                each for each in self.backbone.modules() if isinstance(each, _BatchNorm)
            ]
        for module in self._still:
            module.requires_grad_(False)
        if config.activation_checkpointing:
            checkpoint_activations(self.network)
        self.train()

    def train(self, mode: bool = True) -> "ImageModel":
        """Set training or evaluation; what is frozen stays in evaluation."""
        super().train(mode)
        for module in self._still:
            module.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, L)."""
        (features,) = (
            each
            for name, each in self._forward_pass(pixels).items()
            if name.endswith(f"/{self.reads}")
        )
        # A matrix product at the end would round logits to 8 or 11 bits: ties, and other scores
        # than the same head has in evaluation. Heads of tokens are most of a step's arithmetic.
        lower = self._dtype != torch.float32 and self.reads == TOKENS
        with torch.autocast(pixels.device.type, self._dtype, enabled=lower):
            logits: Tensor = self.head(features)
        return logits.float()

    def _head_size(self, classes: int) -> HeadSize:
        """Return the sizes of the features, by trying a blank image."""
        side = self.network.size_px
        self.backbone.eval()
        try:
            with torch.no_grad():
                (layer,) = self._reader(torch.zeros(1, 3, side, side)).values()
        except (AssertionError, RuntimeError) as error:
            raise cannot_take(self.name, side, error) from None
        features = layer.arrays((self.reads,))[self.reads]
        return HeadSize(features.shape[-1], classes, layer.grid)


def frozen_modules(module: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """Return the modules whose names match a pattern, as "layer1" or "blocks.[0-3]".

    Args:
        module: a backbone; "*" is all of it.
        patterns: shell wildcards; a star matches dots too.

    Raises:
        MlcError: a pattern matches none.
    """
    named = dict(module.named_modules())
    found: list[nn.Module] = []
    for pattern in patterns:
        matched = [each for name, each in named.items() if fnmatchcase(name, pattern)]
        if not matched:
            names = [name for name in named if name]
            raise MlcError(f"freeze: no module is named {pattern!r}; {nearest(pattern, names)}")
        found += matched
    return found


def checkpoint_activations(network: Network) -> None:
    """Have a backbone keep its activations between blocks alone.

    Raises:
        MlcError: its library does not offer that.
    """
    switch = getattr(network.module, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise AttributeError("no such switch")
        switch(True)
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise MlcError(
            f"activation_checkpointing: {network.architecture} does not offer it ({error}); take "
            "timm's model of this name, or a smaller micro_batch"
        ) from None
