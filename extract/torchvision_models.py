"""torchvision's image classifiers as networks: names, tags, and where their features come from."""

from collections.abc import Mapping
from typing import Any

import torchvision
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.vision_transformer import interpolate_embeddings

from mlc.configs.errors import MlcError, nearest
from mlc.extract.network import Network, Weights, build_model, cannot_take

TORCHVISION = "torchvision:"
# A bare name means the weights that the literature means, else torchvision's default.
PAPER_TAGS = {"resnet50": "IMAGENET1K_V1", "resnet101": "IMAGENET1K_V1"}
DEFAULT_TAG = "DEFAULT"

# By class: the module whose output are the tokens that become the features.
FINALS = {
    "AlexNet": "features",
    "ConvNeXt": "features",
    "DenseNet": "features",
    "EfficientNet": "features",
    "GoogLeNet": "inception5b",
    "Inception3": "Mixed_7c",
    "MNASNet": "layers",
    "MaxVit": "blocks.3",
    "MobileNetV2": "features",
    "MobileNetV3": "features",
    "RegNet": "trunk_output",
    "ResNet": "layer4",
    "ShuffleNetV2": "conv5",
    "SqueezeNet": "features",
    "SwinTransformer": "norm",
    "VGG": "features",
    "VisionTransformer": "encoder",
}
PREFIXES = {"VisionTransformer": 1}  # the class token
CHANNELS_LAST = {"SwinTransformer"}
# Models that turn ImageNet's normalisation into the one that they were trained with.
TRANSFORM_INPUT = {"googlenet", "inception_v3"}


def resolve_torchvision_name(name: str) -> str:
    """Return the full name: ``torchvision:resnet50`` is ``torchvision:resnet50.IMAGENET1K_V1``.

    Raises:
        MlcError: torchvision has no such classifier, or no such weights of it.
    """
    model, _, tag = name.removeprefix(TORCHVISION).partition(".")
    names = list_models(module=torchvision.models)
    if model not in names:
        if model in list_models():  # detection, segmentation, video, optical flow, quantised
            raise MlcError(
                f"backbone: torchvision's {model} is not an image classifier in floating point; "
                f"{nearest(model, names)}"
            )
        raise MlcError(f"unknown backbone of torchvision {model!r}; {nearest(model, names)}")
    entries = get_model_weights(model).__members__
    tag = tag or PAPER_TAGS.get(model, DEFAULT_TAG)
    if tag not in entries:
        raise MlcError(f"unknown tag {tag!r} of {TORCHVISION}{model}; {nearest(tag, entries)}")
    return f"{TORCHVISION}{model}.{entries[tag].name}"


def torchvision_network(name: str, weights: Weights, size_px: int | None) -> Network:
    """Build a torchvision classifier without its last linear layer.

    Args:
        name: in full, see ``resolve_torchvision_name``; its tag also says what the input is, of
            other weights too.
        weights: which ones.
        size_px: side of the square input; by default the crop that the tag's weights were
            evaluated with.

    Raises:
        MlcError: its weights cannot be had or do not fit, or it cannot take images of this size.
    """
    short, _, tag = name.removeprefix(TORCHVISION).partition(".")
    entry = get_model_weights(short)[tag]
    options = _options(short, entry, weights)
    model, licence = build_model(name, weights, lambda: get_model(short, **options))
    asks, kind = entry.transforms(), type(model).__name__
    native_px = int(asks.crop_size[0])
    _drop_classifier(model)
    return Network(
        architecture=f"{TORCHVISION}{short}",
        module=_resized(model, name, size_px or native_px, native_px),
        licence=licence or str(entry.meta.get("license") or "unknown"),
        native_px=native_px,
        size_px=size_px or native_px,
        interpolation=str(asks.interpolation.value),
        mean=tuple(float(each) for each in asks.mean),
        std=tuple(float(each) for each in asks.std),
        final=FINALS.get(kind),
        prefix=PREFIXES.get(kind, 0),
        channels_last=kind in CHANNELS_LAST,
    )


def _options(short: str, entry: Any, weights: Weights) -> Mapping[str, Any]:
    """Return the arguments that build a model as its published weights have it."""
    if weights.published:
        return {"weights": entry}  # torchvision then sets what those weights need
    options: dict[str, Any] = {"weights": None}
    if short in TRANSFORM_INPUT:
        options |= {"transform_input": True, "init_weights": False}
    if short.startswith("vit_"):
        options["image_size"] = entry.meta["min_size"][0]
    return options


def _drop_classifier(model: Any) -> None:
    """Let a model return what its last linear layer would see, in place."""
    for training_only in ("AuxLogits", "aux1", "aux2"):
        if hasattr(model, training_only):
            setattr(model, training_only, None)
            model.aux_logits = False
    linear = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    if linear:
        parent, _, last = linear[-1].rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Identity())
    else:  # SqueezeNet classifies each place of its map by a convolution, then pools
        model.classifier = nn.AdaptiveAvgPool2d(1)
    if type(model).__name__ == "DenseNet":
        # Its forward applies a ReLU after this module: the map itself then has it, and again is
        # the same.
        model.features.add_module("relu", nn.ReLU())


def _resized(model: Any, name: str, size_px: int, native_px: int) -> Any:
    """Let a ViT, whose position embeddings are for one size, take another."""
    if size_px != native_px and type(model).__name__ == "VisionTransformer":
        if size_px < 1 or size_px % model.patch_size:
            error = ValueError(f"not divisible by its patch size of {model.patch_size} px")
            raise cannot_take(name, size_px, error)
        state = interpolate_embeddings(size_px, model.patch_size, model.state_dict())
        model.encoder.pos_embedding = nn.Parameter(state["encoder.pos_embedding"])
        model.image_size = size_px
    return model
