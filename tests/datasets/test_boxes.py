"""Boxes of COCO-format JSON: shares of the image, and what is left out because nobody can say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared import need

from mlc.configs.errors import MlcError
from mlc.datasets.boxes import boxes_below, boxes_of, label_areas, read_boxes
from mlc.datasets.labels import load_labels
from mlc.datasets.prepare import PrepareConfig, prepare
from mlc.datasets.protocol import observe_by_size
from mlc.datasets.source import DataConfig, read_images

IMAGES = [
    {"id": 7, "file_name": "a.jpg", "width": 200, "height": 100},
    {"id": 9, "file_name": "b.jpg", "width": 50, "height": 400},
]
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}]


def annotation(image: int, category: int, *bbox: float, **more: Any) -> dict[str, Any]:
    own = {"id": 1, "image_id": image, "category_id": category, "iscrowd": 0}
    return own | ({"bbox": list(bbox)} if bbox else {}) | more


def write(path: Path, *annotations: dict[str, Any], images: list[dict[str, Any]] = IMAGES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    path.write_text(json.dumps(content))
    return path


def listed(path: Path) -> dict[str, dict[str, list[list[float]]]]:
    return {
        image_id: {name: each.tolist() for name, each in own.items()}
        for image_id, own in read_boxes(path).items()
    }


def test_boxes_are_edges_as_shares_of_width_and_height(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.json",
        annotation(7, 3, 20, 10, 100, 50),
        annotation(7, 3, 0, 0, 200, 100),
        annotation(7, 5, 50, 25, 50, 25),
        annotation(9, 5, 5, 100, 10, 200),
    )
    assert listed(path) == {
        "7": {"cat": [[0.1, 0.1, 0.6, 0.6], [0, 0, 1, 1]], "dog": [[0.25, 0.25, 0.5, 0.5]]},
        "9": {"dog": [[0.1, 0.25, 0.3, 0.75]]},
    }
    assert read_boxes(path)["7"]["cat"].dtype == np.float64


def test_what_reaches_out_of_the_image_is_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", annotation(7, 3, -20, 50, 300, 100))
    assert listed(path)["7"] == {"cat": [[0, 0.5, 1, 1]]}


@pytest.mark.parametrize("other", [{"iscrowd": 1, "bbox": [0, 0, 9, 9]}, {}, {"bbox": []}])
@pytest.mark.parametrize("order", [1, -1])
def test_a_crowd_or_an_object_without_box_leaves_its_class_out_of_that_image(
    tmp_path: Path, other: dict[str, Any], order: int
) -> None:
    pair = [annotation(7, 3, 20, 10, 100, 50), annotation(7, 3, **other)][::order]
    more = annotation(7, 5, 0, 0, 200, 100), annotation(9, 3, 0, 0, 50, 400)
    path = write(tmp_path / "a.json", *pair, *more)
    assert listed(path) == {"7": {"dog": [[0, 0, 1, 1]]}, "9": {"cat": [[0, 0, 1, 1]]}}


@pytest.mark.parametrize(
    "bbox", [(1, 1, -2, 3), (1, 1, 2, -3), (float("nan"), 1, 2, 3), (1, float("inf"), 2, 3)]
)
def test_a_box_that_is_none_is_refused(tmp_path: Path, bbox: tuple[float, ...]) -> None:
    path = write(tmp_path / "a.json", annotation(7, 3, *bbox, id=41))
    with pytest.raises(MlcError, match=r"a.json: annotation 41 has bbox .* width and height \(200"):
        read_boxes(path)


@pytest.mark.parametrize("sides", [{}, {"width": 10}, {"width": 10, "height": 0}])
def test_an_image_without_its_size_is_refused_where_it_has_a_box(
    tmp_path: Path, sides: dict[str, int]
) -> None:
    images = [{"id": 7, "file_name": "a.jpg"} | sides, {"id": 9, "file_name": "b.jpg"}]
    path = write(tmp_path / "a.json", annotation(7, 3, 1, 1, 2, 2), images=images)
    with pytest.raises(MlcError, match="expected pixels, x, y, width, height"):
        read_boxes(path)
    assert listed(write(path, annotation(7, 3), images=images)) == {"7": {}, "9": {}}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"images": []}', '{"categories": [], "images": 3, "annotations": []}']
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(MlcError, match=r"a.json: not COCO annotations"):
        read_boxes(path)
    with pytest.raises(MlcError, match=r"b.json: cannot be read"):
        read_boxes(tmp_path / "b.json")


def test_an_annotation_of_five_numbers_or_of_an_unknown_image_is_refused(tmp_path: Path) -> None:
    for wrong in (annotation(7, 3, 1, 2, 3, 4, 5), annotation(8, 3, 1, 2, 3, 4)):
        with pytest.raises(MlcError, match="not COCO annotations"):
            read_boxes(write(tmp_path / "a.json", wrong))


def test_both_parts_of_coco_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "annotations"
    write(folder / "instances_train2014.json", annotation(7, 3), images=IMAGES[:1])
    write(folder / "instances_val2014.json", annotation(9, 5, 5, 0, 5, 4), images=IMAGES[1:])
    boxes = boxes_of(DataConfig(data="coco", root=tmp_path))
    assert set(boxes) == {"7", "9"}
    assert boxes["9"]["dog"].tolist() == [[0.1, 0, 0.2, 0.01]]


def test_labels_alone_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", annotation(7, 3), annotation(9, 5))
    with pytest.raises(MlcError, match=r"a.json: no annotation has a box, only labels"):
        boxes_of(DataConfig(data=str(path)))


@pytest.mark.parametrize("data", ["voc", "table.csv", "a.json,b.csv"])
def test_other_data_sets_are_refused(data: str) -> None:
    with pytest.raises(MlcError, match=r"data: boxes are read of coco and of COCO-format JSON"):
        boxes_of(DataConfig(data=data))


@pytest.mark.parametrize("second", [7, 8])
def test_ids_are_those_of_the_images_that_are_read(tmp_path: Path, second: int) -> None:
    """Two files that number their images alike have their split before the ids."""
    image = {"width": 10, "height": 10}
    images = [image | {"id": 7, "file_name": "a.jpg"}], [image | {"id": second, "file_name": "b"}]
    train = write(tmp_path / "train.json", annotation(7, 3, 0, 0, 1, 1), images=images[0])
    test = write(tmp_path / "test.json", annotation(second, 3, 0, 0, 2, 2), images=images[1])
    config = DataConfig(data=f"{train},{test}", root=tmp_path)
    boxes = boxes_of(config)
    ids = read_images(config).image_id.tolist()
    assert list(boxes) == ids
    assert [boxes[each]["cat"][0, 3] for each in ids] == [0.1, 0.2]


def test_boxes_of_a_folder_go_by_the_files_below_it(tmp_path: Path) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    images = [IMAGES[0] | {"file_name": "in/a.jpg"}, IMAGES[1] | {"file_name": "out/b.jpg"}]
    annotations = annotation(7, 3, 0, 0, 20, 10), annotation(9, 3, 0, 0, 5, 5)
    path = write(tmp_path / "a.json", *annotations, images=images)
    config = DataConfig(data=str(path))
    assert list(boxes_below(config, tmp_path)) == ["in/a.jpg", "out/b.jpg"]
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for folder in (tmp_path / "in", tmp_path / "out" / ".." / "in", tmp_path / "link"):
        found = boxes_below(config, folder)
        assert list(found) == ["a.jpg"]
        assert found["a.jpg"]["cat"].tolist() == [[0, 0, 0.1, 0.1]]


def test_real_boxes_are_of_every_label_but_those_with_a_crowd() -> None:
    config = DataConfig(data=str(need("coco-native/instances.json")))
    boxes, labels = boxes_of(config), read_images(config).labels
    content = json.loads(Path(config.data).read_text())
    crowds = {
        (str(each["image_id"]), each["category_id"])
        for each in content["annotations"]
        if each["iscrowd"]
    }
    assert sum(map(len, boxes.values())) == labels.targets().sum() - len(crowds)
    every = np.concatenate([each for own in boxes.values() for each in own.values()])
    assert every.min() >= 0
    assert every.max() <= 1
    assert (every[:, :2] <= every[:, 2:]).all()


def test_areas_are_those_of_all_boxes_of_a_class(tmp_path: Path) -> None:
    path = write(
        tmp_path / "instances.json",
        annotation(7, 3, 0, 0, 100, 50),
        annotation(7, 3, 0, 0, 20, 100),
        annotation(7, 5, 0, 0, 50, 50, iscrowd=1),
        annotation(9, 5, 0, 0, 500, 40),
    )
    config = DataConfig(data=str(path), root=tmp_path)
    areas = label_areas(config, read_images(config).labels)
    np.testing.assert_allclose(areas, [[0.35, 0.125], [0, 0.1]])


def test_a_positive_without_a_box_has_no_size(tmp_path: Path) -> None:
    path = write(tmp_path / "instances.json", annotation(7, 3, 0, 0, 9, 9), annotation(9, 5))
    config = DataConfig(data=str(path), root=tmp_path)
    with pytest.raises(MlcError, match=r"'9' has a 'dog' without a box"):
        label_areas(config, read_images(config).labels)


def test_labels_by_size_are_prepared_from_annotations() -> None:
    path = sorted(need("coco-native").rglob("instances*.json"))[0]
    config = DataConfig(data=str(path), root=path.parent)
    true = read_images(config).labels.true
    assert true is not None
    areas = label_areas(config, read_images(config).labels)
    assert (areas[~true] == 0).all()
    assert (areas[true] > 0).all()
    observed = observe_by_size(true, areas)
    np.testing.assert_array_equal(observed.sum(axis=1), true.any(axis=1))
    assert areas[observed == 1].mean() > areas[true].mean()


def test_prepare_writes_labels_by_size(tmp_path: Path) -> None:
    parts = []
    for name in ("train", "val", "test"):
        images = [{"id": 7, "file_name": f"{name}.jpg", "width": 200, "height": 100}]
        large, small = annotation(7, 5, 0, 0, 200, 100), annotation(7, 3, 0, 0, 0, 0)
        parts.append(write(tmp_path / f"{name}.json", large, small, images=images))
    config = PrepareConfig(
        data=",".join(map(str, parts)),
        root=tmp_path,
        labels="single-positive-by-size",
        out=tmp_path / "sized.npz",
    )
    table = prepare(config)[1]
    np.testing.assert_array_equal(table.observed, [[0, 1]] * 3)
    np.testing.assert_array_equal(load_labels(tmp_path / "sized.npz").observed, table.observed)
