"""The authors' formatted files: rows, ids, names and observed labels, and every refusal."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shared

from mlc.configs.errors import MlcError
from mlc.datasets.coco import read_coco
from mlc.datasets.formatted import COCO_CLASSES, FORMATTED, load_array, read_formatted
from mlc.datasets.labels import LabelTable
from mlc.datasets.protocol import apply_protocol, observe
from mlc.datasets.voc import CLASSES, read_voc

# (train images, test images); ids are checked against these.
NAMES = {
    "coco": (
        ["train2014/COCO_train2014_000000000009.jpg", "train2014/COCO_train2014_000000123456.jpg"],
        ["val2014/COCO_val2014_000000000042.jpg"],
    ),
    "cub": (["001.Albatross/a_1.jpg", "001.Albatross/a_2.jpg"], ["002.Auklet/b_1.jpg"]),
    "nuswide": (["sky/2_7.jpg", "actor/1_3.jpg"], ["water/9.jpg"]),
    "voc": (["2007_000027.jpg", "2008_000002.jpg"], ["2007_000032.jpg"]),
}
IDS = {
    "coco": ["9", "123456", "42"],
    "cub": ["001.Albatross/a_1.jpg", "001.Albatross/a_2.jpg", "002.Auklet/b_1.jpg"],
    "nuswide": ["sky/2_7.jpg", "actor/1_3.jpg", "water/9.jpg"],
    "voc": ["2007_000027", "2008_000002", "2007_000032"],
}


def save(folder: Path, part: str, kind: str, values: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"formatted_{part}_{kind}.npy", values)


def some_labels(rows: int, classes: int, seed: int = 0) -> np.ndarray:
    """(rows, classes) float64 of 0 and 1, at least one 1 in a row, as the authors save them."""
    generator = np.random.default_rng(seed)
    labels = (generator.random((rows, classes)) < 0.3).astype(np.float64)
    labels[np.arange(rows), generator.integers(classes, size=rows)] = 1
    return labels


def write_formatted(folder: Path, dataset: str) -> Path:
    """Write a tiny data set in the authors' layout; returns its folder."""
    for seed, (part, names) in enumerate(zip(("train", "val"), NAMES[dataset], strict=True)):
        save(folder, part, "images", np.array(names))
        save(folder, part, "labels", some_labels(len(names), FORMATTED[dataset].classes, seed))
    return folder


def read_back(folder: Path, kind: str) -> np.ndarray:
    return np.concatenate([np.load(folder / f"formatted_{p}_{kind}.npy") for p in ("train", "val")])


def assert_same_table(got: LabelTable, want: LabelTable) -> None:
    assert got.digest() == want.digest()
    assert got.dataset == want.dataset


@pytest.mark.parametrize(
    ("dataset", "expected_positives"),
    [("coco", 2.9), ("cub", 31.4), ("nuswide", 1.9), ("voc", 1.5)],
)
def test_rows_are_those_of_the_files_train_then_test(
    tmp_path: Path, dataset: str, expected_positives: float
) -> None:
    images = read_formatted(dataset, write_formatted(tmp_path, dataset))
    table = images.labels
    np.testing.assert_array_equal(table.true, read_back(tmp_path, "labels") == 1)
    np.testing.assert_array_equal(table.observed, np.where(table.true, 1, -1))
    assert (table.true.dtype, table.observed.dtype) == (np.bool_, np.int8)
    assert table.split.tolist() == ["train", "train", "test"]
    assert table.image_id.tolist() == images.image_id.tolist() == IDS[dataset]
    assert table.file.tolist() == images.file.tolist() == [*NAMES[dataset][0], *NAMES[dataset][1]]
    assert (table.dataset, table.expected_positives) == (dataset, expected_positives)


def test_the_sizes_are_the_papers() -> None:
    sizes = {name: known.classes for name, known in FORMATTED.items()}
    assert sizes == {"coco": 80, "cub": 312, "nuswide": 81, "voc": 20}
    for known in FORMATTED.values():
        assert not known.class_names or len(set(known.class_names)) == known.classes


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.uint8, np.bool_])
def test_labels_may_be_of_any_number_type(tmp_path: Path, dtype: type) -> None:
    write_formatted(tmp_path, "nuswide")
    want = read_formatted("nuswide", tmp_path).labels
    labels = np.load(tmp_path / "formatted_train_labels.npy")
    save(tmp_path, "train", "labels", np.asfortranarray(labels.astype(dtype)))
    assert_same_table(read_formatted("nuswide", tmp_path).labels, want)


