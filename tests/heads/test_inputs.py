"""Inputs: labels meet features by image id, and nothing is guessed where two sources disagree."""

import math
from dataclasses import replace
from pathlib import Path

import made_store
import numpy as np
import pytest
import torch

from mlc.configs.errors import MlcError
from mlc.datasets.labels import LabelTable, full_labels, save_labels
from mlc.datasets.protocol import apply_protocol
from mlc.heads.inputs import (
    Features,
    LabelsConfig,
    join,
    mean_of_views,
    read_features,
    read_labels,
    relabel,
)
from mlc.store.reader import FeatureStore, labels_path
from mlc.store.schema import SUFFIXES

CPU = torch.device("cpu")
IDS = [str(each) for each in range(12)]
SPLIT = ["train"] * 6 + ["val"] * 3 + ["test"] * 3


def feature_of(image_id: str) -> list[float]:
    """Return what makes an image recognisable by its features."""
    return [float(image_id), float(image_id) ** 2]


@pytest.fixture
def table() -> LabelTable:
    true = np.random.default_rng(0).random((12, 3)) < 0.5
    ids = np.array(IDS)
    classes = ("cat", "dog", "owl")
    return LabelTable(ids, ids, classes, full_labels(true), true, np.array(SPLIT), "coco", 1.5)


def features_of(image_ids: list[str]) -> Features:
    values = np.array([feature_of(each) for each in image_ids], dtype=np.float32)
    return Features(Path("a.zarr"), np.array(image_ids), values, {}, {}, "photos")


def assert_joined(split, table: LabelTable) -> None:
    """Each row has the features and the labels of its own image."""
    wanted = [feature_of(each) for each in split.image_id]
    np.testing.assert_array_equal(split.features.numpy(), wanted)
    rows = [IDS.index(each) for each in split.image_id]
    np.testing.assert_array_equal(split.true, table.targets()[rows])
    np.testing.assert_array_equal(split.observed.numpy(), table.observed[rows])


def test_rows_meet_by_image_id_whatever_the_order_of_the_store(table: LabelTable) -> None:
    shuffled = np.random.default_rng(1).permutation(IDS).tolist()
    assert shuffled != IDS
    splits = join(features_of(shuffled), table, CPU)
    for name, image_ids in (("train", IDS[:6]), ("val", IDS[6:9]), ("test", IDS[9:])):
        assert splits[name].image_id.tolist() == image_ids
        assert_joined(splits[name], table)


def test_images_that_lack_labels_or_features_are_left_out(table: LabelTable) -> None:
    stored = ["99", "8", "0", "4", "11", "10", "7", "98"]
    splits = join(features_of(stored), table, CPU)
    assert {name: split.image_id.tolist() for name, split in splits.items()} == {
        "train": ["0", "4"],
        "val": ["7", "8"],
        "test": ["10", "11"],
    }
    for split in splits.values():
        assert_joined(split, table)


def test_tensors_have_the_types_that_training_wants(table: LabelTable) -> None:
    train = join(features_of(IDS), table, CPU)["train"]
    assert (train.features.dtype, train.observed.dtype) == (torch.float32, torch.int8)
    assert train.true.dtype == np.bool_


def test_unknown_truth_is_the_observed_positives(table: LabelTable) -> None:
    splits = join(features_of(IDS), replace(table, true=None), CPU)
    np.testing.assert_array_equal(splits["val"].true, table.observed[6:9] == 1)


def test_a_split_without_any_features_is_refused(table: LabelTable) -> None:
    without_val = features_of(IDS[:6] + IDS[9:])
    with pytest.raises(MlcError, match=r"a.zarr: .* none of the 3 images of split 'val'; .*--feat"):
        join(without_val, table, CPU)
    assert set(join(without_val, table, CPU, ("test",))) == {"test"}


def write_store(path: Path, image_ids: list[str], bad: set[str]) -> Path:
    values = np.array([feature_of(each) for each in image_ids], dtype=np.float32)
    return made_store.write_store(path, image_ids, values, bad)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bad_images_of_a_store_are_left_out(tmp_path: Path, table: LabelTable, suffix: str) -> None:
    image_ids = IDS[::-1]
    path = write_store(tmp_path / f"a{suffix}", image_ids, bad={"3", "10"})
    features = read_features(path)
    assert features.image_id.tolist() == [each for each in image_ids if each not in {"3", "10"}]
    splits = join(features, table, CPU)
    assert splits["train"].image_id.tolist() == ["0", "1", "2", "4", "5"]
    assert splits["test"].image_id.tolist() == ["9", "11"]
    for split in splits.values():
        assert_joined(split, table)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf]])
def test_features_that_are_no_numbers_are_told_by_their_images(
    tmp_path: Path, suffix: str, values: list[float]
) -> None:
    path = write_store(tmp_path / f"a{suffix}", IDS, bad={"3"})
    made_store.spoil(path, "9", values)
    made_store.spoil(path, "4", values)
    with pytest.raises(
        MlcError,
        match=rf"^{path}: features of 2 of 11 images are NaN or infinite \(image id 4, 9\); ",
    ):
        read_features(path)


