"""Which data set a config means, where its images are looked for, and what is said when not."""

from pathlib import Path

import numpy as np
import pytest

from mlc.configs.errors import MlcError
from mlc.datasets import source
from mlc.datasets.images import find_images
from mlc.datasets.labels import load_labels
from mlc.datasets.prepare import PrepareConfig, prepare
from mlc.datasets.source import DATASETS, DataConfig, default_root, read_images


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, bool]]:
    """Record with what arguments COCO is read."""
    calls: list[tuple[Path, bool]] = []
    monkeypatch.setitem(source.DATASETS, "coco", lambda *arguments: calls.append(arguments))
    monkeypatch.delenv("MLC_DATA", raising=False)
    return calls


def csv_in(folder: Path, name: str = "photos.csv") -> Path:
    path = folder / name
    path.write_text(
        "file,labels\n" + "".join(f"{each}.jpg,{'ab'[each % 2]}\n" for each in range(9))
    )
    return path


def test_the_default_is_coco_below_data(asked: list) -> None:
    read_images(DataConfig())
    assert asked == [(Path("data/coco"), False)]


def test_the_environment_moves_the_default(asked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLC_DATA", "/disk")
    read_images(DataConfig(keep_unlabelled=True))
    assert asked == [(Path("/disk/coco"), True)]


def test_a_root_that_is_given_wins(asked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLC_DATA", "/disk")
    read_images(DataConfig(root=Path("here")))
    assert asked == [(Path("here"), False)]


@pytest.mark.parametrize("name", ["photos.csv", "photos.CSV"])
def test_a_csv_is_relative_to_its_own_folder_or_the_root(tmp_path: Path, name: str) -> None:
    path = csv_in(tmp_path, name)
    assert read_images(DataConfig(data=str(path))).root == tmp_path
    assert read_images(DataConfig(data=str(path), root=Path("other"))).root == Path("other")


def test_a_csv_is_told_what_an_unlisted_label_is(tmp_path: Path) -> None:
    path = csv_in(tmp_path)
    partial = read_images(DataConfig(data=str(path), unlisted="unknown")).labels
    assert set(np.unique(partial.observed)) == {0, 1}


@pytest.mark.parametrize("name", ["cocoo", "photos", "photos.txt"])
def test_an_unknown_data_set_is_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(MlcError, match=rf"unknown data set '{name}'; .*coco.* path of a .csv"):
        read_images(DataConfig(data=name))


WIDTHS = {"coco-formatted": 80, "cub": 312, "nuswide": 81, "voc-formatted": 20}


@pytest.mark.parametrize("written", WIDTHS)
@pytest.mark.parametrize("asked", WIDTHS)
def test_a_formatted_data_set_is_not_read_as_another(
    tmp_path: Path, written: str, asked: str
) -> None:
    for part, number in (("train", 1), ("val", 2)):
        image = f"COCO_{part}2014_{number:012}.jpg"
        np.save(tmp_path / f"formatted_{part}_images.npy", np.array([image]))
        np.save(tmp_path / f"formatted_{part}_labels.npy", np.ones((1, WIDTHS[written])))
    config = DataConfig(data=asked, root=tmp_path)
    if asked == written:
        table = read_images(config).labels
        assert table.dataset == asked.removesuffix("-formatted")
        assert (table.image_id[0] == "1") == (asked == "coco-formatted")
    else:
        with pytest.raises(MlcError, match=rf"expected {WIDTHS[asked]} classes, got"):
            read_images(config)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("coco", r"new: no train2014"),
        ("coco-formatted", r"new: no formatted_train_labels.npy"),
        ("cub", r"new: no formatted_train_labels.npy"),
        ("digits", None),
        ("nuswide", r"new: no formatted_train_labels.npy"),
        ("voc", r"new: no ImageSets/Main"),
        ("voc-formatted", r"new: no formatted_train_labels.npy"),
    ],
)
def test_every_data_set_reads_a_root_and_the_switch(
    name: str, sentence: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlc.datasets.digits.IMAGES", {"train": 2, "val": 1, "test": 1})
    asked = DataConfig(data=name, root=tmp_path / "new", keep_unlabelled=True)
    if sentence is None:
        assert read_images(asked).labels.dataset == name
    else:
        with pytest.raises(MlcError, match=sentence):
            read_images(asked)


def test_every_data_set_is_in_the_test_above() -> None:
    (mark,) = test_every_data_set_reads_a_root_and_the_switch.pytestmark
    assert [name for name, _ in mark.args[1]] == list(DATASETS)


@pytest.mark.parametrize("name", DATASETS)
def test_a_default_root_is_named_like_the_data_set(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLC_DATA", raising=False)
    assert default_root(name) == Path("data") / name
    monkeypatch.setenv("MLC_DATA", "/disk")
    assert default_root(name) == Path("/disk") / name


def test_a_wrong_root_is_told_by_its_first_image(tmp_path: Path) -> None:
    images = read_images(DataConfig(data=str(csv_in(tmp_path))))
    with pytest.raises(MlcError, match=r"not one of the 9 listed .* '0.jpg'; .* --root"):
        images.check_files()
    (tmp_path / "8.jpg").touch()
    images.check_files()


def test_images_are_found_below_a_folder_by_their_suffix(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("b.JPG", "a/c.png", "notes.txt", "a/d.jpeg.bak"):
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / "a/c.png", tmp_path / "b.JPG"]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"no images there; looked for .bmp"):
        find_images(tmp_path)
    with pytest.raises(MlcError, match=r"none: no such folder"):
        find_images(tmp_path / "none")


def test_prepare_applies_the_protocol_and_writes_the_table(tmp_path: Path) -> None:
    out = tmp_path / "labels.npz"
    data = str(csv_in(tmp_path))
    images, table = prepare(PrepareConfig(data=data, labels="single-positive", out=out))
    assert (images.labels.split == "").all()
    assert {name: len(table.part(name)) for name in ("train", "val", "test")} == {
        "train": 6,
        "val": 1,
        "test": 2,
    }
    assert ((table.observed == 1).sum(axis=1) == 1).all()
    stored = load_labels(out)
    np.testing.assert_array_equal(stored.observed, table.observed)
    np.testing.assert_array_equal(stored.split, table.split)


def test_prepare_writes_nothing_unasked(tmp_path: Path) -> None:
    prepare(PrepareConfig(data=str(csv_in(tmp_path))))
    assert [path.name for path in tmp_path.iterdir()] == ["photos.csv"]


@pytest.mark.parametrize("seed", [-1, 2**32])
@pytest.mark.parametrize("field", ["split_seed", "corruption_seed"])
def test_prepare_refuses_a_seed_that_numpy_does_not_take(
    tmp_path: Path, field: str, seed: int
) -> None:
    asked = {"data": str(csv_in(tmp_path)), "labels": "single-positive", field: seed}
    with pytest.raises(MlcError, match=rf"{field}: should be from 0 to 2\*\*32 - 1, got {seed}"):
        prepare(PrepareConfig(**asked))
