"""Evaluation: what is wrong with flags, images and labels is said before a model is loaded."""

from pathlib import Path

import made_runs
import pictures
import pytest

from mlc.cli import main
from mlc.configs.errors import MlcError
from mlc.models.evaluate import evaluate_checkpoint, evaluate_run


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"features": Path("a.zarr")}, "--features"),
        ({"labels_file": Path("a.npz")}, "--labels-file"),
        ({"eval_views": "mean"}, "--eval-views"),
        ({"check": False}, "--no-check"),
    ],
)
def test_what_is_for_stores_is_refused_beside_images(
    tmp_path: Path, given: dict, flag: str
) -> None:
    run = made_runs.write(tmp_path, "run")
    with pytest.raises(MlcError, match=rf"^evaluate: got --data, which reads images, and {flag};"):
        evaluate_run(run, {"data": "coco"} | given)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing load that takes minutes of a large model."""

    def load(*_: object, **__: object) -> None:
        pytest.fail("a model is loaded")

    monkeypatch.setattr("mlc.models.evaluate.load_whole", load)
    monkeypatch.setattr("mlc.models.evaluate.import_checkpoint", load)
    monkeypatch.setattr("mlc.models.whole.load_whole", load)


@pytest.mark.usefixtures("no_model")
def test_images_that_are_not_there_are_seen_before_the_model(tmp_path: Path) -> None:
    run, flags = made_runs.write(tmp_path, "run"), {"data": str(tmp_path / "none.csv")}
    for evaluated in (
        lambda: evaluate_run(run, flags),
        lambda: evaluate_checkpoint(tmp_path / "checkpoint.pkl", flags),
        lambda: evaluate_checkpoint(tmp_path / "c.pkl", {"root": tmp_path / "none"}),
        lambda: evaluate_checkpoint(tmp_path / "c.pkl", flags | {"eval_views": "mean"}),
    ):
        with pytest.raises(MlcError, match=r"none|--eval-views"):
            evaluated()


@pytest.mark.usefixtures("no_model")
def test_other_classes_are_seen_before_the_model(tmp_path: Path) -> None:
    run = made_runs.write(tmp_path, "run")
    table = pictures.write_data(tmp_path / "photos", bad=False)
    with pytest.raises(MlcError, match="shares no class with"):
        evaluate_run(run, {"data": str(table)})


@pytest.mark.usefixtures("no_model")
def test_a_folder_where_the_metrics_are_to_go_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--checkpoint", "c.pkl", "--json", str(tmp_path)])
    assert f"error: --json: {tmp_path} is a folder; name a file" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--images", "none"), "none"),
        (("--images", "photos", "--classes", "class 0,zebra"), "unknown class 'zebra'"),
        (("--images", "photos", "--out", "photos/maps"), "is within photos, whose photos are"),
        (("--images", "photos", "--out", "photos/00.png"), "photos/00.png"),
        (("--images", "photos", "--data", "none.json"), "none.json"),
    ],
)
def test_pictures_that_cannot_be_drawn_are_refused_first(
    tmp_path: Path,
    flags: tuple[str, ...],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    made_runs.write(tmp_path, "run")
    pictures.write_data(tmp_path / "photos", bad=False)
    with pytest.raises(SystemExit):
        main(["attention", "run", *flags])
    assert sentence in capsys.readouterr().err