def test_infinities_that_cancel_are_told_without_a_warning(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", IDS, bad=set())
    made_store.spoil(path, "9", [math.inf, -math.inf])
    with pytest.raises(MlcError, match=r"features of 1 of 12 images .* \(image id 9\)"):
        read_features(path)


def test_large_features_are_numbers(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", IDS, bad=set())
    made_store.spoil(path, "9", [3e38, 3e38])
    assert read_features(path).values.max() == np.float32(3e38)


def test_of_many_images_without_numbers_some_are_named(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", IDS, bad=set())
    for image_id in IDS[:6]:
        made_store.spoil(path, image_id, [math.nan])
    with pytest.raises(MlcError, match=r"of 6 of 12 images .* \(image id 0, 1, 2, 3, 4, \.\.\.\);"):
        read_features(path)


def test_features_of_a_bad_image_do_not_matter(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", IDS, bad={"9"})
    made_store.spoil(path, "9", [math.nan])
    assert "9" not in read_features(path).image_id


def views_of(image_ids: list[str], views: int = 3) -> np.ndarray:
    """Return (N, V, 2) features that tell the image and the view."""
    own = np.array([feature_of(each) for each in image_ids], dtype=np.float32)
    return own[:, None] + 1000 * np.arange(views, dtype=np.float32)[:, None]


def assert_joined_views(split, table: LabelTable) -> None:
    """Each row of each view has the features of its own image in that view."""
    assert_joined(split, table)
    wanted = views_of(split.image_id.tolist()).swapaxes(0, 1)
    np.testing.assert_array_equal(split.views.numpy(), wanted)
    assert split.views.is_contiguous()
    assert split.features.data_ptr() == split.views.data_ptr()  # no copy


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_views_of_the_good_images_are_read_and_joined_where_asked_for(
    tmp_path: Path, table: LabelTable, suffix: str
) -> None:
    image_ids = np.random.default_rng(3).permutation(IDS).tolist()
    layers = {made_store.LAYER: views_of(image_ids)}
    path = made_store.write_layers(tmp_path / f"a{suffix}", image_ids, layers, bad={"3", "10"})
    features = read_features(path, all_views=True)
    good = [each for each in image_ids if each not in {"3", "10"}]
    assert features.image_id.tolist() == good
    np.testing.assert_array_equal(features.views, views_of(good).swapaxes(0, 1))
    np.testing.assert_array_equal(features.values, views_of(good)[:, 0])
    splits = join(features, table, CPU, in_all_views={"train", "test"})
    assert splits["train"].image_id.tolist() == ["0", "1", "2", "4", "5"]
    assert_joined_views(splits["train"], table)
    assert_joined_views(splits["test"], table)
    assert splits["val"].views is None
    assert_joined(splits["val"], table)


def test_of_a_store_of_views_the_first_alone_is_read_by_default(tmp_path: Path) -> None:
    path = made_store.write_layers(tmp_path / "a.zarr", IDS, {made_store.LAYER: views_of(IDS)})
    features = read_features(path)
    assert features.views is None
    np.testing.assert_array_equal(features.values, views_of(IDS)[:, 0])


def test_views_of_a_store_of_one_are_refused_and_how_to_get_them_is_told(tmp_path: Path) -> None:
    path = write_store(tmp_path / "a.zarr", IDS, bad=set())
    with pytest.raises(
        MlcError,
        match=rf"^{path}: has one view of each image, 'original'; .* mlc extract --views orig,flip",
    ):
        read_features(path, all_views=True)


@pytest.mark.parametrize("all_views", [False, True])
def test_a_layer_is_the_first_or_the_one_that_is_named(tmp_path: Path, all_views: bool) -> None:
    layers = {"early": views_of(IDS), "late": 2 * views_of(IDS)[..., :1]}
    path = made_store.write_layers(tmp_path / "a.zarr", IDS, layers)
    for layer, name in ((None, "early"), ("early", "early"), ("late", "late")):
        features = read_features(path, layer, all_views=all_views)
        np.testing.assert_array_equal(features.values, layers[name][:, 0])
        if all_views:
            np.testing.assert_array_equal(features.views, layers[name].swapaxes(0, 1))
    with pytest.raises(MlcError, match=rf"^{path}: has no layer 'lat', it has early, late; .*--la"):
        read_features(path, "lat", all_views=all_views)


def test_features_that_are_no_numbers_are_told_in_any_view_that_is_read(tmp_path: Path) -> None:
    path = made_store.write_layers(tmp_path / "a.zarr", IDS, {made_store.LAYER: views_of(IDS)})
    made_store.spoil(path, "7", [math.nan], view=2)
    assert "7" in read_features(path).image_id
    with pytest.raises(MlcError, match=r"features of 1 of 12 images are NaN .* \(image id 7\)"):
        read_features(path, all_views=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_features_that_a_disk_changed_are_refused_unless_checks_are_off(
    tmp_path: Path, suffix: str
) -> None:
    layers = {made_store.LAYER: views_of(IDS)}
    path = made_store.write_layers(tmp_path / f"a{suffix}", IDS, layers)
    made_store.spoil(path, "7", [5.0], view=1, noticed=True)
    assert read_features(path).image_id.tolist() == IDS  # the first view is whole
    with pytest.raises(MlcError, match=rf"^{path}: "):
        read_features(path, all_views=True)
    views = read_features(path, all_views=True, check=False).views
    assert views[1, 7, 0] == 5


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("all_views", [True, False])
def test_every_reading_checks_or_none_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_views: bool, check: bool
) -> None:
    path = made_store.write_layers(tmp_path / "a.zarr", IDS, {made_store.LAYER: views_of(IDS)})
    asked, pooled = [], FeatureStore.pooled

    def spy(*arguments, check):
        asked.append(check)
        return pooled(*arguments, check=check)

    monkeypatch.setattr(FeatureStore, "pooled", spy)
    read_features(path, all_views=all_views, check=check)
    assert asked == [check] * (3 if all_views else 1)


def test_the_mean_of_views_is_that_of_their_logits_and_of_one_it_is_itself() -> None:
    one, other = torch.randn(2, 5, 3)
    assert mean_of_views([one]) is one
    assert torch.equal(mean_of_views([one, other]), (one + other) / 2)


def test_other_labels_of_the_same_images_share_their_features(table: LabelTable) -> None:
    stored = np.random.default_rng(1).permutation(IDS[1:]).tolist()  # one lacks features
    table = replace(table, true=table.true | (np.arange(3) == 0))
    splits = join(features_of(stored), table, CPU)
    before = {name: split.observed.clone() for name, split in splits.items()}
    shown = apply_protocol(table, "one-positive-one-negative", corruption_seed=5)
    again = relabel(splits, shown)
    assert set(again) == set(splits)
    for name, split in again.items():
        assert split.features is splits[name].features
        np.testing.assert_array_equal(split.image_id, splits[name].image_id)
        assert_joined(split, shown)
        assert not torch.equal(split.observed, before[name])
        assert torch.equal(splits[name].observed, before[name])


def test_relabelled_is_joined_anew(table: LabelTable) -> None:
    """Rows are found by image id, whatever the order of the table."""
    splits = join(features_of(IDS), table, CPU)
    shuffled = table.rows(np.random.default_rng(2).permutation(12))
    unknown = replace(shuffled, observed=np.zeros_like(shuffled.observed), true=None)
    for name, split in relabel(splits, shuffled).items():
        assert_joined(split, table)
        assert not relabel(splits, unknown)[name].true.any()


@pytest.fixture
def store(tmp_path: Path, table: LabelTable) -> Path:
    """Return the path of a store with only its labels beside it."""
    path = tmp_path / "a.zarr"
    save_labels(table, labels_path(path))
    return path


def csv_of(folder: Path) -> Path:
    path = folder / "photos.csv"
    path.write_text("file,labels\n0,ant\n1,bee\n")
    return path


def test_labels_are_those_beside_the_store(store: Path, table: LabelTable) -> None:
    labels = read_labels(LabelsConfig(), store)
    assert labels.image_id.tolist() == table.image_id.tolist()
    assert (labels.classes, labels.expected_positives) == (table.classes, 1.5)


def test_a_labels_file_overrides_them(store: Path, table: LabelTable, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    save_labels(replace(table, dataset="csv-other"), other)
    assert read_labels(LabelsConfig(labels_file=other), store).dataset == "csv-other"


def test_a_data_set_overrides_them(store: Path, tmp_path: Path) -> None:
    labels = read_labels(LabelsConfig(data=str(csv_of(tmp_path))), store)
    assert labels.classes == ("ant", "bee")


def test_two_sources_are_refused(store: Path, tmp_path: Path) -> None:
    both = LabelsConfig(data=str(csv_of(tmp_path)), labels_file=labels_path(store))
    with pytest.raises(MlcError, match=r"got both --data and --labels-file; pass one"):
        read_labels(both, store)


def test_a_root_alone_is_refused(store: Path) -> None:
    with pytest.raises(MlcError, match=r"--root without --data"):
        read_labels(LabelsConfig(root=Path("here")), store)


@pytest.mark.parametrize("given", [{"keep_unlabelled": True}, {"unlisted": "unknown"}])
def test_a_switch_of_a_data_set_is_not_silently_ignored_without_one(
    store: Path, given: dict
) -> None:
    with pytest.raises(MlcError, match="--data"):
        read_labels(LabelsConfig(**given), store)


def test_a_store_without_labels_beside_it_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"b.zarr.labels.npz: no label table there; mlc data"):
        read_labels(LabelsConfig(), tmp_path / "b.zarr")


def test_classes_are_a_subset_in_the_order_asked_for(store: Path, table: LabelTable) -> None:
    labels = read_labels(LabelsConfig(classes=("owl", "cat")), store)
    assert labels.classes == ("owl", "cat")
    np.testing.assert_array_equal(labels.true, table.true[:, [2, 0]])


def test_an_unknown_class_is_refused(store: Path) -> None:
    with pytest.raises(MlcError, match=r"unknown class 'dgo'; did you mean 'dog'\?"):
        read_labels(LabelsConfig(classes=("dgo",)), store)