@pytest.mark.parametrize("keep_unlabelled", [False, True])
def test_images_without_a_label_stay(tmp_path: Path, keep_unlabelled: bool) -> None:
    write_formatted(tmp_path, "nuswide")
    labels = np.load(tmp_path / "formatted_train_labels.npy")
    labels[1] = 0
    save(tmp_path, "train", "labels", labels)
    table = read_formatted("nuswide", tmp_path, keep_unlabelled).labels
    assert table.image_id.tolist() == IDS["nuswide"]
    assert table.true.any(axis=1).tolist() == [True, False, True]
    shown = observe(table.true[:2])
    assert (shown == 1).sum(axis=1).tolist() == [1, 0]


def write_coco_annotations(root: Path, generator: np.random.Generator) -> None:
    """Write COCO's files of 80 categories, images and annotations in no order."""
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": 2 * i + 1, "name": name} for i, name in enumerate(COCO_CLASSES)]
    for part, ids in (("train2014", [9, 100, 25, 1000, 26]), ("val2014", [42, 7, 133])):
        (root / part).mkdir()
        images = [{"id": each, "file_name": f"COCO_{part}_{each:012}.jpg"} for each in ids]
        annotations = [
            {"id": each, "image_id": int(image), "category_id": int(2 * category + 1)}
            for each, (image, category) in enumerate(
                zip(generator.choice(ids[1:], 12), generator.integers(80, size=12), strict=True)
            )
        ]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def format_coco(root: Path) -> None:
    """The steps of the authors' ``format_coco.py``, slowly."""
    for part, year in (("train", "train2014"), ("val", "val2014")):
        content = json.loads((root / "annotations" / f"instances_{year}.json").read_text())
        column = {category["id"]: i for i, category in enumerate(content["categories"])}
        labelled = {str(each["image_id"]) for each in content["annotations"]}
        ids = [int(each) for each in sorted(labelled)]
        labels = np.zeros((len(ids), len(column)))
        for each in content["annotations"]:
            labels[ids.index(each["image_id"]), column[each["category_id"]]] = 1.0
        save(root, part, "labels", labels)
        save(root, part, "images", np.array([f"{year}/COCO_{year}_{i:012d}.jpg" for i in ids]))


def test_formatted_coco_is_the_table_of_its_annotations(tmp_path: Path) -> None:
    write_coco_annotations(tmp_path, np.random.default_rng(5))
    format_coco(tmp_path)
    want = read_coco(tmp_path).labels
    got = read_formatted("coco", tmp_path)
    assert_same_table(got.labels, want)
    np.testing.assert_array_equal(got.file, want.file)
    assert got.root == tmp_path


def test_cocos_class_names_are_the_annotations() -> None:
    assert read_coco(shared.need("coco-mini")).labels.classes == COCO_CLASSES


def test_formatted_voc_is_the_table_of_its_lists(tmp_path: Path) -> None:
    write_formatted(tmp_path, "voc")
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    (voc / "JPEGImages").mkdir()
    for part in ("train", "val"):
        names = np.load(tmp_path / f"formatted_{part}_images.npy")
        for column, flags in enumerate(np.load(tmp_path / f"formatted_{part}_labels.npy").T):
            lines = [
                f"{name.removesuffix('.jpg')} {1 if flag else -1:2d}\n"
                for name, flag in zip(names.tolist(), flags, strict=True)
            ]
            path = voc / "ImageSets" / "Main" / f"{CLASSES[column]}_{part}.txt"
            path.write_text("".join(lines))
    got = read_formatted("voc", tmp_path)
    assert_same_table(got.labels, read_voc(tmp_path).labels)
    assert got.root == voc / "JPEGImages"


@pytest.mark.parametrize(
    ("dataset", "photos"),
    [
        ("cub", "CUB_200_2011/CUB_200_2011/images"),
        ("cub", "CUB_200_2011/images"),
        ("cub", "images"),
        ("nuswide", "Flickr"),
        ("nuswide", "images"),
        ("voc", "VOCdevkit/VOC2012/JPEGImages"),
        ("voc", "JPEGImages"),
        ("coco", "."),
    ],
)
def test_photos_are_found_in_the_authors_layout(tmp_path: Path, dataset: str, photos: str) -> None:
    write_formatted(tmp_path, dataset)
    photo = tmp_path / photos / NAMES[dataset][1][0]
    photo.parent.mkdir(parents=True, exist_ok=True)
    photo.touch()
    images = read_formatted(dataset, tmp_path)
    images.check_files()
    assert images.root == tmp_path / photos


def test_without_photos_their_root_is_the_folder_of_the_files(tmp_path: Path) -> None:
    assert read_formatted("nuswide", write_formatted(tmp_path, "nuswide")).root == tmp_path


@pytest.mark.parametrize("dataset", ["cub", "nuswide"])
def test_unknown_class_names_are_numbers(tmp_path: Path, dataset: str) -> None:
    classes = read_formatted(dataset, write_formatted(tmp_path, dataset)).labels.classes
    assert classes == tuple(f"class {each}" for each in range(FORMATTED[dataset].classes))


