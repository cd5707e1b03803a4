"""Backbone: a frozen timm model, what it wants its input to be, and where its weights are from."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timm.data import resolve_model_data_config
from timm.models import (
    get_pretrained_cfg,
    is_model,
    list_models,
    list_pretrained,
    split_model_name_tag,
)
from torch import Tensor, nn

from mlc.configs import Config
from mlc.configs.device import choose_device
from mlc.configs.errors import MlcError, choose, nearest
from mlc.extract.images import INTERPOLATIONS
from mlc.extract.memory import keep_freed_memory
from mlc.extract.weights import hash_weights, load_weights
from mlc.store.key import FeatureKey

# A bare name means the weights that the literature means: both papers use torchvision's V1.
PAPER_TAGS = {"resnet50": "tv_in1k", "resnet101": "tv_in1k"}
HUB = "hf-hub:"
LAYER = "pre_logits"  # timm's name of what the classifier would see
Precision = Literal["auto", "float32", "float16", "bfloat16"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class BackboneConfig(Config):
    """Which backbone, and how images are made to fit it.

    Attributes:
        backbone: a timm name, with or without its pretrained tag, or ``hf-hub:OWNER/NAME``.
        weights: a weights file instead of the published ones.
        weights_licence: of that file, if you know it; recorded in stores and runs.
        random_weights: untrained, for tests; seeded.
        size_px: side of the square input; by default the model's own.
        interpolation: of the resize; by default the model's own.
        precision: of the forward pass; "auto" is float32 on a CPU, and on a GPU bfloat16 if it
            has it, else float16.
        device: "auto" is the GPU if there is one.
    """

    backbone: str = "resnet50"
    weights: Path | None = None
    weights_licence: str | None = None
    random_weights: bool = False
    size_px: int | None = None
    interpolation: str | None = None
    precision: Precision = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class Backbone:
    """A frozen model, ready to run.

    Attributes:
        name: architecture with its pretrained tag, or with the file the weights are from.
        module: images (B, 3, S, S) normalised -> features (B, D).
        width: D.
        licence: of the weights, as published; "unknown" if nobody says.
        device: where it runs.
        key: what makes its features, all but the store's dtype settled.
    """

    name: str
    module: nn.Module
    width: int
    licence: str
    device: torch.device
    key: FeatureKey

    @property
    def default_batch(self) -> int:
        """Return a batch size that suits the device: what fits a CPU's caches, or fills a GPU."""
        return 8 if self.device.type == "cpu" else 64

    @torch.inference_mode()
    def features(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (B, D) float32 for images (B, S, S, 3) uint8."""
        images = torch.from_numpy(pixels).to(self.device, non_blocking=True)
        # The layout of pixels is channels-last already: this permutes strides, not memory.
        images = images.permute(0, 3, 1, 2).float().div_(255)
        images = images.sub_(self._constant(self.key.mean)).div_(self._constant(self.key.std))
        dtype = DTYPES[self.key.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            features: Tensor = self.module(images)
        values: NDArray[np.float32] = features.float().cpu().numpy()
        return values

    def _constant(self, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=self.device).view(1, -1, 1, 1)


def load_backbone(config: BackboneConfig, dtype: str = "float32") -> Backbone:
    """Build a frozen backbone with its weights, in eval mode, channels-last.

    Args:
        config: which one.
        dtype: of the store that the features are for, a part of its key.

    Raises:
        MlcError: the model is unknown, its weights cannot be had or do not fit, it cannot take
            images of this size, or the device is not there.
    """
    keep_freed_memory()
    device = choose_device(config.device)
    name = resolve_name(config.backbone)
    model, licence = _build(name, config)
    cfg = resolve_model_data_config(model)
    size_px = config.size_px or int(cfg["input_size"][-1])
    model.reset_classifier(0)
    model = _resize_input(model, name, size_px, int(cfg["input_size"][-1]))
    key = _feature_key(model, config, cfg, size_px, device, dtype)
    model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Backbone(
        name=_describe(name, config),
        module=model,
        width=_width(model, name, size_px, device),
        licence=config.weights_licence or licence,
        device=device,
        key=key,
    )


def _feature_key(
    model: Any,
    config: BackboneConfig,
    cfg: Mapping[str, Any],
    size_px: int,
    device: torch.device,
    dtype: str,
) -> FeatureKey:
    interpolation = config.interpolation or str(cfg["interpolation"])
    choose(INTERPOLATIONS, interpolation, "interpolation")
    return FeatureKey(
        backbone=str(model.pretrained_cfg.get("architecture") or config.backbone),
        weights=hash_weights(model),
        layers=(LAYER,),
        size_px=size_px,
        resize="squash",
        interpolation=interpolation,
        decode="pillow",
        mean=tuple(float(each) for each in cfg["mean"]),
        std=tuple(float(each) for each in cfg["std"]),
        precision=resolve_precision(config.precision, device),
        views=("orig",),
        dtype=dtype,
    )


def resolve_name(name: str) -> str:
    """Return the full timm name that a name means: ``resnet50`` is ``resnet50.tv_in1k``.

    Raises:
        MlcError: timm has no such model, or no such tag of it.
    """
    if name.startswith(HUB):
        return name
    architecture, tag = map(str, split_model_name_tag(name))
    if not is_model(architecture):
        raise MlcError(f"unknown backbone {architecture!r}; {nearest(architecture, list_models())}")
    tags = [each.partition(".")[2] for each in list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise MlcError(f"unknown tag {tag!r} of {architecture}; {nearest(tag, tags)}")
    if not tag:
        cfg = get_pretrained_cfg(architecture)
        tag = PAPER_TAGS.get(architecture) or (cfg.tag if cfg else "")
    return f"{architecture}.{tag}" if tag else architecture


def resolve_precision(precision: Precision, device: torch.device) -> str:
    """Return the precision that "auto" means on a device."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def _build(name: str, config: BackboneConfig) -> tuple[Any, str]:
    """Return the timm model, its classifier still on, and the licence of its weights."""
    if config.weights and config.random_weights:
        raise MlcError("weights: got both a file and --random-weights; pass one")
    # The hub's client retries for a minute and logs each try; one sentence at the end is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    pretrained = not config.random_weights and config.weights is None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same, and so their key is, every time
            model = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # urllib, httpx, the hub and timm raise without a common base
        if not pretrained and not name.startswith(HUB):
            raise
        reason = " ".join(str(error).split())[:200]
        raise MlcError(
            f"{name}: its weights cannot be had ({reason}); go online, log in if they are gated, "
            "or pass --weights FILE"
        ) from None
    if config.weights:
        return model, load_weights(model, config.weights)
    if config.random_weights:
        return model, "none, they are random"
    return model, str(model.pretrained_cfg.get("license") or "unknown")


def _resize_input(model: Any, name: str, size_px: int, native_px: int) -> Any:
    """Let a model that is built for one size (a ViT's position embeddings) take another."""
    if size_px != native_px and hasattr(model, "set_input_size"):
        try:
            model.set_input_size(img_size=size_px)
        except (AssertionError, ValueError, RuntimeError) as error:
            raise MlcError(f"size_px: {name} cannot take {size_px} px ({error})") from None
    return model


def _width(model: nn.Module, name: str, size_px: int, device: torch.device) -> int:
    """Run one blank image: the honest way to learn D, and that the size is accepted."""
    try:
        with torch.inference_mode():
            output = model(torch.zeros(1, 3, size_px, size_px, device=device))
    except (AssertionError, RuntimeError) as error:
        raise MlcError(
            f"size_px: {name} cannot take {size_px} px ({' '.join(str(error).split())[:160]})"
        ) from None
    if output.ndim != 2:
        raise MlcError(
            f"{name}: gives features of shape {list(output.shape)[1:]}, expected one row"
        )
    return int(output.shape[1])


def _describe(name: str, config: BackboneConfig) -> str:
    architecture = split_model_name_tag(name)[0]
    if config.weights:
        return f"{architecture} with {config.weights.name}"
    return f"{architecture} with random weights" if config.random_weights else name
