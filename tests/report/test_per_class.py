"""Gains of classes: over tuned AN, of means over seeds, sorted, and by thirds of the classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import CLASSES, TRUE, write

from mlc.configs.errors import MlcError
from mlc.report.per_class import class_note, class_records, require_baseline
from mlc.report.table import Report, make_report

AP = {
    "an": [(10.0, 50.0, 30.0), (20.0, 50.0, 30.0)],  # of two seeds: 15, 50, 30
    "role": [(20.0, 90.0, 35.0), (20.0, 90.0, 35.0)],  # +5, +40, +5
    "wan": [(10.0, 40.0, 40.0), (10.0, 40.0, 40.0)],  # -5, -10, +10
}
TRAIN = {"class 0": 7, "class 1": 1200, "class 2": 3}


def report_of(folder: Path, *names: str, **more: Any) -> Report:
    runs = []
    for loss in names or AP:
        for seed, values in enumerate(AP[loss]):
            ap = {f"class {column}": each for column, each in enumerate(values)}
            test = {"mAP": float(np.mean(values)), "per_class_ap": ap}
            results = {"test": test} | more
            runs.append(write(folder, f"{loss}{seed}", loss=loss, seed=seed, more=results))
    return make_report(runs, resamples=20)


def test_classes_are_sorted_by_what_the_best_row_gains(tmp_path: Path) -> None:
    records = class_records(report_of(tmp_path, train_positives=TRAIN))[:CLASSES]
    positives = [str(each) for each in TRUE.sum(axis=0)]
    columns = ("class", "train positives", "test positives", "an", "role", "wan")
    assert [tuple(each) for each in records] == [columns] * 3
    assert [tuple(each.values()) for each in records] == [
        ("class 1", "1,200", positives[1], "50.00", "+40.00", "-10.00"),
        ("class 0", "7", positives[0], "15.00", "+5.00", "-5.00"),
        ("class 2", "3", positives[2], "30.00", "+5.00", "+10.00"),
    ]


def test_the_last_lines_are_thirds_by_training_positives(tmp_path: Path) -> None:
    report = report_of(tmp_path, train_positives=TRAIN)
    assert [tuple(each.values()) for each in class_records(report)[CLASSES:]] == [
        ("rare classes (1)", "3 to 3", "", "30.00", "+5.00", "+10.00"),
        ("medium classes (1)", "7 to 7", "", "15.00", "+5.00", "-5.00"),
        ("frequent classes (1)", "1,200 to 1,200", "", "50.00", "+40.00", "-10.00"),
    ]
    assert "number of training positives" in class_note(report)


def test_older_runs_are_cut_by_test_positives(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    records = class_records(report)
    assert "train positives" not in records[0]
    counts = TRUE.sum(axis=0)
    rare = int(np.argmin(counts))
    assert records[CLASSES]["test positives"] == f"{counts[rare]} to {counts[rare]}"
    assert records[CLASSES]["an"] == ("15.00", "50.00", "30.00")[rare]
    assert "number of test positives" in class_note(report)


def test_where_an_is_best_the_second_row_sorts(tmp_path: Path) -> None:
    records = class_records(report_of(tmp_path, "an", "wan"))
    assert [each["class"] for each in records[:CLASSES]] == ["class 2", "class 0", "class 1"]


def test_an_alone_is_sorted_by_its_ap(tmp_path: Path) -> None:
    records = class_records(report_of(tmp_path, "an"))
    assert [each["an"] for each in records[:CLASSES]] == ["50.00", "30.00", "15.00"]


def test_each_setting_has_a_column(tmp_path: Path) -> None:
    runs = [write(tmp_path, str(lr), lr=lr, val=100 * lr) for lr in (1e-3, 1e-2)]
    report = make_report(runs, every_setting=True, resamples=20)
    titles = list(class_records(report)[0])[2:]
    assert titles == ["an lr 0.01 batch 16", "an lr 0.001 batch 16"]


def test_without_an_there_is_nothing_to_gain_over(tmp_path: Path) -> None:
    report = report_of(tmp_path, "role", "wan")
    message = r"gains are over tuned AN, and none of the 4 runs is of it; mlc sweep --losses an"
    for refuses in (class_records, class_note):
        with pytest.raises(MlcError, match=message):
            refuses(report)
    with pytest.raises(MlcError, match=message):
        require_baseline([run for row in report.rows for run in row.runs])
