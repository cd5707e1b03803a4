"""A run on a store: of its own layer, and in its own views unless others are asked for."""

import json
from pathlib import Path
from typing import Any

import made_store
import numpy as np
import pytest

from mlc.configs.errors import MlcError
from mlc.datasets.labels import LabelTable, save_labels
from mlc.datasets.source import DataConfig, read_images
from mlc.heads.config import TrainConfig
from mlc.heads.evaluate import evaluate_on_store, labels_of_run
from mlc.heads.fit import fit, prepare, read_inputs
from mlc.heads.inputs import LabelsConfig, read_features
from mlc.heads.metrics import mean_ap
from mlc.heads.run_folder import Run
from mlc.heads.train import probabilities


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_store.write_views(tmp_path_factory.mktemp("store"), 3)


def trained(store: Path, out: Path, **settings: Any) -> Run:
    config = TrainConfig(features=store, out=out, epochs=3, lr=1e-2, device="cpu", **settings)
    features, table = read_inputs(config)
    return fit(config, features, prepare(config, features, table))


def map_by_hand(run: Run, store: Path, views: int) -> float:
    """Return the test mAP of the mean logits of the first views."""
    features = read_features(store, run.config.layer, all_views=True)
    test = made_store.table_of().part("test")
    rows = [features.image_id.tolist().index(each) for each in test.image_id]
    state = {name: each.numpy() for name, each in run.head().state_dict().items()}
    logits = [view[rows] @ state["weight"].T + state["bias"] for view in features.views[:views]]
    return float(mean_ap(probabilities(np.mean(logits, axis=0)), test.true))


@pytest.mark.parametrize("layer", [None, "other"])
def test_a_run_is_scored_as_it_was_unless_other_views_are_asked_for(
    store: Path, tmp_path: Path, layer: str | None
) -> None:
    maps = {}
    for own, other, views in (("first", "mean", 1), ("mean", "first", 3)):
        run = trained(store, tmp_path / own, layer=layer, eval_views=own)
        as_it_was = evaluate_on_store(run, LabelsConfig())
        assert as_it_was["mAP"] == pytest.approx(run.results["test"]["mAP"], abs=1e-9)
        assert as_it_was["mAP"] == pytest.approx(map_by_hand(run, store, views), abs=1e-9)
        asked = evaluate_on_store(run, LabelsConfig(eval_views=other))
        assert asked["mAP"] == pytest.approx(map_by_hand(run, store, 4 - views), abs=1e-9)
        maps[own] = (as_it_was["mAP"], asked["mAP"])
        assert maps[own][0] != maps[own][1]


def test_other_labels_leave_a_run_its_views(store: Path, tmp_path: Path) -> None:
    run = trained(store, tmp_path / "run", eval_views="mean")
    path = tmp_path / "labels.npz"
    save_labels(made_store.table_of(), path)
    got = evaluate_on_store(run, LabelsConfig(labels_file=path))
    assert got["mAP"] == pytest.approx(run.results["test"]["mAP"], abs=1e-9)


@pytest.mark.parametrize(("asked", "checks"), [({}, True), ({"check": False}, False)])
def test_a_run_that_was_trained_without_checks_is_evaluated_with_them(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, bool],
    checks: bool,
) -> None:
    run, seen = trained(store, tmp_path / "run", check=False), []

    def spy(*arguments, **settings):
        seen.append(settings["check"])
        return read_features(*arguments, **settings)

    monkeypatch.setattr("mlc.heads.evaluate.read_features", spy)
    evaluate_on_store(run, LabelsConfig(**asked))
    assert seen == [checks]


def test_the_mean_over_one_view_is_refused(tmp_path: Path) -> None:
    run = trained(made_store.write(tmp_path), tmp_path / "run")
    with pytest.raises(MlcError, match=r"small.zarr: has one view of each image, 'original'; "):
        evaluate_on_store(run, LabelsConfig(eval_views="mean"))


def test_a_store_may_hold_more_than_a_head_reads(store: Path, tmp_path: Path) -> None:
    """write() has the first view of the first layer of write_views()."""
    run = trained(made_store.write(tmp_path), tmp_path / "run")
    got = evaluate_on_store(run, LabelsConfig(features=store))
    assert got["mAP"] == pytest.approx(run.results["test"]["mAP"], abs=1e-9)


def test_a_store_that_lacks_what_a_head_reads_is_refused(store: Path, tmp_path: Path) -> None:
    few = made_store.write_views(tmp_path, 2)
    run = trained(store, tmp_path / "run", layer="other", eval_views="mean")
    with pytest.raises(MlcError, match=r"views: \['original', 'flip'\], the run has"):
        evaluate_on_store(run, LabelsConfig(features=few))
    assert evaluate_on_store(run, LabelsConfig(features=few, eval_views="first"))
    with pytest.raises(MlcError, match="has no layer 'other'"):
        evaluate_on_store(run, LabelsConfig(features=made_store.write(tmp_path)))


# --- classes of a table and of a run -------------------------------------------------------------


def run_of(*classes: str) -> Run:
    return Run(Path("runs/made"), TrainConfig(), {"classes": list(classes)})


def csv_table(folder: Path) -> LabelTable:
    path = folder / "photos.csv"
    path.write_text("file,labels\na.jpg,cat\nb.jpg,dog\n")
    for name in ("a.jpg", "b.jpg"):
        (folder / name).touch()
    return read_images(DataConfig(data=str(path))).labels


def json_table(folder: Path) -> LabelTable:
    categories = [{"id": index, "name": name} for index, name in enumerate(("cat", "dog", "cow"))]
    images = [{"id": index, "file_name": f"{index}.jpg"} for index in range(2)]
    annotations = [{"id": i, "image_id": i, "category_id": i} for i in range(2)]
    for image in images:
        (folder / str(image["file_name"])).touch()
    path = folder / "photos.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return read_images(DataConfig(data=str(path))).labels


def test_a_class_that_no_row_of_a_csv_lists_has_no_positive(tmp_path: Path) -> None:
    table = labels_of_run(run_of("cow", "dog"), csv_table(tmp_path), "all")
    assert table.targets().tolist() == [[False, False], [False, True]]


def test_a_csv_of_other_classes_is_refused(tmp_path: Path) -> None:
    names = [f"bird {index}" for index in range(7)]
    with pytest.raises(MlcError) as error:
        labels_of_run(run_of(*names), csv_table(tmp_path), "all")
    assert str(error.value) == (
        "csv-photos: shares no class with runs/made, got cat, dog where the run has bird 0, "
        "bird 1, bird 2, bird 3, bird 4, ...; name them alike"
    )


def test_a_json_lists_all_its_categories(tmp_path: Path) -> None:
    table = json_table(tmp_path)
    assert labels_of_run(run_of("cow", "cat"), table, "all").targets().any(axis=0).tolist() == [
        False,
        True,
    ]
    with pytest.raises(MlcError) as error:
        labels_of_run(run_of("cat", "Cow"), table, "all")
    assert str(error.value) == (
        "json-photos: 1 of the 2 classes of runs/made are no categories of it (Cow), got cat, "
        "dog, cow; name them alike"
    )