@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        ("cub", "attributes.txt"),
        ("cub", "CUB_200_2011/attributes.txt"),
        ("nuswide", "Concepts81.txt"),
        ("nuswide", "ConceptsList/Concepts81.txt"),
    ],
)
def test_class_names_are_read_where_they_lie(tmp_path: Path, dataset: str, file: str) -> None:
    write_formatted(tmp_path, dataset)
    names = [f"has_{each}::é_(x)" for each in range(FORMATTED[dataset].classes, 0, -1)]
    lines = [f"{i} {name}" for i, name in enumerate(names, 1)] if dataset == "cub" else names
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("\n".join(lines) + "\n\n")
    assert read_formatted(dataset, tmp_path).labels.classes == tuple(names)


@pytest.mark.parametrize(
    ("names", "got"),
    [
        (["sky"], "1 of which 1 differ"),
        (["sky"] * 81, "81 of which 1 differ"),
        ([*map(str, range(81)), "5"], "82 of which 81 differ"),
        ([], "0 of which 0 differ"),
    ],
)
def test_other_class_names_are_refused(tmp_path: Path, names: list[str], got: str) -> None:
    write_formatted(tmp_path, "nuswide")
    (tmp_path / "Concepts81.txt").write_text("\n".join(names))
    with pytest.raises(MlcError, match=rf"Concepts81.txt: expected 81 different .*, got {got}"):
        read_formatted("nuswide", tmp_path)


def write_observed(folder: Path, **settings: int) -> np.ndarray:
    """Write the files of ``generate_observed_labels.py``."""
    for part in ("train", "val"):
        true = np.load(folder / f"formatted_{part}_labels.npy") == 1
        save(folder, part, "labels_obs", observe(true, **settings).astype(np.float64))
    return read_back(folder, "labels_obs")


def test_observed_labels_beside_are_the_labels_as_given(tmp_path: Path) -> None:
    write_formatted(tmp_path, "cub")
    observed = write_observed(tmp_path, negatives=1, seed=3)
    table = read_formatted("cub", tmp_path).labels
    np.testing.assert_array_equal(table.observed, observed)
    assert table.observed.dtype == np.int8
    np.testing.assert_array_equal(table.true, read_back(tmp_path, "labels") == 1)
    for part in ("train", "val"):
        save(tmp_path, part, "images", np.array([f"{part}{each}" for each in range(20)]))
        save(tmp_path, part, "labels", some_labels(20, 312))
    observed = write_observed(tmp_path, negatives=1, seed=3)
    given = apply_protocol(read_formatted("cub", tmp_path).labels, "as-given")
    np.testing.assert_array_equal(given.observed, observed)


def test_single_positives_are_the_authors_file_whether_it_is_there_or_not(tmp_path: Path) -> None:
    for part in ("train", "val"):
        save(tmp_path, part, "images", np.array([f"{part}{each}" for each in range(20)]))
        save(tmp_path, part, "labels", some_labels(20, 81))
    without = apply_protocol(read_formatted("nuswide", tmp_path).labels, "single-positive")
    observed = write_observed(tmp_path)  # one positive, seed 1200
    np.testing.assert_array_equal(without.observed, observed)
    table = read_formatted("nuswide", tmp_path).labels
    shown = apply_protocol(table, "single-positive")
    np.testing.assert_array_equal(shown.observed, observed)
    other = apply_protocol(table, "single-positive", corruption_seed=1).observed
    assert (other != observed).any()


def refused(folder: Path, sentence: str, dataset: str = "nuswide") -> None:
    with pytest.raises(MlcError, match=sentence):
        read_formatted(dataset, folder)


def test_a_missing_file_is_named_with_how_to_get_it(tmp_path: Path) -> None:
    refused(
        tmp_path / "none",
        r"none: no formatted_train_labels.npy, formatted_val_labels.npy, "
        r"formatted_train_images.npy, formatted_val_images.npy there; .*zenodo.*10162606.* --root",
    )
    write_formatted(tmp_path, "nuswide")
    (tmp_path / "formatted_val_images.npy").unlink()
    refused(tmp_path, r": no formatted_val_images.npy there; get")


@pytest.mark.parametrize(
    ("kind", "values", "sentence"),
    [
        ("labels", np.zeros(2), r"train_labels.npy: expected a row of numbers .* shape \(2,\)"),
        ("labels", np.zeros((0, 81)), r"train_labels.npy: expected .* shape \(0, 81\)"),
        ("labels", np.full((2, 81), "x"), r"train_labels.npy: expected a row .*, got <U1"),
        ("labels", np.zeros((2, 80)), r"labels.npy: expected 81 classes, got 80 columns; .*--data"),
        ("images", np.array([["a", "b"]]), r"train_images.npy: expected a list of text.*\(1, 2\)"),
        ("images", np.array([b"a", b"b"]), r"train_images.npy: expected a list of text, got .S1"),
        ("images", np.array(["a"]), r"images.npy: names 1 images, and .*train_labels.npy has 2"),
        ("images", np.array(["a", "a"]), r"images.npy: image id 'a' is there twice, first in .*tr"),
        ("images", np.array(["a", "water/9.jpg"]), r"val_images.npy: .*'water/9.jpg' .* in .*trai"),
    ],
)
def test_a_file_of_another_shape_is_refused(
    tmp_path: Path, kind: str, values: np.ndarray, sentence: str
) -> None:
    write_formatted(tmp_path, "nuswide")
    save(tmp_path, "train", kind, values)
    refused(tmp_path, sentence)


