"""Layers and views through the command line."""

import json
from pathlib import Path

import made_store
import pytest

from mlc.cli import main
from mlc.heads.run_folder import Run, read_run

SHORT = ("--epochs", "1", "--lr", "1e-2", "--device", "cpu")
VIEWS = ("--layer", "other", "--view-augment", "--eval-views", "mean", "--no-check")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made_store.write_views(tmp_path / "features")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def require_all(run: Run) -> None:
    config = run.config
    got = (config.layer, config.view_augment, config.eval_views, config.check)
    assert got == ("other", True, "mean", False)


def test_train_head_sweep_and_evaluate_take_them(here: Path) -> None:
    main(["train-head", *SHORT, *VIEWS, "--out", "runs/head"])
    main(["sweep", *SHORT, *VIEWS, "--losses", "bce,an", "--out", "swept"])
    runs = [read_run(path) for path in (here / "runs/head", *sorted((here / "swept").iterdir()))]
    assert len(runs) == 3
    for run in runs:
        require_all(run)
    maps = {}
    for name, asked in (("own", ()), ("first", ("--eval-views", "first", "--no-check"))):
        main(["evaluate", "runs/head", *asked, "--json", f"{name}.json"])
        maps[name] = json.loads((here / f"{name}.json").read_text())["mAP"]
    assert maps["own"] == pytest.approx(runs[0].results["test"]["mAP"], abs=1e-9)
    assert maps["first"] != maps["own"]


def test_without_them_the_first_layer_and_view_are_used(here: Path) -> None:
    main(["train-head", *SHORT, "--out", "runs/head"])
    config = read_run(here / "runs/head").config
    assert (config.layer, config.view_augment, config.eval_views) == (None, False, "first")
    assert config.check


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--eval-views", "men"), "eval_views: should be 'first' or 'mean', got 'men'"),
        (("--layer", "lat"), "views.zarr: has no layer 'lat', it has final, other; "),
    ],
)
@pytest.mark.parametrize("command", ["train-head", "sweep"])
def test_a_mistake_is_told_in_one_sentence(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, *arguments])
    assert exit_.value.code == 1
    assert sentence in capsys.readouterr().err
