"""Ours beside the paper's figures: which figure stands where, and which is not there at all."""

from pathlib import Path
from typing import Any

import pytest
from made_runs import KEY, write

from mlc.configs.errors import MlcError
from mlc.heads import losses
from mlc.report import mlspl_paper
from mlc.report.mlspl_paper import mlspl_note, mlspl_records
from mlc.report.table import Report, make_report

PAPER_KEY = KEY | {"backbone": "resnet50.tv_in1k", "size_px": 448}
COLUMNS = ("paper linear", "paper end to end", "paper LinearInit")


def report_of(folder: Path, *names: str, dataset: str | None = "coco", **more: Any) -> Report:
    """Return a report of runs of the paper's protocol, but for what is given."""
    results = {} if dataset is None else {"dataset": dataset}
    settings = {"key": PAPER_KEY, "more": results} | more
    runs = [
        write(folder, loss, loss=loss, **({"labels": losses.LOSSES[loss].labels} | settings))
        for loss in names
    ]
    return make_report(runs, resamples=20)


def figures(report: Report) -> dict[str, tuple[str, ...]]:
    return {each["loss"]: tuple(each[c] for c in COLUMNS) for each in mlspl_records(report)}


@pytest.mark.parametrize(
    ("dataset", "an", "role"),
    [
        ("voc", "85.1", ("87.9", "88.2")),
        ("coco", "64.1", ("66.3", "69.0")),
        ("nuswide", "42.0", ("43.1", "51.0")),
        ("cub", "19.1", ("15.0", "16.8")),
        ("coco-formatted", "64.1", ("66.3", "69.0")),
    ],
)
def test_figures_are_of_the_loss_and_of_the_data_set(
    tmp_path: Path, dataset: str, an: str, role: tuple[str, str]
) -> None:
    report = report_of(tmp_path, "an", "role", "bce", "asl", dataset=dataset)
    assert figures(report) == {
        "an": ("not verified", an, ""),
        "role": ("not verified", *role),
        "bce": ("not verified", "not verified", ""),
        "asl": ("", "", ""),
    }


def test_ours_stand_beside_them(tmp_path: Path) -> None:
    report = report_of(tmp_path, "an")
    (record,) = mlspl_records(report)
    assert list(record) == ["loss", "seeds", "test mAP", "std", *COLUMNS]
    assert (record["loss"], record["seeds"], record["std"]) == ("an", "1", "")
    assert record["test mAP"] == f"{report.rows[0].test:.2f}"


def test_only_losses_of_the_paper_have_figures_and_all_four_of_them() -> None:
    for mode in (mlspl_paper.LINEAR, mlspl_paper.END_TO_END, mlspl_paper.LINEAR_INIT):
        for loss, values in mode.items():
            assert loss in mlspl_paper.LOSSES
            assert list(values) == list(mlspl_paper.DATA_SETS)
            assert all(0 < value < 100 for value in values.values())
    assert set(mlspl_paper.LOSSES) <= set(losses.LOSSES)


def test_no_figure_that_is_not_verified_is_in_the_table() -> None:
    assert mlspl_paper.LINEAR == {}
    assert not mlspl_paper.END_TO_END.keys() & {"bce", "bce_ls", "iun", "iu"}


def test_the_data_set_of_older_runs_is_the_one_they_were_given(tmp_path: Path) -> None:
    report = report_of(tmp_path, "an", dataset=None, data="voc")
    assert figures(report)["an"] == ("not verified", "85.1", "")


def test_what_the_results_say_is_believed_before_what_was_asked(tmp_path: Path) -> None:
    report = report_of(tmp_path, "an", dataset="cub", data="voc")
    assert figures(report)["an"] == ("not verified", "19.1", "")


def test_runs_that_do_not_say_their_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"an: does not say which data set it is of; train it again"):
        mlspl_records(report_of(tmp_path, "an", dataset=None))


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"no figures for data set 'digits'; it has them for voc, "):
        mlspl_note(report_of(tmp_path, "an", dataset="digits"))


def test_the_note_says_what_not_verified_means_and_what_is_missing(tmp_path: Path) -> None:
    text = mlspl_note(report_of(tmp_path, "an", "role", "asl"))
    assert "Cole et al., CVPR 2021, test mAP on COCO" in text
    assert "Not verified: published, but not checked" in text
    assert "all 40,137 test images; resnet50" in text
    assert "Here it is otherwise: 80 test images.\n" in text
    assert text.endswith("Not run here: bce, bce_ls, iun, iu, an_ls, wan, epr.")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"key": PAPER_KEY | {"backbone": "resnet50d.ra2_in1k"}}, "resnet50d.ra2_in1k"),
        ({"key": PAPER_KEY | {"size_px": 224}}, "224 px"),
        ({"epochs": 5}, "5 epochs"),
        ({"val_labels": "observed"}, "selection on observed labels"),
        ({"labels": "full"}, "an on full labels"),
        ({"classes": ("class 0", "class 1", "class 2")}, "3 of the classes"),
        ({"weight_decay": 1e-3}, "weight decay"),
    ],
)
def test_the_note_says_what_differs_from_the_paper(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    text = mlspl_note(report_of(tmp_path, "an", **settings))
    assert f"Here it is otherwise: 80 test images; {words}.\n" in text


def test_nothing_differs_of_the_authors_own_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mlspl_paper.DATA_SETS, "coco", mlspl_paper.DataSet("COCO", 80))
    key = {"backbone": "resnet50 of the MLSPL authors, imported features", "size_px": 0}
    text = mlspl_note(report_of(tmp_path, *mlspl_paper.LOSSES, key=key))
    assert text.endswith("Here it is otherwise: nothing that is known.")
