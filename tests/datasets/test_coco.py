"""COCO: rows and columns as the MLSPL authors' code orders them, and every way to be broken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared import need

from mlc.configs.errors import MlcError
from mlc.datasets.coco import read_coco

CATEGORIES = [{"id": 7, "name": "zebra"}, {"id": 3, "name": "apple"}, {"id": 5, "name": "mouse"}]
TRAIN = {9: [7, 7, 3], 10: [5], 100: [], 2: [3]}  # the categories of each image's annotations
TEST = {1000: [7], 11: [], 30: [3, 5]}
ZEBRA, APPLE, MOUSE = range(3)


def annotations(part: str, images: dict[int, list[int]], **more: Any) -> dict[str, Any]:
    """Return the JSON of a part; every annotation is a crowd of no area."""
    return {
        "images": [{"id": key, "file_name": f"COCO_{part}_{key:012}.jpg"} for key in images],
        "annotations": [
            {"id": 10 * image + index, "image_id": image, "category_id": category, "iscrowd": 1}
            for image, categories in images.items()
            for index, category in enumerate(categories)
        ],
        "categories": CATEGORIES,
        **more,
    }


def path_of(root: Path, part: str = "train2014") -> Path:
    return root / "annotations" / f"instances_{part}.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "annotations").mkdir()
    for part, images in (("train2014", TRAIN), ("val2014", TEST)):
        (tmp_path / part).mkdir()
        path_of(tmp_path, part).write_text(json.dumps(annotations(part, images)))
    return tmp_path


def test_classes_are_in_the_order_of_the_json(root: Path) -> None:
    assert read_coco(root).labels.classes == ("zebra", "apple", "mouse")


def test_rows_are_the_parts_in_turn_each_with_its_ids_sorted_as_text(root: Path) -> None:
    images = read_coco(root)
    assert images.image_id.tolist() == ["10", "100", "2", "9", "1000", "11", "30"]
    assert images.labels.image_id.tolist() == ["10", "2", "9", "1000", "30"]
    assert images.labels.split.tolist() == ["train"] * 3 + ["test"] * 2
    assert images.root == root


def test_files_follow_their_ids(root: Path) -> None:
    images = read_coco(root)
    assert images.file[3] == "train2014/COCO_train2014_000000000009.jpg"
    assert images.file[5] == "val2014/COCO_val2014_000000000011.jpg"
    by_id = dict(zip(images.image_id, images.file, strict=True))
    assert [by_id[each] for each in images.labels.image_id] == images.labels.file.tolist()


def test_every_annotation_counts_once_crowds_too(root: Path) -> None:
    labels = read_coco(root).labels
    positives = {
        str(image_id): set(np.flatnonzero(row).tolist())
        for image_id, row in zip(labels.image_id, labels.true, strict=True)
    }
    assert positives == {
        "10": {MOUSE},
        "2": {APPLE},
        "9": {ZEBRA, APPLE},
        "1000": {ZEBRA},
        "30": {APPLE, MOUSE},
    }
    np.testing.assert_array_equal(labels.observed, np.where(labels.true, 1, -1))


def test_images_without_annotations_stay_in_the_image_set_only(root: Path) -> None:
    images = read_coco(root)
    assert set(images.image_id) - set(images.labels.image_id) == {"100", "11"}


def test_keep_unlabelled_keeps_them_with_negative_labels(root: Path) -> None:
    images = read_coco(root, keep_unlabelled=True)
    np.testing.assert_array_equal(images.labels.image_id, images.image_id)
    unlabelled = np.isin(images.image_id, ["100", "11"])
    assert (images.labels.observed[unlabelled] == -1).all()
    assert not images.labels.true[unlabelled].any()
    assert images.labels.split.tolist() == ["train"] * 4 + ["test"] * 3


def test_the_authors_constant_and_the_name_come_with_the_table(root: Path) -> None:
    labels = read_coco(root).labels
    assert labels.expected_positives == 2.9
    assert labels.dataset == "coco"


def test_a_missing_root_says_what_was_looked_for_and_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(MlcError) as caught:
        read_coco(tmp_path / "nowhere")
    sentence = str(caught.value)
    for word in ("nowhere", "train2014", "val2014", "instances_train2014.json", "cocodataset.org"):
        assert word in sentence
    assert "--root" in sentence


@pytest.mark.parametrize("part", ["train2014", "annotations/instances_val2014.json"])
def test_a_missing_part_is_named_and_the_others_are_not(root: Path, part: str) -> None:
    gone = root / part
    gone.rmdir() if gone.is_dir() else gone.unlink()
    with pytest.raises(MlcError, match=rf"no {part} there; download .* or pass --root"):
        read_coco(root)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"not json"])
def test_a_file_that_is_not_json_is_refused(root: Path, content: bytes) -> None:
    path_of(root).write_bytes(content)
    with pytest.raises(MlcError, match=r"instances_train2014.json: not JSON .* unpack"):
        read_coco(root)


def without(key: str, entry: str | None = None) -> Callable[[dict[str, Any]], Any]:
    """Return an edit that drops a key of the file, or of each entry of a list of it."""

    def edit(content: dict[str, Any]) -> Any:
        if entry is None:
            return {name: value for name, value in content.items() if name != key}
        kept = [{name: each[name] for name in each if name != entry} for each in content[key]]
        return content | {key: kept}

    return edit


def replaced(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content | values


NOT_COCO = {
    "a list": lambda content: [content],
    "a number": lambda content: 5,
    "null": lambda content: None,
    "no images": without("images"),
    "no annotations": without("annotations"),
    "no categories": without("categories"),
    "image without id": without("images", "id"),
    "image without file": without("images", "file_name"),
    "annotation without image": without("annotations", "image_id"),
    "annotation without category": without("annotations", "category_id"),
    "category without id": without("categories", "id"),
    "category without name": without("categories", "name"),
    "images a number": replaced(images=5),
    "images a dict": replaced(images={"id": 1}),
    "annotations null": replaced(annotations=None),
    "annotation a number": replaced(annotations=[5]),
    "annotation a list": replaced(annotations=[[1, 2]]),
    "category a text": replaced(categories=["cat"]),
    "category id a list": replaced(categories=[{"id": [1], "name": "cat"}]),
    "annotation's category a list": replaced(annotations=[{"image_id": 9, "category_id": [7]}]),
}


@pytest.mark.parametrize("name", NOT_COCO)
def test_json_that_is_not_coco_is_refused(root: Path, name: str) -> None:
    content = NOT_COCO[name](annotations("train2014", TRAIN))
    path_of(root).write_text(json.dumps(content))
    with pytest.raises(MlcError, match=r"instances_train2014.json: not COCO annotations"):
        read_coco(root)


def test_a_file_without_images_is_refused(root: Path) -> None:
    path_of(root, "val2014").write_text(json.dumps(annotations("val2014", {})))
    with pytest.raises(MlcError, match=r"instances_val2014.json: lists no images"):
        read_coco(root)


def test_an_image_id_that_is_twice_in_a_file_is_refused(root: Path) -> None:
    content = annotations("train2014", TRAIN)
    content["images"] += content["images"][1:2]
    path_of(root).write_text(json.dumps(content))
    with pytest.raises(MlcError, match=r"instances_train2014.json: image id 10 is there twice"):
        read_coco(root)


@pytest.mark.parametrize(("key", "value"), [("image_id", 12), ("category_id", 4)])
def test_an_annotation_of_something_unlisted_is_refused(root: Path, key: str, value: int) -> None:
    content = annotations("train2014", TRAIN)
    content["annotations"][1][key] = value
    path_of(root).write_text(json.dumps(content))
    with pytest.raises(MlcError, match=rf"annotation 91 names .*'?{value}'?, which .* not list"):
        read_coco(root)


@pytest.mark.parametrize(
    "categories", [CATEGORIES[::-1], CATEGORIES[:2], [*CATEGORIES, {"id": 8, "name": "cat"}]]
)
def test_parts_with_other_categories_are_refused(root: Path, categories: list[Any]) -> None:
    content = annotations("val2014", {11: [7]}, categories=categories)
    path_of(root, "val2014").write_text(json.dumps(content))
    with pytest.raises(MlcError, match=r"instances_train2014 and instances_val2014 .* categories"):
        read_coco(root)


@pytest.mark.parametrize("keep_unlabelled", [False, True])
def test_an_image_in_both_parts_is_refused(root: Path, keep_unlabelled: bool) -> None:
    path_of(root, "val2014").write_text(json.dumps(annotations("val2014", {100: [7]})))
    with pytest.raises(MlcError, match=r"image id '100' is there twice"):
        read_coco(root, keep_unlabelled)


def test_real_photos_have_cocos_figures() -> None:
    images = read_coco(need("coco-mini"))
    train, test = images.labels.part("train"), images.labels.part("test")
    assert (len(train), len(test), len(images.labels.classes)) == (3_055, 900, 80)
    assert images.labels.true.sum(axis=1).mean() == pytest.approx(2.93, abs=0.005)
    assert images.labels.classes[:3] == ("person", "bicycle", "car")
    images.check_files()
