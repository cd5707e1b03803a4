"""Pictures of attention: what is shown, where and in which colour; and the table of hits."""

from pathlib import Path

import numpy as np
import pytest
from colour_model import colour_backbone, model_of, write_photo
from PIL import Image, ImageFont

from mlc.cli import main
from mlc.configs.errors import MlcError
from mlc.extract.backbone import Backbone
from mlc.report.attention import (
    DIMMED,
    MARGIN_PX,
    PANEL_PX,
    TITLE_PX,
    draw_attention,
    pointing_note,
    pointing_records,
    print_pointing,
    seen_by,
    write_attention,
)

GREY = Image.new("RGB", (160, 80), (100, 100, 100))
DIM = round(100 * DIMMED)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return colour_backbone()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos, one of them broken."""
    photos = tmp_path / "photos"
    write_photo(photos / "a.png", {"red": (1, 2), "green": (3, 0)}, (640, 320))
    write_photo(photos / "deep" / "a.png", {"blue": (0, 0)}, (100, 200))
    (photos / "c.jpg").write_bytes(b"no image")
    return photos


def peaked(row: int, column: int, share: float = 1.0) -> np.ndarray:
    """A map (4, 4) with a share in one cell, and the rest even."""
    map_ = np.full((4, 4), (1 - share) / 15, dtype=np.float32)
    map_[row, column] = share
    return map_


def panel(picture: Image.Image, index: int, width: int = 160) -> np.ndarray:
    """One panel (height, width, 3) without its title; 0 is the photo."""
    left = index * (width + MARGIN_PX)
    return np.asarray(picture)[TITLE_PX:, left : left + width].astype(int)


def test_the_photo_is_shown_as_it_is_beside_its_maps() -> None:
    picture = draw_attention(GREY, {"cat 0.9": peaked(0, 0), "dog 0.1": peaked(3, 3)})
    assert picture.size == (3 * 160 + 2 * MARGIN_PX, 80 + TITLE_PX)
    assert (panel(picture, 0) == 100).all()


def test_colour_and_ring_are_at_the_peak() -> None:
    heated = panel(draw_attention(GREY, {"cat": peaked(1, 2)}), 1)
    x, y = 100, 30  # the centre of the cell in 160 x 80 pixels
    red, green, blue = heated[y, x]
    assert red > green > blue  # yellow
    assert red > 200
    assert (heated[y, x - 7] > 240).all()  # the ring, white
    assert (heated[:, :50] == DIM).all()
    assert (heated[60:] == DIM).all()


def test_an_even_map_has_no_colour_anywhere() -> None:
    heated = panel(draw_attention(GREY, {"cat": peaked(0, 0, 1 / 16)}), 1)
    assert (heated[:, 40:] == DIM).all()
    assert heated[30, 20].max() == DIM


def test_a_faint_peak_is_fainter_than_a_clear_one() -> None:
    reds = []
    for share in (1.5 / 16, 2 / 16, 3 / 16):
        heated = panel(draw_attention(GREY, {"cat": peaked(1, 2, share)}), 1)
        reds.append(heated[30, 100, 0])
    assert reds == sorted(set(reds))


def test_boxes_are_drawn_on_the_map_of_their_class_alone() -> None:
    maps = {"cat": peaked(0, 0), "dog": peaked(0, 0)}
    boxes = [np.zeros((0, 4)), np.array([[0.5, 0.5, 1, 1], [0.25, 0.25, 0.5, 0.375]])]
    picture = draw_attention(GREY, maps, boxes)
    lime = [(panel(picture, index) == (0, 255, 0)).all(axis=-1) for index in (0, 1, 2)]
    assert not lime[0].any()
    assert not lime[1].any()
    rows, columns = np.nonzero(lime[2])
    assert (rows.max(), columns.max()) == (79, 159)
    assert (rows.min(), columns.min()) == (20, 40)
    assert lime[2][40, 80:160].all()  # the upper edge of the first box


def test_a_long_title_keeps_the_probability() -> None:
    short, long = (
        draw_attention(GREY, {f"{name} 0.98": peaked(0, 0)}) for name in ("cat", "cat" * 30)
    )
    assert short.size == long.size
    titles = [np.asarray(each)[:TITLE_PX, 166:] for each in (short, long)]
    assert (titles[1][:, -8:] < 128).any()  # it is cut to the panel's width, not at its start
    assert not (titles[0][:, -60:] < 128).any()
    assert ImageFont.load_default(15).getlength("cat" * 30) > 160


def test_a_photo_is_seen_squashed_and_stretched_back(backbone: Backbone, folder: Path) -> None:
    seen = seen_by(model_of(backbone), folder / "a.png")
    assert seen.size == (PANEL_PX, PANEL_PX // 2)
    pixels = np.asarray(seen).astype(int)
    assert pixels[60, 200].tolist() == [255, 0, 0]  # cell (1, 2) of 4 x 4
    assert seen_by(model_of(backbone), folder / "deep" / "a.png").size == (160, 320)
    # 64 pixels are a fifth of 320: the edge of a square is soft.
    assert 20 < pixels[60, 160, 0] < 235
    np.testing.assert_array_equal(
        seen_by(model_of(backbone, "flip"), folder / "a.png"), seen
    )  # turned back


def test_a_picture_for_each_image_that_can_be_read(
    backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    written, bad = write_attention(model_of(backbone), folder, out, top=2)
    assert (written, list(bad)) == (2, ["c.jpg"])
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    assert found == ["a.png.png", "deep/a.png.png"]
    with Image.open(out / "a.png.png") as picture:
        assert picture.size == (3 * PANEL_PX + 2 * MARGIN_PX, PANEL_PX // 2 + TITLE_PX)


def shown_peaks(path: Path, panels: int) -> list[tuple[int, int]]:
    """Return the cells that the heat of each map of a 320 x 160 picture is in."""
    with Image.open(path) as picture:
        heated = [panel(picture, 1 + index, PANEL_PX) for index in range(panels)]
    cells = [each.reshape(4, 40, 4, 80, 3).mean(axis=(1, 3)) for each in heated]
    return [divmod(int((each[..., 0] + each[..., 1]).argmax()), 4) for each in cells]


def test_labels_are_the_most_probable_or_those_that_are_asked_for(
    backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    write_photo(folder / "a.png", {"green": (3, 0), "red": (1, 2)}, (640, 320))
    model = model_of(backbone)
    write_attention(model, folder, tmp_path / "best", top=2)
    assert shown_peaks(tmp_path / "best" / "a.png.png", 2) == [(1, 2), (3, 0)]  # a tie: red first
    write_attention(model, folder, tmp_path / "asked", ["green"])
    with Image.open(tmp_path / "asked" / "a.png.png") as picture:
        assert picture.width == 2 * PANEL_PX + MARGIN_PX
    assert shown_peaks(tmp_path / "asked" / "a.png.png", 1) == [(3, 0)]
    with pytest.raises(MlcError, match="unknown class 'zebra'"):
        write_attention(model, folder, tmp_path / "none", ["zebra"])


@pytest.mark.parametrize("below", ["", "maps", "deep/maps"])
def test_pictures_do_not_go_among_the_photos(backbone: Backbone, folder: Path, below: str) -> None:
    with pytest.raises(MlcError, match=r"is within .*photos, whose photos are drawn"):
        write_attention(model_of(backbone), folder, folder / below)


@pytest.mark.parametrize(
    "flags", [["--top", "2"], ["--out", "maps"], ["--images", "photos", "--split", "all"]]
)
def test_flags_that_do_not_go_together_are_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["attention", "run", *flags])
    assert "error: attention: " in capsys.readouterr().err


@pytest.mark.parametrize("view", ["orig", "flip", "top-left"])
def test_boxes_lie_on_what_the_view_shows(
    backbone: Backbone, folder: Path, tmp_path: Path, view: str
) -> None:
    boxes = {"a.png": {"green": np.array([[0.0, 0.4375, 0.4375, 0.875]])}}
    write_attention(model_of(backbone, view), folder, tmp_path / "out", ["green"], boxes=boxes)
    with Image.open(tmp_path / "out" / "a.png.png") as picture:
        lime = (panel(picture, 1, PANEL_PX) == (0, 255, 0)).all(axis=-1)
    rows, columns = np.nonzero(lime)
    want = (0.5, 1, 0.5) if view == "top-left" else (0.4375, 0.875, 0.4375)
    got = rows.min() / 159, rows.max() / 159, columns.max() / 319
    assert got == pytest.approx(want, abs=0.01)


RESULT = {
    "pointing": 50.0,
    "random": 25.0,
    "centre": 30.0,
    "labels": 1200,
    "images": 70,
    "grid": [7, 8],
    "over_centre": (-2.0, 42.04),
    "class_mean": {"pointing": 51.0, "random": 26.0, "centre": 31.0},
    "per_class": {
        "cat": {"labels": 10, "pointing": 60.0, "random": 20.0, "centre": 40.0},
        "dog": {"labels": 1190, "pointing": 42.04, "random": 32.0, "centre": 22.0},
    },
}


def test_the_table_has_classes_by_their_labels_and_the_means_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = pointing_records(RESULT)
    assert [tuple(record.values()) for record in records] == [
        ("dog", "1,190", "42.0", "22.0", "32.0"),
        ("cat", "10", "60.0", "40.0", "20.0"),
        ("mean of labels", "1,200", "50.0", "30.0", "25.0"),
        ("mean of classes", "", "51.0", "31.0", "26.0"),
    ]
    assert list(records[0]) == ["class", "labels", "pointing", "centre", "random"]
    assert pointing_note(RESULT).startswith("1,200 labels with boxes in 70 images, 7 x 8 cells.")
    assert "minus centre: -2.0 to +42.0, 95 % interval" in pointing_note(RESULT)
    assert "minus centre" not in pointing_note(RESULT | {"over_centre": None})
    print_pointing(RESULT)
    printed = capsys.readouterr().out
    assert "mean of classes" in printed
    assert pointing_note(RESULT) in printed
