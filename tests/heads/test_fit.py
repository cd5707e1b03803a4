"""From a config to a run folder: where it lies, and what is said of the labels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import made_store
import numpy as np
import pytest
import torch

from mlc.heads.config import TrainConfig
from mlc.heads.fit import fit, prepare, read_inputs, run_path
from mlc.heads.inputs import Features, read_features
from mlc.heads.modules import HEADS


@pytest.fixture
def features(tmp_path: Path) -> Features:
    return read_features(made_store.write(tmp_path))


def path_of(features: Features, **settings: Any) -> Path:
    return run_path(TrainConfig(**settings), features, source="a")


@pytest.mark.parametrize(
    "changes", [{"lr": 1.0}, {"seed": 1}, {"epochs": 3}, {"order_seed": 1}, {"weight_decay": 0.1}]
)
def test_an_optimum_is_named_for_what_it_depends_on(features: Features, changes: dict) -> None:
    assert path_of(features, **changes) != path_of(features)
    same = path_of(features, solver="lbfgs")
    assert path_of(features, solver="lbfgs", **changes) == same
    assert path_of(features, solver="lbfgs", corruption_seed=7) != same
    assert path_of(features, solver="lbfgs", strengths=(1.0,)) != same


def test_a_field_that_is_not_set_does_not_name_a_run(features: Features) -> None:
    class Later(TrainConfig):
        """As of a later version, with a field more."""

        more: int = 0

    assert run_path(Later(), features, source="a") == path_of(features)
    assert run_path(Later(more=1), features, source="a") != path_of(features)


def test_what_changes_no_number_names_no_run(features: Features) -> None:
    plain = path_of(features)
    assert path_of(features, check=False) == plain
    assert path_of(features, layer=made_store.LAYER) == plain  # its only one, by name
    for changes in ({"layer": "other"}, {"view_augment": True}, {"eval_views": "mean"}):
        assert path_of(features, **changes) != plain


@pytest.mark.parametrize(
    ("settings", "in_views"),
    [
        ({}, set()),
        ({"view_augment": True}, {"train"}),
        ({"eval_views": "mean"}, {"val", "test"}),
    ],
)
@pytest.mark.parametrize("head", ["linear", "normalised-linear"])
def test_a_head_sees_every_view_as_it_sees_the_first(
    tmp_path: Path, head: str, settings: dict, in_views: set
) -> None:
    config = TrainConfig(features=made_store.write_views(tmp_path, 3), head=head, **settings)
    features, table = read_inputs(config)
    splits = prepare(config, features, table).splits
    assert {name for name, split in splits.items() if split.views is not None} == in_views
    plain = prepare(TrainConfig(head=head), read_features(features.path), table).splits
    for name, split in splits.items():
        assert torch.equal(split.features, plain[name].features)
        if name in in_views:
            assert split.features.data_ptr() == split.views.data_ptr()
            rows = [features.image_id.tolist().index(each) for each in split.image_id]
            for view, seen in zip(features.views, split.views, strict=True):
                assert torch.equal(HEADS[head].inputs(torch.from_numpy(view[rows])), seen)


def test_inputs_are_those_that_a_config_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = made_store.write_views(tmp_path), []

    def spy(*arguments, **settings):
        asked.append(settings["check"])
        return read_features(*arguments, **settings)

    monkeypatch.setattr("mlc.heads.fit.read_features", spy)
    first, _ = read_inputs(TrainConfig(features=path))
    other, _ = read_inputs(TrainConfig(features=path, layer="other", check=False))
    np.testing.assert_array_equal(other.values, 2 * first.values[:, ::-1])
    assert asked == [True, False]


def test_a_run_records_the_layer_that_was_named(tmp_path: Path) -> None:
    path, recorded = made_store.write_views(tmp_path), {}
    for layer in (None, "other"):
        out = tmp_path / str(layer)
        config = TrainConfig(features=path, layer=layer, epochs=1, out=out, device="cpu")
        features, table = read_inputs(config)
        run = fit(config, features, prepare(config, features, table))
        recorded[layer] = run.results["features"].get("layer")
        assert run.config.layer == layer
    assert recorded == {None: None, "other": "other"}


def test_a_validation_split_without_positives_is_told(features: Features) -> None:
    table = made_store.table_of()
    config = TrainConfig(loss="bce", labels="full")
    prepared = prepare(config, features, table)
    assert not any("validation" in note for note in prepared.notes("clean"))
    val = prepared.splits["val"]
    nothing = replace(val, true=np.zeros_like(val.true))
    prepared.splits["val"] = nothing
    assert any("validation split has a positive" in note for note in prepared.notes("clean"))
