"""What is said of a label table: counts by split and by class."""

from dataclasses import replace

import numpy as np
import pytest

from mlc.datasets.labels import LabelTable
from mlc.report.labels import class_records, split_records

TRUE = np.array(
    [[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 1]],
    dtype=bool,
)
OBSERVED = np.array(
    [[1, 0, 0], [1, -1, -1], [0, 0, 0], [0, 1, 0], [0, 0, 0], [1, -1, 0]], dtype=np.int8
)


@pytest.fixture
def table() -> LabelTable:
    names = np.arange(6).astype(str)
    split = np.array(["train", "train", "train", "train", "val", "test"])
    return LabelTable(names, names, ("cat", "dog", "owl"), OBSERVED, TRUE, split, "csv-photos")


def test_a_record_for_each_split_counts_images_and_positives(table: LabelTable) -> None:
    train, val, test = split_records(table)
    assert train == {
        "split": "train",
        "images": "4",
        "positives per image": "1.50",
        "least": "0",
        "most": "3",
        "observed positives": "0.75",
        "observed negatives": "0.50",
        "without a positive": "1",
    }
    assert (val["split"], val["images"], val["positives per image"]) == ("val", "1", "1.00")
    assert val["without a positive"] == "0"  # none of its positives is observed
    assert (test["split"], test["most"], test["observed negatives"]) == ("test", "2", "1.00")


def test_large_counts_have_separators(table: LabelTable) -> None:
    many = table.rows(np.zeros(1, dtype=np.intp))
    names = np.arange(1234).astype(str)
    many = replace(
        many,
        image_id=names,
        file=names,
        observed=np.zeros((1234, 3), dtype=np.int8),
        true=np.zeros((1234, 3), dtype=bool),
        split=np.array(["train", "val", *["test"] * 1232]),
    )
    assert split_records(many)[2]["images"] == "1,232"


def test_a_record_for_each_class_counts_its_images(table: LabelTable) -> None:
    assert class_records(table) == [
        {"class": "cat", "train": "3", "val": "0", "test": "1", "train share": "75.00 %"},
        {"class": "dog", "train": "2", "val": "1", "test": "0", "train share": "50.00 %"},
        {"class": "owl", "train": "1", "val": "0", "test": "1", "train share": "25.00 %"},
    ]


def test_without_a_truth_the_observed_positives_are_counted(table: LabelTable) -> None:
    partial = replace(table, true=None)
    assert split_records(partial)[0]["positives per image"] == "0.75"
    assert [each["train"] for each in class_records(partial)] == ["2", "1", "0"]
