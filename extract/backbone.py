"""Backbone: a frozen model, what it wants its input to be, and where its weights are from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import field_validator
from torch import Tensor, nn

from mlc.configs import Config
from mlc.configs.device import choose_device
from mlc.configs.errors import choose
from mlc.extract.backbone_file import read_backbone_file
from mlc.extract.batch_size import fit_batch_size
from mlc.extract.decoders import choose_decoder
from mlc.extract.engines import AUTO, IN_LANES, check_name, choose_engine, require_precision
from mlc.extract.forward import Engine, ForwardPass, read_arrays
from mlc.extract.images import INTERPOLATIONS
from mlc.extract.lanes import Lanes, share_cores
from mlc.extract.layers import LayerFeatures, LayerReader
from mlc.extract.memory import keep_freed_memory
from mlc.extract.network import Network, Weights, cannot_take
from mlc.extract.own_models import OWN_MODELS, own_network, resolve_own_name
from mlc.extract.timm_models import resolve_timm_name, timm_network
from mlc.extract.torchvision_models import (
    TORCHVISION,
    resolve_torchvision_name,
    torchvision_network,
)
from mlc.extract.views import ORIGINAL, Squares, check_views
from mlc.extract.weights import hash_weights
from mlc.store.key import FeatureKey, feature_dtypes
from mlc.store.schema import POOLED, TOKENS

Precision = Literal["auto", "float32", "float16", "bfloat16"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class BackboneConfig(Config):
    """Which backbone, which of its features, and how images are made to fit it.

    Attributes:
        backbone: a timm name, with or without its pretrained tag, ``hf-hub:OWNER/NAME``,
            ``torchvision:NAME``, with or without the name of its weights, or a name of
            ``OWN_MODELS``.
        weights: a weights file instead of the published ones; of ``write_backbone_file``'s the
            normalisation too is what the file says.
        weights_licence: of that file, if you know it; recorded in stores and runs.
        random_weights: untrained, for tests; seeded.
        size_px: side of the square input; by default the model's own.
        interpolation: of the resize; by default the model's own.
        decode: "pillow" as the reference pipelines do, or "fast": JPEGs at a reduced scale where
            twice the size is left, and torch's antialiased resize, see ``fast_images``; or
            "fast-gpu": JPEGs decoded and resized on the GPU, see ``gpu_images``.
        precision: of the forward pass; "auto" is float32 on a CPU, and on a GPU bfloat16 if it
            has it, else float16.
        engine: that runs the forward pass: "auto", which is eager torch on a GPU and the fastest
            that there is on a CPU, or a name of ``ENGINES``.
        device: "auto" is the GPU if there is one.
        layers: modules by name, and "pre_logits" for what the classifier would see, which is the
            default; the first one is what a head reads if none is named. Lists may be one text
            with commas.
        features: kinds, "pooled" and "tokens", each with an optional dtype as "tokens:int8".
        views: names of ``VIEWS``, "orig" first if it is among them; evaluation takes the first.
    """

    backbone: str = "resnet50"
    weights: Path | None = None
    weights_licence: str | None = None
    random_weights: bool = False
    size_px: int | None = None
    interpolation: str | None = None
    decode: str = "pillow"
    precision: Precision = "auto"
    engine: str = AUTO
    device: str = "auto"
    layers: tuple[str, ...] = ()
    features: tuple[str, ...] = (POOLED,)
    views: tuple[str, ...] = (ORIGINAL,)

    @field_validator("layers", "features", "views", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Backbone:
    """A frozen model, ready to run.

    Attributes:
        name: architecture with its pretrained tag, or with the file the weights are from.
        module: images (B, 3, S, S) normalised -> features (B, D) of the default layer.
        forward: normalises pixels, runs the module and reads the layers that were asked for.
        engine: does what ``forward`` does, faster.
        batch_size: images that the engine is made for; it takes others too.
        arrays: shape of what one view of an image has in each array, by its name, as (D,) of
            "pre_logits/pooled".
        grids: (H, W) of the tokens, by layer; empty if tokens are not asked for.
        licence: of the weights, as published; "unknown" if nobody says.
        device: where it runs.
        key: what makes its features.
        note: why the engine is not the one that was hoped for; empty if it is.
    """

    name: str
    module: nn.Module
    forward: ForwardPass
    engine: Engine
    batch_size: int
    arrays: Mapping[str, tuple[int, ...]]
    grids: Mapping[str, tuple[int, int]]
    licence: str
    device: torch.device
    key: FeatureKey
    note: str = ""

    @property
    def squares(self) -> Squares:
        """Return what it is shown of an image."""
        return Squares(self.key.size_px, self.key.interpolation, self.key.views)

    @property
    def lanes(self) -> Lanes:
        """Return how its batches share the cores."""
        if self.device.type == "cpu" and self.key.engine in IN_LANES:
            return share_cores()
        return Lanes(1, torch.get_num_threads())

    @torch.inference_mode()
    def features(self, pixels: NDArray[np.uint8]) -> dict[str, Tensor]:
        """Return what goes into each array for images (B, S, S, 3) uint8.

        Returns:
            (B, ...) float32 on the backbone's device, by the names and shapes of ``arrays``.
        """
        return self.engine(torch.from_numpy(pixels).to(self.device, non_blocking=True))

    def for_batches(self, batch_size: int) -> "Backbone":
        """Return the same backbone with its engine made for batches of another size.

        Raises:
            MlcError: the engine cannot be had at this size, see ``choose_engine``.
        """
        if batch_size == self.batch_size:
            return self
        engine = choose_engine(self.key.engine, self.forward, batch_size).engine
        return replace(self, engine=engine, batch_size=batch_size)


def load_backbone(config: BackboneConfig, batch_size: int | None = None) -> Backbone:
    """Build a frozen backbone with its weights, in eval mode, channels-last.

    Args:
        config: which one.
        batch_size: of most batches; by default what suits the device, see ``fit_batch_size``.

    Raises:
        MlcError: the model, an engine, a layer, a kind of features or a view is unknown, a layer
            does not give what is asked of it, the weights cannot be had or do not fit, the model
            cannot take images of this size, the device is not there, or it is no device for the
            precision, the decoder or the engine.
    """
    keep_freed_memory()
    device = choose_device(config.device)
    precision = resolve_precision(config.precision, device)
    require_precision(DTYPES[precision], device)
    check_name(config.engine)
    choose_decoder(config.decode, device)
    kinds = feature_dtypes(config.features)
    check_views(config.views)
    name = resolve_name(config.backbone)
    network = build_network(name, config)
    reader = LayerReader(network, config.layers, tuple(kinds))
    key = _feature_key(network, config, reader, precision)
    module = network.module.eval().requires_grad_(False)
    module = module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    layers = _try_one(reader, name, device)
    forward = ForwardPass(reader, key.mean, key.std, DTYPES[precision])
    batch_size = batch_size or fit_batch_size(forward)
    chosen = choose_engine(config.engine, forward, batch_size)
    return Backbone(
        name=_describe(name, config),
        module=module,
        forward=forward,
        engine=chosen.engine,
        batch_size=batch_size,
        arrays={name: tuple(each.shape[1:]) for name, each in read_arrays(layers, kinds).items()},
        grids=_grids(layers, kinds),
        licence=config.weights_licence or network.licence,
        device=device,
        key=replace(key, engine=chosen.name),
        note=chosen.note,
    )


def resolve_name(name: str) -> str:
    """Return the full name that a name means: ``resnet50`` is ``resnet50.tv_in1k``.

    Raises:
        MlcError: there is no such model, or no such tag of it.
    """
    if name.startswith(TORCHVISION):
        return resolve_torchvision_name(name)
    if name.partition(".")[0] in OWN_MODELS:
        return resolve_own_name(name)
    return resolve_timm_name(name, others=OWN_MODELS)


def resolve_precision(precision: Precision, device: torch.device) -> str:
    """Return the precision that "auto" means on a device."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def build_network(name: str, config: BackboneConfig) -> Network:
    """Build the model of a full name with its weights, its classifier taken off, on the CPU.

    Raises:
        MlcError: the weights cannot be had or do not fit, or it cannot take images of this size.
    """
    ours = None if config.weights is None else read_backbone_file(config.weights)
    if ours is None or config.random_weights:
        return _build(name, Weights(config.weights, config.random_weights), config.size_px)
    return ours.fill(_build(name, Weights(random=True), config.size_px))


