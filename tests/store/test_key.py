"""FeatureKey: equal settings have one digest, every field counts, a difference is spelled out."""

from collections.abc import Callable
from dataclasses import fields, make_dataclass, replace
from typing import Any

import pytest

from mlc.configs.errors import MlcError
from mlc.store.key import DIGEST_CHARS, FeatureKey, feature_dtypes, require_same_key

KEY = FeatureKey(
    backbone="resnet50",
    weights="0123456789abcdef",
    layers=("pre_logits",),
    size_px=448,
    resize="squash",
    interpolation="bilinear",
    decode="pillow",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    precision="float32",
    engine="torch",
    views=("orig",),
    features=("pooled:float32",),
)
NAMES = [field.name for field in fields(FeatureKey)]
CHANGES: dict[type, Callable[[Any], Any]] = {
    str: lambda value: value + "x",
    int: lambda value: value + 1,
    tuple: lambda value: (*value, value[0]),
}


def changed(name: str) -> FeatureKey:
    value = getattr(KEY, name)
    return replace(KEY, **{name: CHANGES[type(value)](value)})


def test_digest_is_what_the_names_of_existing_stores_carry() -> None:
    assert KEY.digest() == "525e1636f7"
    assert len(KEY.digest()) == DIGEST_CHARS


def test_digest_does_not_depend_on_the_order_of_the_fields() -> None:
    methods = {"digest": FeatureKey.digest, "to_json": FeatureKey.to_json}
    backwards = [(name, object) for name in reversed(NAMES)]
    reordered = make_dataclass("Reordered", backwards, namespace=methods)
    key = reordered(**{name: getattr(KEY, name) for name in NAMES})
    assert list(key.to_json()) == NAMES[::-1]
    assert key.digest() == KEY.digest()


@pytest.mark.parametrize("name", NAMES)
def test_every_field_changes_the_digest(name: str) -> None:
    assert changed(name).digest() != KEY.digest()


def test_no_two_changes_have_the_same_digest() -> None:
    assert len({changed(name).digest() for name in NAMES}) == len(NAMES)


def test_same_settings_pass() -> None:
    require_same_key("a.zarr", replace(KEY).to_json(), KEY)


@pytest.mark.parametrize("name", NAMES)
def test_a_difference_names_the_field_and_both_values(name: str) -> None:
    asked = changed(name)
    with pytest.raises(MlcError) as caught:
        require_same_key("a.zarr", KEY.to_json(), asked)
    stored_value, asked_value = KEY.to_json()[name], asked.to_json()[name]
    difference = f"{name}: stored {stored_value!r}, asked {asked_value!r}"
    assert str(caught.value).startswith(f"a.zarr: made with other settings: {difference}; ask")


def test_all_differences_are_told_at_once() -> None:
    asked = replace(KEY, size_px=224, precision="float16")
    with pytest.raises(
        MlcError, match=r"precision: .* asked 'float16'; size_px: stored 448, asked 224"
    ):
        require_same_key("a.zarr", KEY.to_json(), asked)


def test_a_field_that_only_one_side_has_is_a_difference() -> None:
    stored = KEY.to_json()
    del stored["views"]
    with pytest.raises(MlcError, match=r"views: stored None, asked \['orig'\]"):
        require_same_key("a.zarr", stored, KEY)
    with pytest.raises(MlcError, match=r"crop: stored 'centre', asked None"):
        require_same_key("a.zarr", KEY.to_json() | {"crop": "centre"}, KEY)


# --- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "want"),
    [
        (["pooled"], {"pooled": "float32"}),
        (["tokens"], {"tokens": "float16"}),
        (["pooled:float16", "tokens:int8"], {"pooled": "float16", "tokens": "int8"}),
        (["pooled:float32"], {"pooled": "float32"}),
    ],
)
def test_features_have_their_dtype_or_the_default_of_their_kind(
    features: list[str], want: dict[str, str]
) -> None:
    assert feature_dtypes(features) == want


def test_features_are_in_one_order() -> None:
    assert list(feature_dtypes(["tokens", "pooled"])) == ["pooled", "tokens"]


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ([], r"features: got none; choose from pooled, tokens"),
        (["poled"], r"unknown kind of features 'poled'; did you mean 'pooled'\?"),
        (["prefix"], r"unknown kind of features 'prefix'; choose from pooled, tokens"),
        (["tokens:float8"], r"unknown dtype of tokens 'float8'; did you mean 'float32' or"),
        (["tokens:"], r"unknown dtype of tokens ''; choose from float16, float32, int8"),
        (["tokens", "tokens:int8"], r"features: got 'tokens' more than once"),
    ],
)
def test_features_that_are_not_to_be_had_are_one_sentence(
    features: list[str], expected: str
) -> None:
    with pytest.raises(MlcError, match=expected):
        feature_dtypes(features)
