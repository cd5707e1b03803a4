"""Our own architectures as networks: those that neither timm nor torchvision has."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from mlc.configs.errors import MlcError
from mlc.extract.cvt import cvt_w24
from mlc.extract.network import Network, Weights, build_model

FINAL = "forward_features"  # as in timm: all of a model but its classifier


@dataclass(frozen=True)
class OwnModel:
    """An architecture, and what its published weights are made for.

    Attributes:
        build: the model with the classifier of the published weights, ``head``.
        published: where those are; nothing here fetches them.
        native_px: side of the images that they are made for.
        interpolation: of the resize to it.
        prefix: how many tokens stand before an image's patch tokens.
    """

    build: Callable[[], nn.Module]
    published: str
    native_px: int
    interpolation: str
    prefix: int


def resolve_own_name(name: str) -> str:
    """Return the full name that a name of ``OWN_MODELS`` means, which is itself.

    Raises:
        MlcError: it has a tag; there are none.
    """
    architecture, _, tag = name.partition(".")
    if tag:
        raise MlcError(
            f"unknown tag {tag!r} of {architecture}, which has none; "
            f"write {architecture} and pass --weights FILE"
        )
    return architecture


def own_network(name: str, weights: Weights, size_px: int | None) -> Network:
    """Build a model of our own without its classifier.

    Args:
        name: of ``OWN_MODELS``.
        weights: a file, or random; the file holds the classifier too, as published.
        size_px: side of the square input; by default the model's own.

    Raises:
        MlcError: no weights are named, as they cannot be fetched, or they do not fit.
    """
    own = OWN_MODELS[name]
    if weights.published:
        raise MlcError(
            f"{name}: its weights cannot be fetched by name; get {own.published}, "
            "and pass --weights FILE"
        )
    model, licence = build_model(name, weights, own.build)
    return Network(
        architecture=name,
        module=_without_classifier(model),
        licence=licence or "unknown",
        native_px=own.native_px,
        size_px=size_px or own.native_px,
        interpolation=own.interpolation,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        final=FINAL,
        prefix=own.prefix,
    )


def _without_classifier(model: Any) -> Any:
    model.head = nn.Identity()
    return model


OWN_MODELS = {
    "cvt_w24": OwnModel(
        cvt_w24,
        published="CvT-w24-384x384-IN-22k.pth, which https://github.com/microsoft/CvT links to",
        native_px=384,
        interpolation="bicubic",
        prefix=1,  # the class token
    )
}