def _build(name: str, weights: Weights, size_px: int | None) -> Network:
    if name in OWN_MODELS:
        return own_network(name, weights, size_px)
    build = torchvision_network if name.startswith(TORCHVISION) else timm_network
    return build(name, weights, size_px)


def _feature_key(
    network: Network, config: BackboneConfig, reader: LayerReader, precision: str
) -> FeatureKey:
    interpolation = config.interpolation or network.interpolation
    choose(INTERPOLATIONS, interpolation, "interpolation")
    dtypes = feature_dtypes(config.features)
    return FeatureKey(
        backbone=network.architecture,
        weights=hash_weights(network.module),
        layers=reader.layers,
        size_px=network.size_px,
        resize="squash",
        interpolation=interpolation,
        decode=config.decode,
        mean=network.mean,
        std=network.std,
        precision=precision,
        engine=config.engine,
        views=config.views,
        features=tuple(f"{kind}:{dtype}" for kind, dtype in dtypes.items()),
    )


def _try_one(reader: LayerReader, name: str, device: torch.device) -> dict[str, LayerFeatures]:
    """Run one blank image: the honest way to learn the shapes, and that the size is accepted."""
    size_px = reader.network.size_px
    try:
        with torch.inference_mode():
            return reader(torch.zeros(1, 3, size_px, size_px, device=device))
    except (AssertionError, RuntimeError) as error:
        raise cannot_take(name, size_px, error) from None


def _grids(layers: Mapping[str, LayerFeatures], kinds: Iterable[str]) -> dict[str, tuple[int, int]]:
    if TOKENS not in kinds:
        return {}
    return {layer: each.grid for layer, each in layers.items() if each.grid}


def _describe(name: str, config: BackboneConfig) -> str:
    architecture = name.partition(".")[0]
    if config.weights:
        return f"{architecture} with {config.weights.name}"
    return f"{architecture} with random weights" if config.random_weights else name
