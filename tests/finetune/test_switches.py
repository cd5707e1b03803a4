"""Switches of fine-tuning that change how it runs, and not what it gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_data import SETTINGS, write_photos

from mlc.cli import main
from mlc.finetune.config import FinetuneConfig
from mlc.finetune.run import Finetuned, finetune
from mlc.report.groups import group_over_seeds
from mlc.report.summary import print_waited
from mlc.report.table import find_runs, make_report

OF_BACKBONE = ("backbone", "random_weights", "size_px", "device")
BACKBONE = {name: SETTINGS[name] for name in OF_BACKBONE}
GIVEN = {"lr": 1e-3, "epochs": 2, "batch_size": 8, "labels": "full", "frozen_batch_norm": True}


def tuned(photos: Path, out: Path, **settings: Any) -> Finetuned:
    done = finetune(FinetuneConfig(data=str(photos), out=out, **(BACKBONE | GIVEN | settings)))
    assert done is not None
    return done


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own parts
def test_a_compiled_model_trains_alike(photos: Path, tmp_path: Path) -> None:
    eager, compiled = (
        tuned(photos, tmp_path / str(each), compile=each).run for each in (False, True)
    )
    first, second = (run.scores()["logits"] for run in (eager, compiled))
    assert np.allclose(first, second, atol=1e-3)


def test_event_files_have_the_lines(photos: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tuned(photos, tmp_path / "run", tensorboard=True).run
    read = events.EventAccumulator(str(tmp_path / "run-tensorboard"))
    read.Reload()
    found = read.Scalars("val_mAP")
    assert [each.step for each in found] == [1, 2]
    best = max(each.value for each in found)
    assert best == pytest.approx(run.results["selection_mAP"], rel=1e-6)


def test_waiting_is_told_when_it_is_much(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tuned(photos, tmp_path / "run", epochs=1)
    assert 0 <= done.waited <= 1
    print_waited(0.05, done.run)
    assert capsys.readouterr().err == ""
    print_waited(0.5, done.run)
    assert "50% of the time was spent waiting for images" in capsys.readouterr().err


def test_a_report_groups_seeds_and_tells_settings_apart(photos: Path, tmp_path: Path) -> None:
    runs = [
        tuned(photos, tmp_path / name, epochs=1, **more).run
        for name, more in {
            "a": {"seed": 0},
            "b": {"seed": 1},
            "still": {"seed": 0, "freeze": ("conv1",)},
        }.items()
    ]
    groups = group_over_seeds(runs)
    assert [[run.path.name for run in group] for group in groups] == [["a", "b"], ["still"]]
    rows = make_report(runs, every_setting=True, resamples=100).rows
    assert sorted((row.seeds, row.name["freeze"]) for row in rows) == [(1, '["conv1"]'), (2, "[]")]


def test_a_grid_is_trained_once(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["finetune", "--end-to-end", "--data", str(photos), "--backbone", "test_resnet"]
    flags += ["--random-weights", "--size", "32", "--epochs", "1", "--out", str(tmp_path / "grid")]
    flags += ["--lr", "1e-3,1e-4", "--batch-size", "8,16"]
    main(flags)
    assert len(find_runs([tmp_path / "grid"])) == 4
    table = capsys.readouterr().out
    assert [table.count(f"{lr}  ") for lr in ("0.001", "0.0001")] == [2, 2]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("grid/*/results.json")}
    main(flags)
    assert {path: path.stat().st_mtime_ns for path in times} == times
