"""VOC 2012: labels, order and splits as in the authors' script, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from mlc.configs.errors import MlcError
from mlc.datasets.voc import CLASSES, read_voc

# Flags by image, in the order of the lists, which is not the sorted one; -1 is not written.
FLAGS = {
    "train": {
        "2009_000002": {"person": 1, "dog": 1},
        "2008_000008": {"horse": 1, "person": 0},
        "2008_000007": {"aeroplane": 1, "tvmonitor": 1},
        "2010_000001": {"cat": 0},
    },
    "val": {"2008_000003": {"train": 1}, "2007_000123": {"boat": 1, "bird": 0}},
}


def write_voc(folder: Path, flags: dict[str, dict[str, dict[str, int]]] | None = None) -> Path:
    """Write VOC's lists and an empty folder of photos."""
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (folder / "JPEGImages").mkdir()
    for part, images in (flags or FLAGS).items():
        for name in CLASSES:
            lines = [f"{each} {values.get(name, -1):2d}\n" for each, values in images.items()]
            (lists / f"{name}_{part}.txt").write_text("".join(lines))
    return folder


def positives(table) -> dict[str, set[str]]:
    return {
        str(image_id): {table.classes[column] for column in np.flatnonzero(row)}
        for image_id, row in zip(table.image_id, table.true, strict=True)
    }


def test_positive_is_flag_1_and_rows_are_sorted_within_train_and_val(tmp_path: Path) -> None:
    images = read_voc(write_voc(tmp_path))
    table = images.labels
    assert positives(table) == {
        "2008_000007": {"aeroplane", "tvmonitor"},
        "2008_000008": {"horse"},
        "2009_000002": {"dog", "person"},
        "2007_000123": {"boat"},
        "2008_000003": {"train"},
    }
    assert list(positives(table)) == table.image_id.tolist()
    assert table.split.tolist() == ["train"] * 3 + ["test"] * 2
    assert table.file[0] == "JPEGImages/2008_000007.jpg"
    np.testing.assert_array_equal(table.observed, np.where(table.true, 1, -1))
    assert (table.dataset, table.expected_positives) == ("voc", 1.5)


def test_the_classes_are_vocs_twenty_in_the_order_of_the_alphabet() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 20
    assert list(CLASSES) == sorted(CLASSES)
    assert {"diningtable", "pottedplant", "tvmonitor", "sofa"} < set(CLASSES)


def test_an_image_without_a_positive_is_listed_and_labelled_only_if_asked(tmp_path: Path) -> None:
    images = read_voc(write_voc(tmp_path))
    assert images.image_id.tolist() == [
        *("2008_000007", "2008_000008", "2009_000002", "2010_000001"),
        *("2007_000123", "2008_000003"),
    ]
    assert "2010_000001" not in images.labels.image_id
    kept = read_voc(tmp_path, keep_unlabelled=True).labels
    np.testing.assert_array_equal(kept.image_id, images.image_id)
    assert positives(kept)["2010_000001"] == set()


def test_rows_are_sorted_by_file_name_not_by_id(tmp_path: Path) -> None:
    """The authors sort "a.jpg" and "a-b.jpg": a dot comes after a minus."""
    train = {"a": {"cat": 1}, "a-b": {"cat": 1}}
    table = read_voc(write_voc(tmp_path, {"train": train, "val": {"c": {"dog": 1}}})).labels
    assert table.image_id.tolist() == ["a-b", "a", "c"]


@pytest.mark.parametrize("place", [".", "VOC2012", "VOCdevkit/VOC2012"])
def test_the_folder_is_found_from_above(tmp_path: Path, place: str) -> None:
    folder = write_voc(tmp_path / "voc" / place)
    images = read_voc(tmp_path / "voc")
    assert images.root == folder
    (folder / "JPEGImages" / "2007_000123.jpg").touch()
    images.check_files()


def test_a_folder_without_voc_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    wanted = (
        r"voc: no ImageSets/Main there, nor in VOC2012 or VOCdevkit/VOC2012 below it; "
        r"download VOCtrainval_11-May-2012.tar .* --root"
    )
    with pytest.raises(MlcError, match=wanted):
        read_voc(tmp_path / "voc")


def test_missing_lists_and_photos_are_named(tmp_path: Path) -> None:
    main = write_voc(tmp_path) / "ImageSets" / "Main"
    (main / "cat_val.txt").unlink()
    with pytest.raises(MlcError, match=r": no ImageSets/Main/cat_val.txt there; download"):
        read_voc(tmp_path)
    for path in main.glob("*_train.txt"):
        path.unlink()
    (tmp_path / "JPEGImages").rmdir()
    with pytest.raises(MlcError, match=r": no JPEGImages, .*aeroplane_train.txt, .* and 19 more"):
        read_voc(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("2008_000007 2\n", r"cat_train.txt:1: expected an image and 1, 0 or -1, got .*000007 2'"),
        ("\n2008_000007\n", r"cat_train.txt:2: expected an image and 1, 0 or -1, got"),
        ("2008_000007 1 1\n", r"cat_train.txt:1: expected an image"),
        ("x 1\nx -1\n", r"cat_train.txt:2: image 'x' is there twice"),
        ("\n", r"cat_train.txt: lists no images"),
        ("x 1\n", r"cat_train.txt: lists other images than aeroplane_train.txt, '2008_000007' is"),
    ],
)
def test_a_broken_list_is_told_by_its_line(tmp_path: Path, content: str, sentence: str) -> None:
    (write_voc(tmp_path) / "ImageSets" / "Main" / "cat_train.txt").write_text(content)
    with pytest.raises(MlcError, match=sentence):
        read_voc(tmp_path)


def test_an_image_in_both_parts_is_refused(tmp_path: Path) -> None:
    write_voc(tmp_path, {part: {"2008_000007": {"cat": 1}} for part in ("train", "val")})
    with pytest.raises(MlcError, match=r"image '2008_000007' is there twice, in train and val"):
        read_voc(tmp_path)
