"""Ours beside the paper's figures: which figure stands where, and which is not there at all."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from made_runs import KEY, write

from mlc.configs.errors import MlcError
from mlc.losses.table import LOSSES as METHODS
from mlc.report import mlspl_paper
from mlc.report.mlspl_paper import mlspl_note, mlspl_records
from mlc.report.table import Report, make_report

PAPER_KEY = KEY | {"backbone": "resnet50.tv_in1k", "size_px": 448}
PAPER_GRID = tuple(product((1e-2, 1e-3, 1e-4, 1e-5), (8, 16)))
GRID = "a grid of {}, lr 1e-05, 0.0001, 0.001, 0.01 and batch 8, 16"
COLUMNS = ("paper linear", "paper end to end", "paper LinearInit")


def report_of(
    folder: Path,
    *names: str,
    dataset: str | None = "coco",
    grid: tuple[tuple[float, int], ...] = PAPER_GRID,
    **more: Any,
) -> Report:
    """Return a report of runs of the paper's protocol, but for what is given."""
    results = {} if dataset is None else {"dataset": dataset}
    settings = {"key": PAPER_KEY, "more": results} | more
    runs = [
        write(
            folder,
            f"{loss}{index}",
            loss=loss,
            **({"labels": METHODS[loss].labels, "lr": lr, "batch_size": size} | settings),
        )
        for loss in names
        for index, (lr, size) in enumerate(grid)
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
    assert set(mlspl_paper.LOSSES) <= set(METHODS)


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
    with pytest.raises(
        MlcError, match=r"an0: does not say which data set it is of; train it again"
    ):
        mlspl_records(report_of(tmp_path, "an", dataset=None))


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"no figures for data set 'digits'; it has them for voc, "):
        mlspl_note(report_of(tmp_path, "an", dataset="digits"))


def test_the_note_says_what_not_verified_means_and_what_is_missing(tmp_path: Path) -> None:
    text = mlspl_note(report_of(tmp_path, "an", "role", "asl"))
    assert "Cole et al., CVPR 2021, test mAP on COCO" in text
    assert "Not verified: published, but not checked" in text
    assert "all 40,137 test images; resnet50 with torchvision's ImageNet V1" in text
    assert "Here it is otherwise: 80 test images.\n" in text
    assert text.endswith("Not run here: bce, bce_ls, iun, iu, an_ls, wan, epr.")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(
            ({"key": PAPER_KEY | {"backbone": name}}, name)
            for name in (
                "resnet50d.ra2_in1k",
                "resnet50.a1_in1k",
                "resnet50.tv2_in1k",
                "resnet50 with random weights",
                "resnet50 with mine.pth",
            )
        ),
        ({"key": PAPER_KEY | {"size_px": 224}}, "224 px"),
        ({"epochs": 5}, "5 epochs"),
        ({"val_labels": "observed"}, "selection on observed labels"),
        ({"labels": "full"}, "an on full labels"),
        ({"classes": ("class 0", "class 1", "class 2")}, "3 of the classes"),
        ({"weight_decay": 1e-3}, "weight decay"),
        ({"split_seed": 7}, "split seed 7"),
        ({"corruption_seed": 1201}, "corruption seed 1201"),
        ({"grid": PAPER_GRID[:-1]}, GRID.format(7)),
        ({"grid": (*PAPER_GRID, (0.1, 8))}, GRID.format(9).replace("0.01 ", "0.01, 0.1 ")),
        ({"grid": ((1e-3, 16),)}, "a grid of 1, lr 0.001 and batch 16"),
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
    key = {"backbone": "imported:resnet50", "size_px": 0}
    features = {"backbone": "resnet50 of the MLSPL authors", "key": key, "digest": "photos"}
    more = {"dataset": "coco", "features": features}
    text = mlspl_note(report_of(tmp_path, *mlspl_paper.LOSSES, key=key, more=more))
    assert text.endswith("Here it is otherwise: nothing that is known.")


@pytest.mark.parametrize("name", mlspl_paper.WEIGHTS)
def test_the_weights_of_the_paper_have_several_names(tmp_path: Path, name: str) -> None:
    text = mlspl_note(report_of(tmp_path, "an", key=PAPER_KEY | {"backbone": name}))
    assert "Here it is otherwise: 80 test images.\n" in text


def test_the_seed_of_a_corruption_that_there_is_not_does_not_matter(tmp_path: Path) -> None:
    text = mlspl_note(report_of(tmp_path, "bce", corruption_seed=7))
    assert "Here it is otherwise: 80 test images.\n" in text


@pytest.mark.parametrize(
    ("loss", "knobs", "words"),
    [
        ("an_ls", {"smoothing": 0.1}, ""),
        ("an_ls", {"smoothing": 0.2}, "; an_ls with smoothing 0.2"),
        ("wan", {"negative_weight": 0.5}, "; wan with negative_weight 0.5"),
        ("epr", {"expected_positives": 1.9}, ""),
        ("epr", {"expected_positives": 2.9}, "; epr with expected_positives 2.9"),
    ],
)
def test_knobs_are_the_defaults_and_the_constant_of_the_data_set(
    tmp_path: Path, loss: str, knobs: dict[str, float], words: str
) -> None:
    text = mlspl_note(report_of(tmp_path, loss, knobs=knobs, dataset="nuswide"))
    assert f"Here it is otherwise: 80 test images{words}.\n" in text


def test_one_other_seed_among_those_of_a_row_is_named(tmp_path: Path) -> None:
    runs = [
        run
        for seed in (0, 1, 2)
        for row in report_of(
            tmp_path / str(seed), "an", seed=seed, corruption_seed=1200 + seed
        ).rows
        for run in row.runs
    ]
    text = mlspl_note(make_report(runs, resamples=20))
    assert "; corruption seed 1201, 1202; a grid of 1, " in text


def test_weight_decay_that_was_tried_and_not_chosen_differs_too(tmp_path: Path) -> None:
    labels = METHODS["an"].labels
    shared = {"key": PAPER_KEY, "more": {"dataset": "coco"}, "labels": labels}
    runs = [
        write(tmp_path, f"{lr}{size}{decay}", lr=lr, batch_size=size, weight_decay=decay, **shared)
        for lr, size in PAPER_GRID
        for decay in (0.0, 1e-3)
    ]
    report = make_report(runs, resamples=20)
    assert report.rows[0].tuned["weight decay"] == "0"
    assert "Here it is otherwise: 80 test images; weight decay.\n" in mlspl_note(report)


def test_an_optimum_has_no_grid_and_no_epochs(tmp_path: Path) -> None:
    more = {"dataset": "coco", "strength": 1.0}
    text = mlspl_note(report_of(tmp_path, "an", solver="lbfgs", epochs=3, more=more))
    assert "Here it is otherwise: 80 test images; a full-batch solver.\n" in text
