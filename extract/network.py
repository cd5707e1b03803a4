"""Network: a model as its library builds it, its classifier taken off, and what it asks for."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlc.configs.errors import MlcError
from mlc.extract.weights import load_weights


@dataclass(frozen=True)
class Network:
    """A model, and what its library says of it.

    Attributes:
        architecture: its name, without the tag of its weights.
        module: images (B, 3, S, S) normalised -> features (B, D).
        licence: of the weights, as published; "unknown" if nobody says.
        native_px: the side S that it was made for.
        size_px: the side S that it takes now.
        interpolation: of the resize to S.
        mean: of the normalisation, per RGB channel, pixels in [0, 1].
        std: of the normalisation.
        final: the module, or the method, whose output are the tokens that become its features;
            None if that is not known.
        prefix: how many tokens (class token, registers) stand before an image's patch tokens.
        channels_last: its maps are (B, H, W, C), not (B, C, H, W).
    """

    architecture: str
    module: nn.Module
    licence: str
    native_px: int
    size_px: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    final: str | None
    prefix: int = 0
    channels_last: bool = False


@dataclass(frozen=True)
class Weights:
    """Which weights: by default the published ones.

    Attributes:
        file: a weights file instead.
        random: untrained; seeded.
    """

    file: Path | None = None
    random: bool = False

    @property
    def published(self) -> bool:
        """Return whether they are to be fetched."""
        return self.file is None and not self.random


def build_model(
    name: str, weights: Weights, make: Callable[[], Any], *, online: bool = False
) -> tuple[Any, str | None]:
    """Return a model with its weights, its classifier still on, and their licence.

    Args:
        name: of the model, for errors.
        weights: which ones; a file is loaded here.
        make: builds the model, with the published weights if those are wanted.
        online: it needs the network even for a model without weights.

    Returns:
        The model; the licence, None if the library that published the weights knows it.

    Raises:
        MlcError: the weights cannot be had or do not fit.
    """
    if weights.file and weights.random:
        raise MlcError("weights: got both a file and --random-weights; pass one")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same, and so their key is, every time
            model = make()
    except Exception as error:  # urllib, httpx, the hub and timm raise without a common base
        if not weights.published and not online:
            raise
        reason = " ".join(str(error).split())[:200]
        raise MlcError(
            f"{name}: its weights cannot be had ({reason}); go online, log in if they are gated, "
            "or pass --weights FILE"
        ) from None
    if weights.file:
        return model, load_weights(model, weights.file)
    return model, "none, they are random" if weights.random else None


def cannot_take(name: str, size_px: int, error: Exception) -> MlcError:
    """Return the error of a model that cannot take images of a size."""
    return MlcError(
        f"size_px: {name} cannot take {size_px} px ({' '.join(str(error).split())[:160]})"
    )
