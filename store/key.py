"""FeatureKey: what makes the features of one image, and so what makes two stores the same."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlc.configs.errors import MlcError, choose

DIGEST_CHARS = 10
TORCH = "torch"  # the engine of stores that do not name one
# Kinds of features in the order of a key, and what they are stored as unless a dtype is named.
DEFAULT_DTYPES = {"pooled": "float32", "tokens": "float16"}
DTYPES = dict.fromkeys(("float32", "float16", "int8"))


@dataclass(frozen=True)
class FeatureKey:
    """Everything that changes the features of one image; which images there are is not in it.

    Attributes:
        backbone: architecture, e.g. "resnet50"; its pretrained tag is in ``weights``.
        weights: hash of the tensors that the features depend on.
        layers: names of the layers that are stored.
        size_px: side of the square that the backbone sees.
        resize: "squash": the whole image, its aspect ratio not kept.
        interpolation: of the resize.
        decode: "pillow": decoded and resized by Pillow, as the reference pipelines do; "fast" or
            "fast-gpu".
        mean: of the normalisation, per RGB channel, pixels in [0, 1].
        std: of the normalisation.
        precision: of the forward pass.
        engine: that runs the forward pass; each rounds in its own way.
        views: names of the cached views of an image.
        features: kinds and dtypes of the stored numbers, as "pooled:float32"; see
            ``feature_dtypes``.
    """

    backbone: str
    weights: str
    layers: tuple[str, ...]
    size_px: int
    resize: str
    interpolation: str
    decode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str
    engine: str
    views: tuple[str, ...]
    features: tuple[str, ...]

    def digest(self) -> str:
        """Return the short hash that a store's name carries."""
        values = self.to_json()
        if self.engine == TORCH:  # so that stores of before there were engines keep their names
            del values["engine"]
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]

    def to_json(self) -> dict[str, Any]:
        """Return the key as JSON values, lists for tuples."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def feature_dtypes(features: Sequence[str]) -> dict[str, str]:
    """Return the dtype of each kind of features that a list names, "pooled" before "tokens".

    >>> feature_dtypes(["tokens:int8", "pooled"])
    {'pooled': 'float32', 'tokens': 'int8'}

    Args:
        features: kinds, each with an optional dtype, as "tokens" or "tokens:int8". The prefix
            tokens of a layer are stored as its patch tokens are, and are not listed.

    Raises:
        MlcError: none, an unknown kind or dtype, or a kind that is there twice.
    """
    if not features:
        raise MlcError(f"features: got none; choose from {', '.join(DEFAULT_DTYPES)}")
    dtypes: dict[str, str] = {}
    for item in features:
        kind, colon, dtype = item.partition(":")
        default = choose(DEFAULT_DTYPES, kind, "kind of features")
        if colon:
            choose(DTYPES, dtype, f"dtype of {kind}")
        if kind in dtypes:
            raise MlcError(f"features: got {kind!r} more than once; name each kind once")
        dtypes[kind] = dtype or default
    return {kind: dtypes[kind] for kind in DEFAULT_DTYPES if kind in dtypes}


def current_key(key: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded key with the fields of today.

    Earlier ones had the dtype of "pooled", and eager torch was all there was.
    """
    fields = {"engine": TORCH} | dict(key)
    if "dtype" in fields:
        fields["features"] = [f"pooled:{fields.pop('dtype')}"]
    return fields


def require_same_key(where: object, stored: Mapping[str, Any], asked: FeatureKey) -> None:
    """Raise an MlcError that names each field in which a store differs from what is asked."""
    wanted, stored = asked.to_json(), current_key(stored)
    differences = [
        f"{field}: stored {stored.get(field)!r}, asked {wanted.get(field)!r}"
        for field in sorted(wanted.keys() | stored.keys())
        if stored.get(field) != wanted.get(field)
    ]
    if differences:
        raise MlcError(
            f"{where}: made with other settings: {'; '.join(differences)}; "
            "ask for the same settings, or name another store with --out"
        )
