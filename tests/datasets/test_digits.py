"""Digits: what is drawn, which glyphs go where, and that a half-drawn folder is drawn again."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from mlc.configs.errors import MlcError
from mlc.datasets import digits
from mlc.datasets.digits import CELL_PX, GLYPH_PX, IMAGES, SIZE_PX, draw, read_digits

FEW = {"train": 6, "val": 3, "test": 4}
BUNCH = load_digits()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "IMAGES", FEW)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[set[bytes]]:
    """Record for each picture the glyphs that it was drawn from."""
    pools: list[set[bytes]] = []

    def spy(glyphs, *rest):
        pools.append({glyph.tobytes() for glyph in glyphs})
        return draw(glyphs, *rest)

    monkeypatch.setattr(digits, "draw", spy)
    return pools


def pictures(count: int, seed: int = 0) -> list[tuple[np.ndarray, list[int]]]:
    generator = np.random.default_rng(seed)
    drawings = (draw(BUNCH.images, BUNCH.target, generator) for _ in range(count))
    return [(np.asarray(image), labels) for image, labels in drawings]


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_picture_is_square_grey_and_has_one_to_four_sorted_labels() -> None:
    sizes = set()
    for image, labels in pictures(60):
        assert image.shape == (SIZE_PX, SIZE_PX, 3)
        assert (image == image[..., :1]).all()
        assert labels == sorted(set(labels))
        assert set(labels) <= set(range(10))
        sizes.add(len(labels))
    assert sizes == {1, 2, 3, 4}


def solid(count: int) -> np.ndarray:
    return np.full((count, 8, 8), 16.0)


def test_each_glyph_lies_in_a_quarter_of_its_own() -> None:
    generator = np.random.default_rng(1)
    filled = []
    for _ in range(40):
        image, _ = draw(solid(1), np.array([0]), generator)
        ink = np.asarray(image)[..., 0] == 255
        quarters = ink.reshape(2, CELL_PX, 2, CELL_PX).sum(axis=(1, 3))
        sides = np.sqrt(quarters[quarters > 0])
        assert (sides == sides.round()).all()  # a whole square: nothing is cut or painted over
        assert ((sides >= GLYPH_PX[0]) & (sides <= GLYPH_PX[1])).all()
        filled.append(len(sides))
    assert set(filled) == {1, 2, 3, 4}


def test_labels_are_the_digits_of_the_glyphs_that_were_drawn() -> None:
    ink = np.arange(1, 6)[:, None, None] * np.full((5, 8, 8), 3.0)
    generator = np.random.default_rng(2)
    shades = {int(value): digit for digit, value in enumerate(ink[:, 0, 0] * 255 / 16)}
    for _ in range(40):
        image, labels = draw(ink, np.arange(5), generator)
        seen = set(np.unique(np.asarray(image)).tolist()) - {0}
        assert {shades[each] for each in seen} == set(labels)


def test_the_same_generator_draws_the_same_pictures_and_another_others() -> None:
    first, again, other = pictures(3), pictures(3), pictures(3, seed=1)
    for (image, labels), (same, same_labels) in zip(first, again, strict=True):
        np.testing.assert_array_equal(image, same)
        assert labels == same_labels
    assert any((a != b).any() for (a, _), (b, _) in zip(first, other, strict=True))


def test_the_full_set_is_as_large_as_promised() -> None:
    assert IMAGES == {"train": 1200, "val": 300, "test": 500}


@pytest.mark.usefixtures("few")
def test_the_table_lists_each_picture_with_its_split(tmp_path: Path) -> None:
    images = read_digits(tmp_path)
    table = images.labels
    assert {name: len(table.part(name)) for name in FEW} == FEW
    assert (table.dataset, table.true is not None) == ("digits", True)
    assert set(table.classes) <= set("0123456789")
    for file, split in zip(table.file, table.split, strict=True):
        assert file.startswith(f"{split}/")
        with Image.open(tmp_path / file) as image:
            assert (image.size, image.mode) == ((SIZE_PX, SIZE_PX), "RGB")


@pytest.mark.usefixtures("few")
def test_no_glyph_is_on_both_sides_of_the_test_split(tmp_path: Path, drawn: list) -> None:
    read_digits(tmp_path)
    seen = FEW["train"] + FEW["val"]
    train, test = set().union(*drawn[:seen]), set().union(*drawn[seen:])
    assert len(drawn) == sum(FEW.values())
    assert not train & test
    assert (len(train), len(test)) == (1197, 600)


@pytest.mark.usefixtures("few")
def test_test_pictures_show_only_the_last_glyphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end: the first glyphs are painted in half ink, the last 600 in full."""
    images = np.full_like(BUNCH.images, 8.0)
    images[-600:] = 16.0
    painted = type(BUNCH)(images=images, target=BUNCH.target)
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: painted)
    for file in read_digits(tmp_path).file:
        shades = set(np.unique(np.asarray(Image.open(tmp_path / file)))) - {0}
        assert shades == ({255} if file.startswith("test/") else {127}), file


@pytest.mark.usefixtures("few")
def test_two_folders_hold_the_same_bytes(tmp_path: Path) -> None:
    read_digits(tmp_path / "one")
    read_digits(tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.usefixtures("few")
def test_a_second_read_draws_nothing(tmp_path: Path, drawn: list) -> None:
    first = read_digits(tmp_path)
    drawn.clear()
    second = read_digits(tmp_path)
    assert not drawn
    np.testing.assert_array_equal(first.labels.observed, second.labels.observed)


@pytest.mark.usefixtures("few")
def test_drawing_that_was_interrupted_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def stop_at_the_eighth(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return draw(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(digits, "draw", stop_at_the_eighth)
        with pytest.raises(KeyboardInterrupt):
            read_digits(tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    read_digits(tmp_path / "stopped")
    read_digits(tmp_path / "whole")
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_somebody_elses_folder_is_not_drawn_into(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"mine")
    with pytest.raises(MlcError, match="name an empty folder with --root"):
        read_digits(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_a_table_without_its_pictures_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / digits.TABLE).write_text("file,labels,split\ntrain/0000.png,3,train\n")
    with pytest.raises(MlcError, match=r"not one of the 1 listed images is there"):
        read_digits(tmp_path).check_files()
