"""A JSON in COCO's format: where its photos lie, several files as splits, every broken one."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared import need

from mlc.configs.errors import MlcError
from mlc.datasets.coco import read_coco
from mlc.datasets.coco_json import read_coco_json
from mlc.datasets.protocol import apply_protocol
from mlc.datasets.source import DataConfig, absolute_data, read_images

CATEGORIES = [{"id": 7, "name": "zebra"}, {"id": 3, "name": "apple"}, {"id": 5, "name": "mouse"}]
APPLE, MOUSE, ZEBRA = range(3)
PHOTOS = {9: [7, 7, 3], 10: [5], 100: [], 2: [3]}  # the categories of each image's annotations


def content(photos: dict[Any, list[int]] = PHOTOS, name: str = "{}.jpg") -> dict[str, Any]:
    """Return a JSON in which every annotation is a crowd that is to be ignored, of no area."""
    return {
        "images": [{"id": key, "file_name": name.format(key)} for key in photos],
        "annotations": [
            {"id": index, "image_id": image, "category_id": category, "iscrowd": 1, "ignore": 1}
            for image, categories in photos.items()
            for index, category in enumerate(categories, start=90)
        ],
        "categories": CATEGORIES,
    }


def write(path: Path, what: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content() if what is None else what))
    return path


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def edited(edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    what = json.loads(json.dumps(content()))
    edit(what)
    return what


def test_rows_are_ids_as_text_and_classes_the_order_of_their_ids(tmp_path: Path) -> None:
    images = read_coco_json([write(tmp_path / "photos.json")])
    assert images.image_id.tolist() == ["10", "100", "2", "9"]
    assert images.file.tolist() == ["10.jpg", "100.jpg", "2.jpg", "9.jpg"]
    assert images.labels.classes == ("apple", "mouse", "zebra")
    assert images.labels.dataset == "json-photos"
    assert images.labels.expected_positives is None


def test_every_annotation_counts_once_crowds_too(tmp_path: Path) -> None:
    labels = read_coco_json([write(tmp_path / "photos.json")]).labels
    positives = [np.flatnonzero(row).tolist() for row in labels.true]
    assert dict(zip(labels.image_id.tolist(), positives, strict=True)) == {
        "10": [MOUSE],
        "2": [APPLE],
        "9": [APPLE, ZEBRA],
    }
    np.testing.assert_array_equal(labels.observed, np.where(labels.true, 1, -1))


def test_images_without_annotations_have_labels_if_they_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "photos.json")
    dropped, kept = (read_coco_json([path], keep_unlabelled=keep) for keep in (False, True))
    assert dropped.image_id.tolist() == kept.image_id.tolist()
    assert set(kept.labels.image_id) - set(dropped.labels.image_id) == {"100"}
    assert not kept.labels.true[1].any()
    assert (kept.labels.observed[1] == -1).all()


def test_text_ids_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    what = content({"b-1": [5], "a": [3]}, "{}.png")
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(what).encode())
    assert read_coco_json([path]).image_id.tolist() == ["a", "b-1"]


# Splits


def splits_of(labels: Any) -> dict[str, int]:
    return {name: int((labels.split == name).sum()) for name in ("", "train", "val", "test")}


def numbered(first: int, last: int) -> dict[Any, list[int]]:
    return {number: [3, 5, 7][: 1 + number % 3] for number in range(first, last)}


def files(folder: Path, sizes: Sequence[int], start: int = 0) -> list[Path]:
    """Write files of so many images with ids of their own."""
    paths = []
    for index, size in enumerate(sizes):
        what = content(numbered(start, start + size))
        paths.append(write(folder / f"part{index}.json", what))
        start += size
    return paths


def test_one_file_is_split_by_seed(tmp_path: Path) -> None:
    images = read_coco_json(files(tmp_path, [20]))
    assert splits_of(images.labels) == {"": 20, "train": 0, "val": 0, "test": 0}
    split = splits_of(apply_protocol(images.labels, "full"))
    assert split == {"": 0, "train": 14, "val": 2, "test": 4}


def test_two_files_are_train_and_test(tmp_path: Path) -> None:
    images = read_coco_json(files(tmp_path, [20, 5]))
    assert splits_of(images.labels) == {"": 0, "train": 20, "val": 0, "test": 5}
    split = splits_of(apply_protocol(images.labels, "full"))
    assert split == {"": 0, "train": 16, "val": 4, "test": 5}


def test_three_files_are_train_val_and_test_in_turn(tmp_path: Path) -> None:
    paths = files(tmp_path, [6, 2, 3])
    images = read_coco_json(paths)
    assert images.labels.split.tolist() == ["train"] * 6 + ["val"] * 2 + ["test"] * 3
    assert images.image_id.tolist() == [str(number) for number in [*range(6), 6, 7, 10, 8, 9]]
    assert images.labels.dataset == "json-part0-part1-part2"
    wanted = [read_coco_json([path]).labels.true for path in paths]
    np.testing.assert_array_equal(images.labels.true, np.concatenate(wanted))


@pytest.mark.parametrize("count", [0, 4])
def test_no_files_and_four_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(MlcError, match=f"expected train, val and test, got {count} files"):
        read_coco_json(files(tmp_path, [2] * count))


def test_parts_may_order_their_categories_as_they_like(tmp_path: Path) -> None:
    paths = files(tmp_path, [3, 3])
    straight = read_coco_json(paths)
    write(paths[1], content(numbered(3, 6)) | {"categories": CATEGORIES[::-1]})
    np.testing.assert_array_equal(read_coco_json(paths).labels.true, straight.labels.true)


@pytest.mark.parametrize(
    "categories", [CATEGORIES[1:], [*CATEGORIES[1:], {"id": 7, "name": "zebras"}]]
)
def test_parts_with_other_categories_are_refused(tmp_path: Path, categories: list[Any]) -> None:
    paths = files(tmp_path, [3, 3])
    write(paths[1], content({8: [3]}) | {"categories": categories})
    with pytest.raises(MlcError, match=r"part1.json: has other categories than .*part0.* 'zebra"):
        read_coco_json(paths)


def test_ids_that_start_again_get_their_split(tmp_path: Path) -> None:
    """As annotation tools export: each split is a folder with its JSON and photos numbered anew."""
    paths = []
    for name, photos in (("train", {0: [3], 1: [5]}), ("valid", {0: [7]}), ("test", {5: [3]})):
        what = content(photos, f"{name}-{{}}.jpg")
        paths.append(write(tmp_path / name / "_annotations.coco.json", what))
        for key in photos:
            photo(tmp_path / name / f"{name}-{key}.jpg")
    images = read_coco_json(paths)
    assert images.root == tmp_path
    assert images.image_id.tolist() == ["train/0", "train/1", "val/0", "test/5"]
    assert images.file.tolist() == [
        "train/train-0.jpg", "train/train-1.jpg", "valid/valid-0.jpg", "test/test-5.jpg"
    ]  # fmt: skip
    assert images.labels.image_id.tolist() == images.image_id.tolist()
    assert images.labels.dataset == "json-_annotations.coco"
    assert all((images.root / name).is_file() for name in images.file)


@pytest.mark.parametrize("other", [{2: [3]}, {2: [3], 9: [5], 55: [7]}])
def test_a_photo_in_two_parts_is_refused(tmp_path: Path, other: dict[Any, list[int]]) -> None:
    paths = [write(tmp_path / "a.json"), write(tmp_path / "b.json", content(other))]
    shared = len(other.keys() & PHOTOS.keys())
    with pytest.raises(MlcError, match=rf"b.json: {shared} images are also in .*a.json.* '2.jpg'"):
        read_coco_json(paths)


def test_a_photo_of_two_ids_in_two_parts_is_refused(tmp_path: Path) -> None:
    what = content({77: [3]}, "./2.jpg")
    paths = [write(tmp_path / "a.json"), write(tmp_path / "b.json", what)]
    with pytest.raises(MlcError, match="1 images are also in"):
        read_coco_json(paths)


# Where the photos are


@pytest.mark.parametrize("place", ["", "images", "train2017", "images/train2017"])
@pytest.mark.parametrize("given", [False, True])
def test_photos_are_found_at_the_json_or_below_the_root(
    tmp_path: Path, place: str, given: bool
) -> None:
    home = tmp_path / "root" if given else tmp_path
    path = write(tmp_path / "instances_train2017.json")
    photo(home / place / "9.jpg")
    images = read_coco_json([path], home if given else None)
    assert images.root == home
    assert (images.root / str(images.file[3])).resolve() == home / place / "9.jpg"
    images.check_files()


@pytest.mark.parametrize("place", ["", "images", "val2017", "images/val2017"])
def test_photos_are_found_beside_a_folder_annotations(tmp_path: Path, place: str) -> None:
    path = write(tmp_path / "annotations/instances_val2017.json")
    photo(tmp_path / place / "10.jpg")
    images = read_coco_json([path])
    assert images.root == tmp_path
    images.check_files()
    assert images.file[0] == str(Path(place, "10.jpg"))


def test_parts_with_folders_of_their_own_share_a_root(tmp_path: Path) -> None:
    paths = []
    for name, photos in (("train2017", {1: [3]}), ("val2017", {2: [5]})):
        paths.append(write(tmp_path / f"annotations/instances_{name}.json", content(photos)))
        for key in photos:
            photo(tmp_path / f"{name}/{key}.jpg")
    for root in (tmp_path, None):
        images = read_coco_json(paths, root)
        assert images.root == tmp_path
        assert images.file.tolist() == ["train2017/1.jpg", "val2017/2.jpg"]


def test_the_root_itself_comes_first(tmp_path: Path) -> None:
    path = write(tmp_path / "photos.json")
    for place in ("", "images"):
        photo(tmp_path / place / "9.jpg")
    assert read_coco_json([path]).file[3] == "9.jpg"


def test_two_folders_of_the_photos_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "instances_train.json")
    for place in ("images", "train"):
        photo(tmp_path / place / "9.jpg")
    with pytest.raises(MlcError, match=r"images are in .*/images and .*/train; pass .* --root"):
        read_coco_json([path])
    assert read_coco_json([path], tmp_path / "train").root == tmp_path / "train"


def test_a_link_to_the_folder_is_not_a_second_one(tmp_path: Path) -> None:
    path = write(tmp_path / "instances_train.json")
    photo(tmp_path / "images/9.jpg")
    (tmp_path / "train").symlink_to("images")
    assert read_coco_json([path]).file[3] == "images/9.jpg"


def test_a_given_root_is_the_only_one_that_is_searched(tmp_path: Path) -> None:
    path = write(tmp_path / "photos.json")
    photo(tmp_path / "9.jpg")
    images = read_coco_json([path], tmp_path / "elsewhere")
    assert images.root == tmp_path / "elsewhere"
    with pytest.raises(MlcError, match=r"elsewhere: not one of the 4 listed .* --root"):
        images.check_files()


def test_the_folder_above_is_searched_only_from_annotations(tmp_path: Path) -> None:
    photo(tmp_path / "images/9.jpg")
    for name, found in (("labels", False), ("annotations", True)):
        images = read_coco_json([write(tmp_path / name / "photos.json")])
        assert (images.root == tmp_path) == found


def test_labels_are_read_without_photos(tmp_path: Path) -> None:
    images = read_coco_json([write(tmp_path / "photos.json")])
    assert (images.root, len(images.labels)) == (tmp_path, 3)


def test_a_folder_in_the_file_name_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "annotations/x.json", content(name="./train//{}.jpg"))
    photo(tmp_path / "train/9.jpg")
    images = read_coco_json([path])
    assert (images.root, images.file[3]) == (tmp_path, "train/9.jpg")


# Broken files


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("/photos/9.jpg", r"image '9' lies outside the root, got file_name '/photos/9.jpg'; make"),
        ("../9.jpg", r"lies outside the root"),
        ("a/../../9.jpg", r"lies outside the root"),
        ("..", r"lies outside the root"),
        ("", r"image '9' has no usable file_name, got ''"),
        (".", r"no usable file_name"),
        ("a/..", r"no usable file_name"),
        ("9\0.jpg", r"no usable file_name"),
        ("9\ud800.jpg", r"no usable file_name"),
        ("a/../2.jpg", r"images 2 and 9 have the same file_name, '2.jpg'"),
        (None, r"not COCO annotations, file_name None"),
        (["9.jpg"], r"not COCO annotations"),
    ],
)
def test_a_file_name_that_cannot_be_is_refused(tmp_path: Path, name: Any, sentence: str) -> None:
    what = edited(lambda what: what["images"][0].update(file_name=name))
    with pytest.raises(MlcError, match=f"x.json: .*{sentence}"):
        read_coco_json([write(tmp_path / "x.json", what)])


@pytest.mark.parametrize("name", ["..jpg", "...", "a..b/9.jpg", "写真/猫\u200d 9.jpg"])
def test_odd_file_names_are_fine(tmp_path: Path, name: str) -> None:
    what = edited(lambda what: what["images"][0].update(file_name=name))
    assert read_coco_json([write(tmp_path / "x.json", what)]).file[3] == name


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no images": (lambda what: what.pop("images"), "not COCO annotations, 'images' is missing"),
    "no annotations": (lambda what: what.pop("annotations"), "COCO annotations, 'annotations' is"),
    "no categories": (lambda what: what.pop("categories"), "COCO annotations, 'categories' is"),
    "empty images": (lambda what: what["images"].clear(), "lists no images"),
    "empty annotations": (lambda what: what["annotations"].clear(), "lists no annotations"),
    "unknown image": (
        lambda what: what["annotations"][1].update(image_id=12),
        "annotation 91 names image or category '12', which the file does not list",
    ),
    "unknown category": (
        lambda what: what["annotations"][1].update(category_id=12),
        "annotation 91 names image or category 12, which",
    ),
    "an id twice": (
        lambda what: what["images"].append({"id": "9", "file_name": "x.jpg"}),
        "image id '9' is there twice",
    ),
    "a category id twice": (
        lambda what: what["categories"].append({"id": 3, "name": "owl"}),
        "a category id is there twice",
    ),
    "a class twice": (
        lambda what: what["categories"].append({"id": 4, "name": "apple"}),
        "2 categories are called 'apple'",
    ),
    "ids of two kinds": (
        lambda what: what["categories"].append({"id": "4", "name": "owl"}),
        r"should all be numbers or all be text, got \(7, 3, 5, '4'\)",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_json_that_is_not_cocos_is_refused(tmp_path: Path, name: str) -> None:
    edit, sentence = BROKEN[name]
    with pytest.raises(MlcError, match=f"x.json: .*{sentence}"):
        read_coco_json([write(tmp_path / "x.json", edited(edit))])


def test_no_categories_at_all_are_refused(tmp_path: Path) -> None:
    what = content() | {"categories": []}
    with pytest.raises(MlcError, match=r"x.json: annotation 90 names .* 7, which"):
        read_coco_json([write(tmp_path / "x.json", what)])


@pytest.mark.parametrize("text", ["", "{", "not json", "[" * 200_000])
def test_what_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(MlcError, match=r"x.json: not JSON .*; unpack or export it again"):
        read_coco_json([path])


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MlcError, match=r"no.json: cannot be read \(No such file"):
        read_coco_json([tmp_path / "no.json"])
    with pytest.raises(MlcError, match=r"cannot be read \(Is a directory"):
        read_coco_json([tmp_path])


# As --data


@pytest.mark.parametrize("name", ["photos.json", "photos.JSON", "a,b.json"])
def test_data_takes_a_json(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    images = read_images(DataConfig(data=str(path)))
    assert (images.root, len(images.labels)) == (tmp_path, 3)
    config = DataConfig(data=str(path), root=Path("other"), keep_unlabelled=True)
    images = read_images(config)
    assert (images.root, len(images.labels)) == (Path("other"), 4)


def test_data_takes_several_jsons_in_a_folder_with_a_comma(tmp_path: Path) -> None:
    paths = files(tmp_path / "a,b", [4, 2, 3])
    paths[1] = paths[1].rename(paths[1].with_suffix(".JSON"))
    for between in (",", ", "):
        images = read_images(DataConfig(data=between.join(map(str, paths))))
        assert splits_of(images.labels) == {"": 0, "train": 4, "val": 2, "test": 3}


@pytest.mark.parametrize("name", ["a.json,", "a.json,b.csv", "a.json,coco", "a.json,b"])
def test_jsons_mix_with_nothing_else(name: str) -> None:
    with pytest.raises(MlcError, match=rf"unknown data set '{name}'; .* path of a .csv or .json"):
        read_images(DataConfig(data=name))


def test_data_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_data("coco") == "coco"
    assert absolute_data("x/photos.csv") == str(tmp_path / "x/photos.csv")
    assert absolute_data("a.json,x/b.json") == f"{tmp_path / 'a.json'},{tmp_path / 'x/b.json'}"


# Real annotations


def test_coco_itself_is_read_as_the_data_set_coco_is() -> None:
    root = need("coco-mini")
    paths = [root / f"annotations/instances_{part}2014.json" for part in ("train", "val")]
    wanted, images = read_coco(root), read_coco_json(paths)
    images.check_files()
    assert images.root.samefile(root)
    assert images.labels.classes == wanted.labels.classes
    for name in ("image_id", "file", "split", "observed", "true"):
        np.testing.assert_array_equal(getattr(images.labels, name), getattr(wanted.labels, name))


def test_a_real_json_finds_its_photos() -> None:
    images = read_coco_json([need("coco-native") / "instances.json"])
    assert all((images.root / str(name)).is_file() for name in images.file)
    assert (len(images.file), len(images.labels)) == (74, 73)
    assert images.labels.true.sum(axis=1).sum() / len(images.file) == pytest.approx(3.89, abs=0.005)
