"""Real photos and really pretrained weights: the figures that the README states."""

import json
from pathlib import Path

import numpy as np
import pytest
import shared

from mlc.cli import main
from mlc.store.reader import FeatureStore

pytestmark = pytest.mark.slow


def mlc(*arguments: object) -> None:
    main([str(each) for each in arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a store of each format, as a newcomer would make them."""
    photos = shared.need("coco-mini")
    weights = shared.need("weights/tf_efficientnet_lite0.safetensors")
    folder = tmp_path_factory.mktemp("real")
    asked = ("--backbone", "tf_efficientnet_lite0", "--weights", weights, "--root", photos)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mlc("extract", *asked)
        mlc("extract", *asked, "--format", "hdf5", "--out", "other/store.h5")
    return folder


@pytest.fixture
def here(work: Path, monkeypatch) -> Path:
    monkeypatch.chdir(work)
    return work


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def test_full_labels_reach_55_map(here) -> None:
    mlc("train-head", "--loss", "bce", "--out", "runs/bce")
    assert results(Path("runs/bce"))["test"]["mAP"] >= 55


@pytest.mark.parametrize("loss", ["an", "an_ls", "wan", "epr", "role"])
def test_single_positives_learn_far_more_than_the_class_prior(here, loss: str) -> None:
    mlc("train-head", "--loss", loss, "--out", f"runs/{loss}")
    prior = 100 * np.load(f"runs/{loss}/scores.npz")["true"].mean()
    assert prior == pytest.approx(3.65, abs=0.01)
    assert results(Path(f"runs/{loss}"))["test"]["mAP"] > 10 * prior


def test_both_formats_hold_the_same_features_and_train_the_same_head(here) -> None:
    path = next(Path("features").glob("*.zarr"))
    with FeatureStore(path) as first, FeatureStore(Path("other/store.h5")) as second:
        np.testing.assert_array_equal(first.image_id, second.image_id)
        np.testing.assert_array_equal(first.pooled(), second.pooled())
    mlc("train-head", "--features", "other/store.h5", "--out", "other/bce")
    mlc("train-head", "--out", "runs/bce")
    one, other = (np.load(f"{run}/scores.npz")["logits"] for run in ("runs/bce", "other/bce"))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_images_give_the_map_of_the_store(here) -> None:
    root = shared.need("coco-mini")
    mlc("train-head", "--out", "runs/bce")
    mlc("evaluate", "runs/bce", "--data", "coco", "--root", root, "--json", "out.json")
    live = json.loads(Path("out.json").read_text())
    assert live["mAP"] == pytest.approx(results(Path("runs/bce"))["test"]["mAP"], abs=0.01)
