"""Imported checkpoints among runs: none is another, and nothing of their training is made up."""

import json
from pathlib import Path

import pytest
from made_runs import write

from mlc.cli import main
from mlc.configs.errors import MlcError
from mlc.heads.run_folder import NOT_SELECTED, RESULTS, SCORES, Run, read_run
from mlc.report.table import make_report
from mlc.report.written import to_records


def imported(folder: Path, name: str, digest: str = "", skill: float = 1.0) -> Run:
    run = write(
        folder,
        name,
        skill=skill,
        loss="asl",
        head="q2l",
        more={"official": None, "dataset": "coco", "checkpoint": {"digest": digest or name}},
    )
    results = {key: each for key, each in run.results.items() if key not in NOT_SELECTED}
    (run.path / RESULTS).write_text(json.dumps(results | {"labels_digest": "table"}))
    return read_run(run.path)


def never_evaluated(folder: Path, name: str, *, killed: bool) -> Run:
    """Write an import that has no scores; or has, but whose evaluation was killed then."""
    run = imported(folder, name)
    results = json.loads((run.path / RESULTS).read_text())
    del results["test"]
    (run.path / RESULTS).write_text(json.dumps(results))
    if not killed:
        (run.path / SCORES).unlink()
    return read_run(run.path)


def test_two_checkpoints_of_one_backbone_are_two_rows(tmp_path: Path) -> None:
    runs = [imported(tmp_path, name, skill=skill) for name, skill in (("a", 1.0), ("b", 2.0))]
    rows = make_report(runs, resamples=20).rows
    assert [row.name["checkpoint"] for row in rows] == ["b", "a"]


def test_one_checkpoint_in_two_folders_is_one_row(tmp_path: Path) -> None:
    runs = [imported(tmp_path, name, digest="same") for name in ("a", "b")]
    assert [row.seeds for row in make_report(runs, resamples=20).rows] == [1]


def test_what_nobody_knows_of_a_checkpoint_is_left_empty(tmp_path: Path) -> None:
    runs = [imported(tmp_path, "a"), write(tmp_path, "own", loss="bce", lr=0.25, val=30)]
    records = {each["loss"]: each for each in to_records(make_report(runs, resamples=20))}
    empty = ("lr", "batch", "val mAP")
    assert [records["asl"][name] for name in empty] == ["", "", ""]
    assert [records["bce"][name] for name in empty] == ["0.25", "16", "30.00"]
    assert records["asl"]["test mAP"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_checkpoint_that_was_not_evaluated_is_left_out(
    tmp_path: Path, killed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = never_evaluated(tmp_path, "bare", killed=killed)
    write(tmp_path, "own", loss="bce")
    main(["report", str(tmp_path), "--resamples", "100"])
    printed = capsys.readouterr()
    assert f"left out: {run.path}, which was not evaluated on test images yet\n" in printed.err
    assert "bce" in printed.out
    assert "asl" not in printed.out


@pytest.mark.parametrize("killed", [False, True])
def test_a_report_of_none_that_was_evaluated_is_one_sentence(
    tmp_path: Path, killed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = never_evaluated(tmp_path, "bare", killed=killed)
    with pytest.raises(SystemExit):
        main(["report", str(run.path)])
    sentence = "bare: an imported checkpoint that has no scores yet; mlc evaluate "
    assert sentence in capsys.readouterr().err
    with pytest.raises(MlcError, match=sentence):
        make_report([run])
