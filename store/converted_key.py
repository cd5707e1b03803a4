"""The key of a store that is converted from another, and the name that follows from it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlc.configs.errors import MlcError
from mlc.store.key import DTYPES, FeatureKey, feature_dtypes
from mlc.store.reader import FeatureStore

NARROWER = tuple(DTYPES)  # each dtype holds less than the one before


def converted_key(store: FeatureStore, features: Sequence[str] | None) -> FeatureKey:
    """Return the key of what a store is converted to.

    Args:
        store: that is converted.
        features: every kind that is kept, with an optional dtype; by default all, as they are.

    Raises:
        MlcError: the store lacks a kind, or has it in less precision.
    """
    stored = feature_dtypes(store.key["features"])
    asked = list(stored) if features is None else features
    wanted = feature_dtypes(
        [f"{kind}:{stored[kind]}" if kind in stored else kind for kind in asked]
    )
    for kind, dtype in wanted.items():
        if kind not in stored:
            raise MlcError(
                f"{store.path}: has no {kind}, it has {', '.join(stored)}; run mlc extract with "
                f"--features {kind}"
            )
        if NARROWER.index(dtype) < NARROWER.index(stored[kind]):
            raise MlcError(
                f"{store.path}: has {kind} as {stored[kind]}, got {dtype}; the precision that is "
                f"gone does not come back, run mlc extract with --features {kind}:{dtype}"
            )
    return replace(key_of(store), features=tuple(map(":".join, wanted.items())))


def converted_path(store: FeatureStore, key: FeatureKey) -> Path:
    """Return the path of a store with the digest of another key.

    Raises:
        MlcError: the key is the store's own, or its path does not end in the digest of that.
    """
    old, new = key_of(store).digest(), key.digest()
    if old == new:
        raise MlcError(
            f"{store.path}: has these features already; ask for others, or name a target of "
            "another format"
        )
    prefix, dash, digest = store.path.stem.rpartition("-")
    if not dash or digest != old:
        raise MlcError(
            f"{store.path}: its name does not end in the digest of its key, {old}, which a name "
            "for the new store could be made from; name a target"
        )
    return store.path.with_name(f"{prefix}-{new}{store.path.suffix}")


def key_of(store: FeatureStore) -> FeatureKey:
    """Return the key of a store."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in store.key.items()
    }
    return FeatureKey(**values)
