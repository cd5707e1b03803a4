"""From a config to a run folder: where it lies, and what is said of the labels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import made_store
import numpy as np
import pytest

from mlc.heads.config import TrainConfig
from mlc.heads.fit import prepare, run_path
from mlc.heads.inputs import Features, read_features


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


def test_a_validation_split_without_positives_is_told(features: Features) -> None:
    table = made_store.table_of()
    config = TrainConfig(loss="bce", labels="full")
    prepared = prepare(config, features, table)
    assert not any("validation" in note for note in prepared.notes("clean"))
    val = prepared.splits["val"]
    nothing = replace(val, true=np.zeros_like(val.true))
    prepared.splits["val"] = nothing
    assert any("validation split has a positive" in note for note in prepared.notes("clean"))
