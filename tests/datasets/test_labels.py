"""LabelTable: rows, classes, and the file that holds one."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from mlc.configs.errors import MlcError
from mlc.datasets.labels import (
    LabelTable,
    class_columns,
    full_labels,
    load_labels,
    save_labels,
    select_classes,
)

TRUE = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=bool)


@pytest.fixture
def table() -> LabelTable:
    return LabelTable(
        image_id=np.array(["10", "9", "é", "7"]),
        file=np.array(["a/10.jpg", "a/9.jpg", "b/é.jpg", "7.jpg"]),
        classes=("cat", "dog", "traffic light"),
        observed=np.array([[1, 0, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1]], dtype=np.int8),
        true=TRUE,
        split=np.array(["train", "test", "train", ""]),
        dataset="csv-photos",
        expected_positives=1.5,
    )


def assert_same(one: LabelTable, other: LabelTable) -> None:
    for field in fields(LabelTable):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_rows_are_chosen_by_mask_or_index_in_every_column(table: LabelTable) -> None:
    mask = np.array([False, True, False, True])
    assert_same(table.rows(mask), table.rows(np.array([1, 3])))
    reverse = table.rows(np.array([3, 1]))
    assert reverse.image_id.tolist() == ["7", "9"]
    assert reverse.file.tolist() == ["7.jpg", "a/9.jpg"]
    assert reverse.split.tolist() == ["", "test"]
    np.testing.assert_array_equal(reverse.true, TRUE[[3, 1]])
    np.testing.assert_array_equal(reverse.observed, table.observed[[3, 1]])
    assert (reverse.classes, reverse.expected_positives) == (table.classes, 1.5)


def test_a_part_is_the_rows_of_a_split_in_their_order(table: LabelTable) -> None:
    assert table.part("train").image_id.tolist() == ["10", "é"]
    assert len(table.part("val")) == 0


def test_targets_are_the_truth_or_else_the_observed_positives(table: LabelTable) -> None:
    np.testing.assert_array_equal(table.targets(), TRUE)
    partial = replace(table, true=None)
    np.testing.assert_array_equal(partial.targets(), table.observed == 1)
    assert partial.rows(np.array([0])).true is None


def test_full_labels_are_plus_and_minus_one() -> None:
    labels = full_labels(TRUE)
    np.testing.assert_array_equal(labels, TRUE * 2 - 1)
    assert labels.dtype == np.int8


def test_an_image_id_that_is_there_twice_is_refused(table: LabelTable) -> None:
    with pytest.raises(MlcError, match=r"image id '9' is there twice"):
        replace(table, image_id=np.array(["9", "8", "7", "9"]))


def test_classes_are_selected_in_the_order_asked_for(table: LabelTable) -> None:
    chosen = select_classes(table, ("traffic light", "cat"))
    assert chosen.classes == ("traffic light", "cat")
    np.testing.assert_array_equal(chosen.true, TRUE[:, [2, 0]])
    np.testing.assert_array_equal(chosen.observed, table.observed[:, [2, 0]])
    assert chosen.image_id.tolist() == table.image_id.tolist()


def test_the_constant_of_all_classes_does_not_stay_with_some(table: LabelTable) -> None:
    assert select_classes(table, ("dog",)).expected_positives is None


def test_classes_are_selected_without_a_truth_too(table: LabelTable) -> None:
    assert select_classes(replace(table, true=None), ("dog",)).true is None


def test_an_unknown_or_repeated_class_is_refused() -> None:
    classes = ("cat", "dog", "traffic light")
    assert class_columns(classes, ("dog", "cat")) == [1, 0]
    with pytest.raises(MlcError, match=r"unknown class 'trafic light'; .* 'traffic light'\?"):
        class_columns(classes, ("cat", "trafic light"))
    with pytest.raises(MlcError, match=r"'cat' is named twice"):
        class_columns(classes, ("cat", "dog", "cat"))


def test_the_digest_is_of_what_training_could_see(table: LabelTable) -> None:
    changes = {
        "image_id": np.array(["10", "9", "é", "8"]),
        "classes": ("cat", "dog", "traffic lights"),
        "observed": -table.observed,
        "true": ~TRUE,
        "split": np.array(["train", "test", "val", ""]),
        "expected_positives": 2.9,
    }
    digests = [table.digest(), *(replace(table, **{key: changes[key]}).digest() for key in changes)]
    assert len(set(digests)) == len(changes) + 1
    assert replace(table, true=None).digest() not in digests


def test_the_digest_stays_when_the_images_move_or_the_table_is_stored(
    table: LabelTable, tmp_path: Path
) -> None:
    moved = replace(table, file=np.array(["1", "2", "3", "4"]))
    save_labels(table, tmp_path / "labels.npz")
    assert moved.digest() == table.digest() == load_labels(tmp_path / "labels.npz").digest()


@pytest.mark.parametrize("change", [{}, {"true": None}, {"expected_positives": None}])
def test_a_saved_table_comes_back_the_same(table: LabelTable, tmp_path: Path, change: dict) -> None:
    table = replace(table, **change)
    path = tmp_path / "new" / "folder" / "labels.npz"
    save_labels(table, path)
    again = load_labels(path)
    assert_same(table, again)
    assert again.observed.dtype == np.int8
    assert [each.name for each in path.parent.iterdir()] == ["labels.npz"]


def test_a_save_that_fails_leaves_the_old_table(
    table: LabelTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "labels.npz"
    save_labels(table, path)

    def fill_the_disk(handle, **_):
        handle.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", fill_the_disk)
    with pytest.raises(OSError, match="no space left"):
        save_labels(replace(table, dataset="other"), path)
    assert load_labels(path).dataset == "csv-photos"


def test_a_table_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    path = tmp_path / "labels.npz"
    with pytest.raises(MlcError, match=rf"{path}: .* mlc data prepare --out {path}"):
        load_labels(path)


def cut_short(path: Path, table: LabelTable) -> None:
    save_labels(table, path)
    path.write_bytes(path.read_bytes()[:-200])


def overwrite(path: Path, table: LabelTable) -> None:
    """Overwrite compressed numbers with nonsense."""
    save_labels(table, path)
    content = bytearray(path.read_bytes())
    start = content.index(b"observed.npy") + 60
    content[start : start + 10] = b"\xff" * 10
    path.write_bytes(content)


def break_the_directory(path: Path, table: LabelTable) -> None:
    """Set the compression method in the zip's directory to one that there is not."""
    save_labels(table, path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 10] = 99
    path.write_bytes(content)


