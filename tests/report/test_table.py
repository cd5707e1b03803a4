"""The table of runs: groups over seeds, choice by validation, intervals, and its written forms."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlc.configs.errors import MlcError
from mlc.heads.metrics import mean_ap
from mlc.heads.run_folder import Run, read_run, write_run
from mlc.heads.train import TrainConfig, probabilities
from mlc.report.table import Report, find_runs, make_report
from mlc.report.written import footnote, to_csv, to_markdown, to_records, write_table

IMAGES, CLASSES = 80, 3
TRUE = np.random.default_rng(0).random((IMAGES, CLASSES)) < 0.3
KEY = {"backbone": "stub", "size_px": 64, "precision": "float32"}


def logits_of(skill: float, seed: int = 0, true: np.ndarray = TRUE) -> np.ndarray:
    """Return float32 scores that know ``skill`` standard deviations of the truth."""
    noise = np.random.default_rng(100 + seed).standard_normal(true.shape)
    return (skill * true + noise).astype(np.float32)


def write(
    folder: Path,
    name: str,
    *,
    skill: float = 1.0,
    val: float = 50.0,
    true: np.ndarray = TRUE,
    ids: np.ndarray | None = None,
    key: dict[str, Any] = KEY,
    **settings: Any,
) -> Run:
    """Write a run folder of made-up scores; its test mAP is what these scores have."""
    config = TrainConfig(**({"loss": "an"} | settings))
    logits = logits_of(skill, config.seed, true)
    scores = {
        "image_id": np.arange(len(true)).astype(str) if ids is None else ids,
        "logits": logits,
        "true": true,
        "observed": np.where(true, 1, -1).astype(np.int8),
    }
    results = {
        "best_epoch": 1,
        "val": {"mAP": val},
        "test": {"mAP": mean_ap(probabilities(logits), true)},
        "classes": [f"class {column}" for column in range(true.shape[1])],
        "features": {"backbone": key["backbone"], "key": key, "digest": "photos"},
        "labels_digest": "table",
        "selection_mAP": val,
        "truth_known": True,
    }
    state = {"weight": torch.zeros(true.shape[1], 2), "bias": torch.zeros(true.shape[1])}
    write_run(folder / name, config, state, [], scores, results)
    return read_run(folder / name)


def report_of(runs: list[Run], **more: Any) -> Report:
    return make_report(runs, resamples=200, **more)


def names(report: Report) -> list[str]:
    return [row.name["loss"] for row in report.rows]


def test_runs_that_differ_in_their_seeds_are_one_row(tmp_path: Path) -> None:
    seeds = [
        {"seed": 0},
        {"seed": 1, "order_seed": 1},
        {"seed": 2, "order_seed": 2, "corruption_seed": 1202},
    ]
    runs = [
        write(tmp_path, f"an{index}", val=40 + index, **each) for index, each in enumerate(seeds)
    ]
    (row,) = report_of(runs).rows
    tests = [run.results["test"]["mAP"] for run in runs]
    assert row.seeds == 3
    assert row.val == pytest.approx(41)
    assert row.test == pytest.approx(np.mean(tests))
    deviation = np.sqrt(sum((each - np.mean(tests)) ** 2 for each in tests) / 2)
    assert row.deviation == pytest.approx(deviation)
    assert row.deviation > 0.1


def test_one_run_has_no_deviation(tmp_path: Path) -> None:
    report = report_of([write(tmp_path, "an")])
    assert np.isnan(report.rows[0].deviation)
    assert to_records(report)[0]["std"] == ""


def test_where_a_run_lies_and_what_it_ran_on_do_not_part_a_group(tmp_path: Path) -> None:
    runs = [
        write(tmp_path, "one", seed=0, device="cpu", out=tmp_path / "one", features="a.zarr"),
        write(tmp_path, "two", seed=1, device="auto", root=tmp_path, features="b.zarr"),
    ]
    assert [row.seeds for row in report_of(runs).rows] == [2]


def test_runs_that_learned_from_other_labels_are_not_seeds_of_one_row(tmp_path: Path) -> None:
    runs = [write(tmp_path, name, labels_file=f"{name}.npz") for name in ("clean", "noisy")]
    rows = report_of(runs).rows
    assert [row.seeds for row in rows] == [1, 1]
    assert rows[0].name != rows[1].name


def test_the_learning_rate_is_chosen_by_validation_and_not_by_test(tmp_path: Path) -> None:
    runs = [
        write(tmp_path, "low", lr=1e-4, val=60, skill=0.5),
        write(tmp_path, "high", lr=1e-2, val=55, skill=3.0),
        write(tmp_path, "large batch", lr=1e-4, batch_size=8, val=50, skill=2.0),
    ]
    (row,) = report_of(runs).rows
    assert (row.lr, row.batch_size, row.val) == (1e-4, 16, 60)
    assert row.test == runs[0].results["test"]["mAP"] < runs[1].results["test"]["mAP"]


def test_the_choice_is_of_the_mean_over_seeds(tmp_path: Path) -> None:
    runs = [
        write(tmp_path, "a0", lr=1e-2, val=90, seed=0),
        write(tmp_path, "a1", lr=1e-2, val=10, seed=1),
        write(tmp_path, "b0", lr=1e-3, val=60, seed=0),
        write(tmp_path, "b1", lr=1e-3, val=61, seed=1),
    ]
    (row,) = report_of(runs).rows
    assert (row.lr, row.seeds) == (1e-3, 2)


def test_every_setting_can_be_shown(tmp_path: Path) -> None:
    runs = [write(tmp_path, str(lr), lr=lr, skill=100 * lr, val=lr) for lr in (1e-3, 1e-2, 2e-2)]
    report = report_of(runs, every_setting=True)
    assert [row.lr for row in report.rows] == [2e-2, 1e-2, 1e-3]


def test_rows_are_in_falling_order_of_test_map_behind_the_best(tmp_path: Path) -> None:
    skills = {"an": 1.0, "bce": 3.0, "role": 2.0}
    report = report_of([write(tmp_path, loss, loss=loss, skill=skills[loss]) for loss in skills])
    assert names(report) == ["bce", "role", "an"]
    best = report.rows[0]
    assert (best.behind, best.interval) == (0, (0, 0))
    for row in report.rows[1:]:
        assert row.behind == pytest.approx(row.test - best.test)
        assert row.behind < 0


def test_the_interval_holds_the_difference_and_is_of_paired_images(tmp_path: Path) -> None:
    clear = report_of(
        [write(tmp_path, loss, loss=loss, skill=1 + 3 * (loss == "bce")) for loss in ("an", "bce")]
    )
    _, behind = clear.rows
    low, high = behind.interval
    assert low < behind.behind < high < 0


def test_scores_of_the_same_order_differ_by_nothing_in_every_resample(tmp_path: Path) -> None:
    """Unpaired resamples would give an interval of several points here."""
    report = report_of([write(tmp_path, loss, loss=loss, skill=1.0) for loss in ("an", "bce")])
    assert report.rows[1].behind == 0
    assert report.rows[1].interval == (0, 0)


def test_the_difference_is_of_means_over_seeds(tmp_path: Path) -> None:
    runs = [
        write(tmp_path, f"{loss}{seed}", loss=loss, seed=seed, skill=1 + 2 * (loss == "bce"))
        for loss in ("an", "bce")
        for seed in range(3)
    ]
    report = report_of(runs)
    mean = {
        loss: np.mean([run.results["test"]["mAP"] for run in runs if run.config.loss == loss])
        for loss in ("an", "bce")
    }
    assert report.rows[1].behind == pytest.approx(mean["an"] - mean["bce"])
    low, high = report.rows[1].interval
    assert low < report.rows[1].behind < high


def test_the_same_runs_give_the_same_table(tmp_path: Path) -> None:
    runs = [
        write(tmp_path, loss, loss=loss, skill=index) for index, loss in enumerate(("an", "bce"))
    ]
    assert to_csv(report_of(runs)) == to_csv(report_of(runs))


def test_the_class_prior_is_the_map_of_a_constant_score(tmp_path: Path) -> None:
    report = report_of([write(tmp_path, "an")])
    assert report.prior == pytest.approx(mean_ap(np.zeros(TRUE.shape), TRUE))
    last = to_records(report)[-1]
    assert (last["loss"], last["test mAP"]) == ("class prior", f"{report.prior:.2f}")
    assert {last[name] for name in last if name not in ("loss", "test mAP")} == {""}


def other_order() -> dict[str, Any]:
    return {"ids": np.arange(IMAGES)[::-1].astype(str)}


def other_labels() -> dict[str, Any]:
    flipped = TRUE.copy()
    flipped[3, 1] ^= True
    return {"true": flipped}


def fewer_images() -> dict[str, Any]:
    return {"true": TRUE[:-1]}


def fewer_classes() -> dict[str, Any]:
    return {"true": TRUE[:, :2]}


@pytest.mark.parametrize("other", [other_order, other_labels, fewer_images, fewer_classes])
def test_runs_of_other_test_images_or_classes_are_not_compared(tmp_path: Path, other: Any) -> None:
    runs = [write(tmp_path, "an"), write(tmp_path, "bce", loss="bce", **other())]
    with pytest.raises(MlcError, match=r"bce: its test images or classes .* of .*an; report them"):
        report_of(runs)


def test_a_setting_in_which_rows_differ_is_a_column(tmp_path: Path) -> None:
    runs = [
        write(tmp_path, f"{loss}{epochs}", loss=loss, epochs=epochs, skill=epochs + (loss == "an"))
        for loss in ("an", "bce")
        for epochs in (1, 25)
    ]
    report = report_of(runs)
    assert [row.name for row in report.rows] == [
        {"loss": "an", "epochs": "25"},
        {"loss": "bce", "epochs": "25"},
        {"loss": "an", "epochs": "1"},
        {"loss": "bce", "epochs": "1"},
    ]
    assert list(to_records(report)[0])[:2] == ["loss", "epochs"]


def test_what_follows_from_the_loss_is_no_column(tmp_path: Path) -> None:
    runs = [
        write(tmp_path, "bce", loss="bce", labels="full"),
        write(tmp_path, "an_ls", loss="an_ls", labels="single-positive", knobs={"smoothing": 0.1}),
        write(
            tmp_path, "epr", loss="epr", labels="single-positive", knobs={"expected_positives": 2}
        ),
    ]
    assert {tuple(row.name) for row in report_of(runs).rows} == {("loss",)}


def test_knobs_and_labels_that_differ_within_a_loss_are_columns(tmp_path: Path) -> None:
    runs = [
        write(tmp_path, "0", loss="an_ls", labels="full", knobs={"smoothing": 0.1}),
        write(tmp_path, "1", loss="an_ls", labels="single-positive", knobs={"smoothing": 0.2}),
    ]
    assert {tuple(row.name) for row in report_of(runs).rows} == {("loss", "labels", "knobs")}


def test_other_features_are_a_column_and_never_one_row(tmp_path: Path) -> None:
    keys = [KEY, KEY | {"size_px": 448}, KEY | {"backbone": "resnet50"}]
    runs = [write(tmp_path, str(index), key=key) for index, key in enumerate(keys)]
    report = report_of(runs)
    assert {row.name["features"] for row in report.rows} == {
        "stub 64 px",
        "stub 448 px",
        "resnet50 64 px",
    }
    assert {tuple(row.name) for row in report.rows} == {("loss", "features")}


def test_features_that_differ_in_the_fine_print_are_told_apart(tmp_path: Path) -> None:
    keys = [KEY, KEY | {"precision": "bfloat16"}]
    runs = [write(tmp_path, str(index), key=key) for index, key in enumerate(keys)]
    first, second = report_of(runs).rows
    assert first.name != second.name
    assert {"bfloat16" in str(row.name) for row in (first, second)} == {True, False}


def test_the_footnote_names_what_cannot_be_told_from_the_best(tmp_path: Path) -> None:
    close = write(tmp_path, "an", loss="an", skill=3.0)
    best = write(tmp_path, "bce", loss="bce", skill=3.05)
    far = write(tmp_path, "role", loss="role", skill=0.0)
    report = report_of([close, best, far])
    assert names(report) == ["bce", "an", "role"]
    text = footnote(report)
    assert "80 test images" in text
    assert "200 resamples" in text
    assert text.endswith("Cannot be told apart from the best: an.")


def test_the_footnote_says_nothing_of_ties_where_there_are_none(tmp_path: Path) -> None:
    runs = [write(tmp_path, "bce", loss="bce", skill=4.0), write(tmp_path, "an", skill=0.0)]
    assert "told apart" not in footnote(report_of(runs))


def test_a_row_that_is_exactly_as_good_as_the_best_cannot_be_told_apart(tmp_path: Path) -> None:
    runs = [write(tmp_path, "bce", loss="bce"), write(tmp_path, "an")]
    text = footnote(report_of(runs))
    assert text.endswith("Cannot be told apart from the best: an.")


@pytest.fixture
def report(tmp_path: Path) -> Report:
    runs = [
        write(tmp_path, f"{loss}{seed}", loss=loss, seed=seed, skill=skill, lr=1e-4)
        for loss, skill in (("an", 1.0), ("role", 3.0))
        for seed in range(2)
    ]
    return report_of(runs)


def test_records_are_rounded_text(report: Report) -> None:
    best, behind, _ = to_records(report)
    assert list(best) == [
        *("loss", "lr", "batch", "seeds", "val mAP", "test mAP", "std", "to best", "95 % interval")
    ]
    assert (best["loss"], best["lr"], best["batch"], best["seeds"]) == ("role", "0.0001", "16", "2")
    assert (best["to best"], best["95 % interval"]) == ("best", "")
    assert behind["test mAP"] == f"{report.rows[1].test:.2f}"
    assert re.fullmatch(r"-\d+\.\d\d", behind["to best"])
    assert re.fullmatch(r"-\d+\.\d\d to -\d+\.\d\d", behind["95 % interval"])


def test_markdown_has_a_line_for_each_record_between_bars(report: Report) -> None:
    lines = to_markdown(report).splitlines()
    records = to_records(report)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    assert cells[0] == list(records[0])
    assert set(cells[1]) == {"---"}
    assert cells[2:] == [list(record.values()) for record in records]


def test_csv_reads_back_as_the_records(report: Report) -> None:
    assert list(csv.DictReader(io.StringIO(to_csv(report)))) == to_records(report)


@pytest.mark.parametrize(("name", "to_text"), [("t.md", to_markdown), ("t.csv", to_csv)])
def test_a_table_is_written_as_its_suffix_says(
    report: Report, tmp_path: Path, name: str, to_text: Any
) -> None:
    write_table(report, tmp_path / name)
    assert (tmp_path / name).read_bytes().decode() == to_text(report)


def test_another_suffix_is_refused(report: Report, tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"unknown kind of table '.txt'"):
        write_table(report, tmp_path / "table.txt")


def test_runs_are_found_in_a_folder_or_named_once(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / "runs", name)
    write(tmp_path, "alone", loss="bce")
    (tmp_path / "runs" / "notes").mkdir()
    paths = [tmp_path / "runs", tmp_path / "alone", tmp_path / "runs" / "a"]
    found = [run.path.relative_to(tmp_path).as_posix() for run in find_runs(paths)]
    assert found == ["runs/a", "runs/b", "alone"]


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"none: no run folders there; mlc train-head and mlc sweep"):
        find_runs([tmp_path / "none"])


def test_a_named_folder_without_runs_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "an")
    with pytest.raises(MlcError, match=r"nowhere: no run folders there"):
        find_runs([tmp_path / "an", tmp_path / "nowhere"])


def test_progress_hears_of_each_run_that_is_resampled(tmp_path: Path) -> None:
    heard = []
    runs = [write(tmp_path, str(seed), seed=seed) for seed in range(3)]
    report_of(runs, progress=lambda done, total, note="": heard.append((done, total, note)))
    assert heard == [(1, 3, "0"), (2, 3, "1"), (3, 3, "2")]
