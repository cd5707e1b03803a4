"""Attention on the photo: peaks that are known, through every view, and hits counted by hand."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from colour_model import CELLS, CLASSES, ColourHead, colour_backbone, model_of, write_photo
from PIL import Image
from torch import Tensor, nn

from mlc.configs.errors import MlcError
from mlc.datasets.source import DataConfig
from mlc.extract.backbone import Backbone
from mlc.extract.views import VIEWS
from mlc.models.attention import (
    are_inside,
    attention_maps,
    cell_centres,
    peak_of,
    point_on_images,
    pointing_game,
    upright,
)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return colour_backbone()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two photos of other shapes, and a broken one between them."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    squares = {"red": (1, 2), "green": (3, 0), "blue": (2, 3)}
    return [
        write_photo(tmp_path / "a.png", squares, (320, 80)),
        broken,
        write_photo(tmp_path / "b.png", {"red": (0, 0)}, (100, 160)),
    ]


def box(*edges: float) -> np.ndarray:
    return np.array(edges, dtype=np.float64).reshape(-1, 4)


def test_maps_are_shares_on_the_grid_and_peak_where_the_colour_is(
    backbone: Backbone, files: list[Path]
) -> None:
    batches = list(attention_maps(model_of(backbone), files))
    assert [row for batch in batches for row in batch.rows] == [0, 1, 2]
    maps = np.concatenate([batch.maps for batch in batches])
    assert (maps.shape, maps.dtype) == ((3, 3, CELLS, CELLS), np.float32)
    np.testing.assert_allclose(maps.sum(axis=(2, 3)), 1, atol=1e-5)
    assert [peak_of(map_) for map_ in maps[0]] == [(1, 2), (3, 0), (2, 3)]
    assert peak_of(maps[2, 0]) == (0, 0)
    errors = [error for batch in batches for error in batch.error]
    assert [bool(error) for error in errors] == [False, True, False]
    assert "not an image" in errors[1]
    probs = np.concatenate([batch.probs for batch in batches])
    np.testing.assert_allclose(probs[0], 1 / (1 + np.exp(-10 / 16)), atol=0.01)
    np.testing.assert_allclose(probs[2, 1:], 0.5, atol=1e-6)


@pytest.mark.parametrize("view", VIEWS)
def test_whatever_the_view_a_peak_is_on_its_place_of_the_photo(
    backbone: Backbone, files: list[Path], view: str
) -> None:
    (batch,) = attention_maps(model_of(backbone, view), files[:1])
    centres = cell_centres((CELLS, CELLS), VIEWS[view])
    for map_, want in zip(batch.maps[0], ((0.625, 0.375), (0.125, 0.875)), strict=False):
        found = centres[peak_of(map_)]
        # A crop's cells are 7/32 of a side and lie otherwise than the photo's quarters.
        assert np.abs(found - want).max() <= (0 if VIEWS[view].crop is None else 0.11)


@pytest.mark.parametrize("view", [name for name in VIEWS if VIEWS[name].turn])
def test_a_map_is_turned_back_as_its_view_was_turned(view: str) -> None:
    maps = np.random.default_rng(0).random((2, 3, 5, 5))
    turn = VIEWS[view].turn
    turned = np.array([[turn(map_[..., None])[..., 0] for map_ in own] for own in maps])
    assert not np.array_equal(turned, maps)
    np.testing.assert_array_equal(upright(turned, VIEWS[view]), maps)


def test_cells_of_a_crop_lie_in_what_it_shows() -> None:
    centres = cell_centres((2, 1), VIEWS["bottom-right"])  # the photo but an eighth at two sides
    np.testing.assert_allclose(centres[:, 0, 0], 1 / 8 + 7 / 16)
    np.testing.assert_allclose(centres[:, 0, 1], [1 / 8 + 7 / 32, 1 / 8 + 3 * 7 / 32])


def test_a_point_on_the_edge_is_inside_and_one_box_is_enough() -> None:
    boxes = box(0.2, 0.4, 0.5, 0.6, 0.8, 0.8, 1, 1)
    points = [(0.2, 0.4), (0.5, 0.6), (0.3, 0.5), (0.9, 0.9)]
    outside = [(0.19, 0.5), (0.51, 0.5), (0.3, 0.39), (0.3, 0.61), (0.9, 0.5), (0.4, 0.9)]
    assert are_inside(np.array(points), boxes).tolist() == [True] * 4
    assert are_inside(np.array(outside), boxes).tolist() == [False] * 6
    assert are_inside(np.array([points[0], outside[0]]).reshape(2, 1, 2), boxes).shape == (2, 1)
    assert not are_inside(np.array(points[0]), np.zeros((0, 4)))


GAME = [
    {
        "red": box(0.625, 0.375, 0.9, 0.9),  # hit, on its corner; 2 x 3 cells; not the centre
        "green": box(0, 0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6),  # no hit; 1 cell; the centre
        "zebra": box(0, 0, 1, 1),  # the run does not know it
    },
    {"red": box(0, 0, 1, 1)},  # of the photo that is broken
    {"red": box(0, 0, 1, 1)},  # hit; all cells; the centre
]


@pytest.mark.parametrize("view", ["orig", "flip", "rot90"])
def test_hits_are_counted_by_hand(backbone: Backbone, files: list[Path], view: str) -> None:
    result, bad = pointing_game(model_of(backbone, view), files, GAME)
    assert list(bad) == [1]
    assert {name: result[name] for name in ("labels", "images", "grid")} == {
        "labels": 3,
        "images": 2,
        "grid": [CELLS, CELLS],
    }
    every = {"pointing": 200 / 3, "random": 100 * (6 + 1 + 16) / 16 / 3, "centre": 200 / 3}
    red = {"pointing": 100, "random": 100 * (6 + 16) / 16 / 2, "centre": 50}
    green = {"pointing": 0, "random": 100 / 16, "centre": 100}
    assert {name: result[name] for name in every} == pytest.approx(every)
    assert list(result["per_class"]) == ["green", "red"]
    assert result["per_class"]["red"] == pytest.approx(red | {"labels": 2})
    assert result["per_class"]["green"] == pytest.approx(green | {"labels": 1})
    assert result["class_mean"] == pytest.approx(
        {name: (red[name] + green[name]) / 2 for name in red}
    )
    # Pointing minus centre is 100 and -100 in the first photo, 0 in the other; its mean is 0.
    assert result["over_centre"] == pytest.approx((0, 0))
    json.dumps(result)


def test_the_interval_takes_the_labels_of_an_image_together(
    backbone: Backbone, files: list[Path]
) -> None:
    hit, missed = box(0.6, 0.3, 0.7, 0.4), box(0.4, 0.4, 0.6, 0.6)
    boxes = [{"red": hit, "green": box(0.1, 0.8, 0.2, 0.9)}, {"red": missed}]
    result, _ = pointing_game(model_of(backbone), [files[0], files[2]], boxes)
    # 100 and 100 in one photo and -100 in the other: mean 100 / 3, sums of the rest +-400 / 3.
    half = 1.96 * (2 * 2 * (400 / 3) ** 2) ** 0.5 / 3
    assert result["over_centre"] == pytest.approx((100 / 3 - half, 100 / 3 + half))
    alone, _ = pointing_game(model_of(backbone), files[:1], boxes[:1])
    assert alone["over_centre"] is None


def test_a_peak_beside_the_box_is_no_hit(backbone: Backbone, files: list[Path]) -> None:
    for edge, pointing in ((0.625, 100), (0.626, 0)):
        boxes = [{"red": box(edge, 0, 1, 1)}]
        result, _ = pointing_game(model_of(backbone), files[:1], boxes)
        assert result["pointing"] == pointing


def test_nothing_to_point_at_is_refused(backbone: Backbone, files: list[Path]) -> None:
    for boxes in ({}, {"zebra": box(0, 0, 1, 1)}):
        with pytest.raises(MlcError, match=r"runs/made: no class of the run has a box in any of 1"):
            pointing_game(model_of(backbone), files[:1], [boxes])
    with pytest.raises(MlcError, match="1 of them bad"):
        pointing_game(model_of(backbone), files[1:2], GAME[1:2])


def test_a_head_without_attention_is_refused(backbone: Backbone, files: list[Path]) -> None:
    model = model_of(backbone, head=nn.Linear(3, 3))
    with pytest.raises(MlcError, match=r"runs/made: head attention-pool looks at no part"):
        next(attention_maps(model, files))


def test_tokens_without_a_grid_are_refused(backbone: Backbone, files: list[Path]) -> None:
    with pytest.raises(MlcError, match=r"the tokens of layer layer4 form no grid"):
        next(attention_maps(model_of(backbone, grids={}), files))


def write_json(folder: Path, split: str, name: str, boxes: Mapping[str, list[float]]) -> Path:
    """Write the annotations of one photo, its boxes in pixels by class; one is a crowd."""
    category = {each: index for index, each in enumerate((*CLASSES, "zebra"))}
    annotations = [
        {"id": 1, "image_id": 5, "category_id": category[each], "bbox": own, "iscrowd": 0}
        for each, own in boxes.items()
    ]
    annotations[-1]["iscrowd"] = 1
    with Image.open(folder / name) as photo:
        width, height = photo.size
    image = {"id": 5, "file_name": name, "width": width, "height": height}
    categories = [{"id": index, "name": each} for each, index in category.items()]
    path = folder / f"{split}.json"
    content = {"images": [image], "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path


def test_a_split_of_a_data_set_with_boxes(backbone: Backbone, files: list[Path]) -> None:
    folder = files[0].parent
    # Red peaks at (0.625, 0.375) of 320 x 80 pixels: (200, 30).
    boxes = {"red": [190, 20, 20, 20], "green": [0, 0, 320, 60], "blue": [0, 0, 320, 80]}
    test = write_json(folder, "test", "a.png", boxes)
    train = write_json(folder, "train", "b.png", {"red": [50, 80, 50, 80], "zebra": [0, 0, 1, 1]})
    config = DataConfig(data=f"{train},{test}")
    model = model_of(backbone)
    result, bad = point_on_images(model, config)
    assert not bad
    assert {name: own["pointing"] for name, own in result["per_class"].items()} == {
        "red": 100,
        "green": 0,
    }
    result, _ = point_on_images(model, config, "all")
    assert (result["images"], result["per_class"]["red"]["labels"]) == (2, 2)
    assert result["per_class"]["red"]["pointing"] == 50


def test_a_photo_that_is_gone_is_named(backbone: Backbone, files: list[Path]) -> None:
    folder = files[0].parent
    boxes = {"red": [0.0, 0, 100, 160], "zebra": [0.0, 0, 1, 1]}
    paths = [write_json(folder, name, f"{name[0]}.png", boxes) for name in ("a", "b")]
    files[2].unlink()
    result, bad = point_on_images(
        model_of(backbone), DataConfig(data=",".join(map(str, paths))), "all"
    )
    assert (list(bad), result["images"]) == (["b.png"], 1)


def test_an_unknown_split_is_refused(backbone: Backbone) -> None:
    with pytest.raises(MlcError, match="split"):
        point_on_images(model_of(backbone), DataConfig(data="nowhere.json"), "tset")


def test_probabilities_are_of_the_mean_of_the_logits_of_all_views(
    backbone: Backbone, files: list[Path]
) -> None:
    class LeftHalf(ColourHead):
        def forward(self, tokens: Tensor) -> Tensor:
            left = tokens.unflatten(1, (CELLS, CELLS))[:, :, : CELLS // 2]
            return 8 * left.flatten(1, 2).mean(dim=1)

    model = model_of(backbone, head=LeftHalf())
    two = replace(model.backbone, key=replace(model.backbone.key, views=("orig", "flip")))
    (batch,) = attention_maps(replace(model, backbone=two), files[:1])
    # Red is in the right half: in one of the views alone, an eighth of what the head looks at.
    want = torch.tensor(8 / 8 / 2).sigmoid().item()
    np.testing.assert_allclose(batch.probs[0], want, atol=0.01)
    assert peak_of(batch.maps[0, 0]) == (1, 2)