def bare_array(path: Path, _: LabelTable) -> None:
    with path.open("wb") as handle:
        np.save(handle, np.arange(3))


NOT_TABLES = {
    "text": lambda path, table: path.write_text("image_id,labels\n"),
    "empty file": lambda path, table: path.write_bytes(b""),
    "folder": lambda path, table: path.mkdir(),
    "bare array": bare_array,
    "other arrays": lambda path, table: np.savez(path, image_id=np.array(["1"])),
    "cut short": cut_short,
    "damaged inside": overwrite,
    "damaged directory": break_the_directory,
}


@pytest.mark.parametrize("name", NOT_TABLES)
def test_a_file_that_is_not_a_table_is_refused(
    table: LabelTable, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "labels.npz"
    NOT_TABLES[name](path, table)
    with pytest.raises(MlcError, match=rf"{path}: not a label table"):
        load_labels(path)


SAVER = """
import sys
from pathlib import Path
from mlc.datasets.labels import load_labels, save_labels
table = load_labels(Path(sys.argv[1]))
for _ in range(100):
    save_labels(table, Path(sys.argv[2]))
"""


def test_several_processes_write_the_same_table(table: LabelTable, tmp_path: Path) -> None:
    mine, ours = tmp_path / "mine.npz", tmp_path / "ours.npz"
    save_labels(table, mine)
    command = [sys.executable, "-c", SAVER, str(mine), str(ours)]
    savers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [saver.communicate(timeout=60)[1] for saver in savers]
    assert errors == [""] * 4
    assert_same(load_labels(ours), table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.npz", "ours.npz"]
