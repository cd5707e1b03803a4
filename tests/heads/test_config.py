"""Configs of training: what is checked before any work, and what is settled from the data."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlc.configs.errors import MlcError
from mlc.datasets.labels import LabelTable, full_labels
from mlc.heads.config import (
    TrainConfig,
    check_config,
    default_labels,
    settle_knobs,
    splits_in_views,
)
from mlc.losses.table import LOSSES


def table_of(**changes: Any) -> LabelTable:
    """Return four training images of 1, 2, 3 and 4 labels, and a test image of none."""
    true = np.tri(5, 4, dtype=bool)
    true[4] = False
    names = np.arange(5).astype(str)
    split = np.array(["train"] * 4 + ["test"])
    table = LabelTable(
        names, names, (*"abcd",), full_labels(true), true, split, "coco", expected_positives=2.9
    )
    return replace(table, **changes)


def test_knobs_are_those_given_or_else_the_losss_own() -> None:
    table = table_of()
    assert settle_knobs(TrainConfig(loss="an"), table) == {}
    assert settle_knobs(TrainConfig(loss="an_ls"), table) == {"smoothing": 0.1}
    given = TrainConfig(loss="an_ls", knobs={"smoothing": 0.05})
    assert settle_knobs(given, table) == {"smoothing": 0.05}


def test_a_knob_that_the_loss_works_out_is_left_to_it() -> None:
    assert settle_knobs(TrainConfig(loss="wan"), table_of()) == {}
    given = TrainConfig(loss="wan", knobs={"negative_weight": 0.5})
    assert settle_knobs(given, table_of()) == {"negative_weight": 0.5}


@pytest.mark.parametrize("loss", ["epr", "role"])
def test_expected_positives_are_given_or_the_papers_or_counted_in_training(loss: str) -> None:
    config = TrainConfig(loss=loss)
    given = TrainConfig(loss=loss, knobs={"expected_positives": 7.0})
    counted, partial = (
        table_of(expected_positives=None),
        table_of(expected_positives=None, true=None),
    )
    assert settle_knobs(config, table_of()) == {"expected_positives": 2.9}
    assert settle_knobs(config, counted) == {"expected_positives": 2.5}
    for table in (table_of(), counted, partial):
        assert settle_knobs(given, table) == {"expected_positives": 7.0}
    with pytest.raises(MlcError, match=r"not known of partial .* --set knobs.expected_positives="):
        settle_knobs(config, partial)


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_are_those_asked_for_or_what_the_loss_is_made_for(loss: str) -> None:
    wanted = {
        "bce": "full",
        "bce_ls": "full",
        "focal": "full",
        "asl": "full",
        "iun": "one-positive-all-negatives",
        "iu": "one-positive-one-negative",
    }.get(loss, "single-positive")
    config = TrainConfig(loss=loss)
    assert default_labels(config, table_of(dataset="coco")) == wanted
    assert default_labels(config, table_of(dataset="digits")) == wanted
    assert default_labels(config, table_of(dataset="csv-photos")) == "as-given"
    asked = TrainConfig(loss=loss, labels="full")
    assert default_labels(asked, table_of(dataset="csv-photos")) == "full"


@pytest.mark.parametrize(
    ("settings", "splits"),
    [
        ({}, set()),
        ({"view_augment": True}, {"train"}),
        ({"eval_views": "mean"}, {"val", "test"}),
        ({"view_augment": True, "eval_views": "mean"}, {"train", "val", "test"}),
    ],
)
def test_a_split_has_all_views_only_where_they_are_of_use(settings: dict, splits: set) -> None:
    assert splits_in_views(TrainConfig(**settings)) == splits


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"head": "liner"}, r"unknown head 'liner'; did you mean 'linear'"),
        ({"loss": "bec"}, r"unknown loss 'bec'; did you mean 'bce'"),
        ({"knobs": {"smoothing": 0.1}}, r"bce has no knob 'smoothing'"),
        ({"epochs": 0}, r"epochs: should be at least 1, got 0"),
        ({"batch_size": -1}, r"batch_size: should be at least 1, got -1"),
        ({"seed": -1}, r"seed: should be from 0 to 2\*\*32 - 1, got -1"),
        ({"corruption_seed": 2**32}, r"corruption_seed: .* got 4294967296"),
        ({"weight_decay": -1.0}, r"weight_decay: should be at least 0 and below 1 / lr, got -1.0"),
        ({"weight_decay": 1e4}, r"weight_decay: .* got 10000.0"),
        ({"weight_decay": math.nan}, r"weight_decay: .* got nan"),
        ({"lr": 0.0}, r"lr: should be a positive number, got 0.0"),
        ({"lr": math.nan}, r"lr: should be a positive number, got nan"),
        ({"lr": math.inf}, r"lr: should be a positive number, got inf"),
        ({"loss": "an_ls", "knobs": {"smoothing": math.nan}}, r"smoothing: .* got nan"),
    ],
)
def test_settings_are_checked_before_any_work(settings: dict, sentence: str) -> None:
    check_config(TrainConfig())
    with pytest.raises(MlcError, match=sentence):
        check_config(TrainConfig(**settings))