@pytest.mark.parametrize("value", [-1, 0.5, 2, np.nan])
def test_a_label_that_is_not_0_or_1_is_refused(tmp_path: Path, value: float) -> None:
    write_formatted(tmp_path, "voc")
    labels = np.load(tmp_path / "formatted_train_labels.npy")
    labels[1, 2] = value
    save(tmp_path, "train", "labels", labels)
    refused(
        tmp_path, rf"train_labels.npy: expected 0, 1, got {value:.1f} in row 1, class 'bird'", "voc"
    )


@pytest.mark.parametrize("name", ["2007_000027.jpg", "val2014/COCO_val2014_42.jpg"])
def test_other_names_than_cocos_are_refused(tmp_path: Path, name: str) -> None:
    write_formatted(tmp_path, "coco")
    save(tmp_path, "val", "images", np.array([name]))
    refused(tmp_path, rf"val_images.npy: expected names like train2014/.*, got '{name}'", "coco")


def test_the_same_coco_image_by_two_names_is_refused(tmp_path: Path) -> None:
    write_formatted(tmp_path, "coco")
    save(tmp_path, "val", "images", np.array(["COCO_val2014_000000000009.jpg"]))
    refused(tmp_path, r"val_images.npy: image id '9' is there twice, first in .*train", "coco")


def test_observed_labels_of_one_part_are_refused(tmp_path: Path) -> None:
    write_formatted(tmp_path, "nuswide")
    write_observed(tmp_path)
    (tmp_path / "formatted_val_labels_obs.npy").unlink()
    refused(tmp_path, r"formatted_train_labels_obs.npy is there without formatted_val_labels_obs")


def test_observed_labels_that_contradict_the_truth_are_refused(tmp_path: Path) -> None:
    write_formatted(tmp_path, "voc")
    write_observed(tmp_path)
    for row, value, hidden in ((0, 1, 0), (1, -1, 1)):
        observed = np.zeros((2, 20))
        labels = np.load(tmp_path / "formatted_train_labels.npy")
        observed[row, 4] = value
        labels[row, 4] = hidden
        save(tmp_path, "train", "labels", labels)
        save(tmp_path, "train", "labels_obs", observed)
        refused(tmp_path, rf"obs.npy: row {row}, class 'bottle' is observed as \{value:+d}", "voc")


@pytest.mark.parametrize(
    ("observed", "sentence"),
    [
        (np.zeros((3, 20)), r"train_labels_obs.npy: has 3 rows, and the labels 2"),
        (np.zeros((2, 19)), r"train_labels_obs.npy: expected 20 classes, got 19"),
        (np.full((2, 20), 0.5), r"train_labels_obs.npy: expected -1, 0, 1, got 0.5 in row 0, cla"),
    ],
)
def test_observed_labels_of_another_shape_are_refused(
    tmp_path: Path, observed: np.ndarray, sentence: str
) -> None:
    write_formatted(tmp_path, "voc")
    write_observed(tmp_path)
    save(tmp_path, "train", "labels_obs", observed)
    refused(tmp_path, sentence, "voc")


class Bomb:
    """Does something when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_pickle_is_not_opened(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(MlcError, match=r"a.npy: not an .npy file of numbers or text \(.*bject"):
        load_array(path, mapped=mapped)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("content", [b"", b"text, no array", b"PK\x03\x04zip", b"whole"])
def test_a_broken_array_is_refused(tmp_path: Path, content: bytes, mapped: bool) -> None:
    path = tmp_path / "a.npy"
    if content == b"whole":
        np.save(path, np.arange(1000.0))
        content = path.read_bytes()[:-900]
    path.write_bytes(content)
    with pytest.raises(MlcError, match=r"a.npy: not an .npy file of numbers or text \(.+\); get"):
        load_array(path, mapped=mapped)


def test_an_array_is_mapped_or_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6.0).reshape(2, 3))
    for mapped, kind in ((False, np.ndarray), (True, np.memmap)):
        array = load_array(tmp_path / "a.npy", mapped=mapped)
        assert type(array) is kind
        np.testing.assert_array_equal(array, np.arange(6.0).reshape(2, 3))
