"""Augmentation: the released operations bit for bit, drawn as often as they should be."""

import random as global_random
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pictures
import pytest
from numpy.typing import NDArray
from PIL import Image

from mlc.configs.errors import MlcError
from mlc.extract.images import INTERPOLATIONS, squash
from mlc.extract.views import VIEWS, Squares
from mlc.finetune import augment as module
from mlc.finetune.augment import (
    OPERATIONS,
    AugmentConfig,
    Operation,
    apply_rand_augment,
    augment,
    check_augment,
    cut_out,
)

S = 40
ALL = AugmentConfig(flip=True, rand_augment=True, cutout=0.5)

# CRC32 of the pixels at each magnitude, 1 to 9, and with both signs where there are two: what the
# package randaugment 1.0.2 makes of ``small_image``, with Pillow 10.1 as with 13.0.
OF_RANDAUGMENT = {
    "Invert": 0xA31EED29,
    "Cutout": 0x1329E0E3,
    "Sharpness": 0xB1BD4148,
    "AutoContrast": 0xF296522F,
    "Posterize": 0x4C4275AC,
    "ShearX": 0xD2FDE116,
    "TranslateX": 0x6A5F6A1F,
    "TranslateY": 0x66C11AB7,
    "ShearY": 0xC083BA91,
    "Rotate": 0xB82A8951,
    "Equalize": 0xD7EFB1D3,
    "Contrast": 0xCF9B4131,
    "Color": 0x2FE1EBE5,
    "Solarize": 0xFD076928,
    "Brightness": 0x8011091C,
}


def small_image() -> Image.Image:
    """(24, 32), without symmetry, and no channel reaches 0 or 255."""
    y, x = np.mgrid[:24, :32]
    channels = [20 + 6 * x, 230 - 5 * y - x, 30 + (x * y) % 190]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image)


def drawn(seed: int, config: AugmentConfig, size_px: int = S) -> NDArray[np.uint8]:
    return augment(pictures.photo(), size_px, "bilinear", config, np.random.default_rng(seed))


def values(operation: Operation, magnitude: int) -> list[float]:
    value = operation.value(magnitude)
    return [-value, value] if operation.signed else [value]


def record_operations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Return a list that gets the name and value of each operation, which then does nothing."""
    applied: list[tuple[str, float]] = []
    for name, operation in OPERATIONS.items():

        def spy(
            image: Image.Image, value: float, _: np.random.Generator, name: str = name
        ) -> Image.Image:
            applied.append((name, value))
            return image

        spied = Operation(spy, operation.low, operation.high, operation.signed)
        monkeypatch.setitem(OPERATIONS, name, spied)
    return applied


# --- everything off ------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(64, 50), (30, 70), (S, S), (1, 1)])
def test_with_everything_off_it_is_what_extraction_sees(
    size: tuple[int, int], interpolation: str
) -> None:
    shown = pictures.photo(*size)
    got = augment(shown, S, interpolation, AugmentConfig(), np.random.default_rng(0))
    want = squash(shown, Squares(S, interpolation), VIEWS["orig"])
    assert got.shape == (S, S, 3)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, want)


def test_nothing_is_drawn_for_what_is_off() -> None:
    random = np.random.default_rng(0)
    augment(pictures.photo(), S, "bilinear", AugmentConfig(), random)
    assert random.random() == np.random.default_rng(0).random()


# --- determinism ---------------------------------------------------------------------------------


def test_a_generator_decides_all_whatever_the_threads_do() -> None:
    alone = [drawn(seed, ALL) for seed in range(96)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: drawn(seed, ALL), reversed(range(96))))
    np.testing.assert_array_equal(together[::-1], alone)
    assert len({square.tobytes() for square in alone}) == 96


def test_the_programs_random_numbers_are_neither_used_nor_changed() -> None:
    got = []
    for seed in (0, 1):
        global_random.seed(seed)
        np.random.seed(seed)
        before = global_random.getstate(), np.random.get_state()[1].tolist()
        got.append(np.stack([drawn(each, ALL) for each in range(24)]))
        assert (global_random.getstate(), np.random.get_state()[1].tolist()) == before
    np.testing.assert_array_equal(*got)


def test_the_image_is_left_as_it_is() -> None:
    shown = pictures.photo(S, S)  # of the square's size: there is nothing to resize
    before = shown.tobytes()
    for seed in range(24):
        augment(shown, S, "bilinear", ALL, np.random.default_rng(seed))
    assert shown.tobytes() == before


@pytest.mark.parametrize("size_px", [1, 2, 7, 64])
def test_squares_of_any_size_are_augmented(size_px: int) -> None:
    for seed in range(64):
        got = drawn(seed, ALL, size_px)
        assert got.shape == (size_px, size_px, 3)
        assert got.dtype == np.uint8


# --- flip ----------------------------------------------------------------------------------------


def test_half_of_the_images_are_the_stores_flip_view() -> None:
    upright, mirrored = drawn(0, AugmentConfig()), np.fliplr(drawn(0, AugmentConfig()))
    squares = [drawn(seed, AugmentConfig(flip=True)) for seed in range(400)]
    flips = sum(np.array_equal(square, mirrored) for square in squares)
    assert flips + sum(np.array_equal(square, upright) for square in squares) == 400
    assert 160 <= flips <= 240  # 4 standard deviations


# --- cutout --------------------------------------------------------------------------------------


def hole(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int]:
    """Return (left, upper, right, lower) of the changed pixels, which are a box of one colour."""
    changed = (pixels(before) != pixels(after)).any(axis=-1)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    left, upper, right, lower = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    inside = pixels(after)[upper:lower, left:right].reshape(-1, 3)
    assert (inside == inside[0]).all()
    assert changed[upper:lower, left:right].mean() > 0.9  # a pixel may have had the colour before
    return int(left), int(upper), int(right), int(lower)


def holes(share: float, count: int) -> list[tuple[int, int, int, int]]:
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(S, S, 3), dtype=np.uint8))
    return [hole(image, cut_out(image, share, np.random.default_rng(n))) for n in range(count)]


@pytest.mark.parametrize(("share", "half"), [(0.5, 10), (0.49, 9), (0.25, 5), (0.01, 0)])
def test_a_hole_is_as_large_as_the_authors_and_cut_off_at_the_border(
    share: float, half: int
) -> None:
    boxes = holes(share, 600)
    # Around each centre from pixel 0 to 39, with both ends.
    spans = {(max(c - half, 0), min(c + half + 1, S)) for c in range(S)}
    assert {(left, right) for left, _, right, _ in boxes} == spans
    assert {(upper, lower) for _, upper, _, lower in boxes} == spans


def test_holes_lie_everywhere_in_both_directions_alone() -> None:
    centres = np.array([(left, upper) for left, upper, _, _ in holes(0.01, 2000)])
    assert abs(np.corrcoef(centres.T)[0, 1]) < 0.1
    np.testing.assert_allclose(centres.mean(axis=0), (S - 1) / 2, rtol=0, atol=1.1)  # 4 deviations


def test_a_holes_colour_is_any() -> None:
    image = Image.new("RGB", (1, 1))
    colours = np.array(
        [pixels(cut_out(image, 0.5, np.random.default_rng(n)))[0, 0] for n in range(2000)]
    )
    assert colours.min() == 0
    assert colours.max() == 255
    np.testing.assert_allclose(colours.mean(axis=0), 127.5, rtol=0, atol=7)  # 4 deviations
    assert np.abs(np.corrcoef(colours.T) - np.eye(3)).max() < 0.1


def test_the_hole_is_there_before_rand_augment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(image: Image.Image, _: np.random.Generator) -> Image.Image:
        seen.append(pixels(image))
        return image

    monkeypatch.setattr(module, "apply_rand_augment", spy)
    drawn(5, AugmentConfig(cutout=0.5, rand_augment=True))
    np.testing.assert_array_equal(seen, [drawn(5, AugmentConfig(cutout=0.5))])
    assert (seen[0] != drawn(5, AugmentConfig())).any()


def test_the_hole_covers_a_quarter_of_the_square_at_most() -> None:
    before = drawn(0, AugmentConfig())
    shares = [
        (drawn(seed, AugmentConfig(cutout=0.5)) != before).any(axis=-1).mean() for seed in range(99)
    ]
    assert 0.24 < max(shares) <= (21 / 40) ** 2
    assert min(shares) < 0.12


# --- RandAugment ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_makes_the_pixels_that_randaugment_makes(name: str) -> None:
    operation, crc = OPERATIONS[name], 0
    for magnitude in range(1, 10):
        for value in values(operation, magnitude):
            got = operation.apply(small_image(), value, np.random.default_rng(magnitude))
            crc = zlib.crc32(got.tobytes(), crc)
    assert crc == OF_RANDAUGMENT[name]


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_returns_a_new_image_of_the_same_size(name: str) -> None:
    operation, image = OPERATIONS[name], small_image()
    for value in values(operation, 9):
        got = operation.apply(image, value, np.random.default_rng(0))
        assert (got.mode, got.size) == ("RGB", image.size)
        assert (pixels(got) != pixels(small_image())).any()
    assert image == small_image()


def test_the_operations_are_randaugments_with_its_magnitudes() -> None:
    ranges = {name: (each.value(1), each.value(9)) for name, each in OPERATIONS.items()}
    enhanced, still = (0.1, 0.9), (0.0, 0.0)
    want = {
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), enhanced),
        **dict.fromkeys(("Invert", "AutoContrast", "Equalize"), still),
        **dict.fromkeys(("ShearX", "ShearY"), (0.3 / 9, 0.3)),
        **dict.fromkeys(("TranslateX", "TranslateY"), (150 / 331 / 9, 150 / 331)),
        "Rotate": (30 / 9, 30.0),
        "Posterize": (8 - 4 / 9, 4.0),
        "Solarize": (256 - 256 / 9, 0.0),
        "Cutout": (20 / 9, 20.0),
    }
    assert ranges.keys() == want.keys()
    for name, pair in want.items():
        np.testing.assert_allclose(ranges[name], pair, rtol=1e-12, atol=0)


def test_a_shift_goes_both_ways_and_leaves_grey() -> None:
    image = Image.fromarray(np.arange(331 * 3, dtype=np.uint8).reshape(1, 331, 3))
    random, largest = np.random.default_rng(0), OPERATIONS["TranslateX"].value(9)
    left = pixels(OPERATIONS["TranslateX"].apply(image, largest, random))
    np.testing.assert_array_equal(left[:, :181], pixels(image)[:, 150:])
    assert (left[:, 181:] == 128).all()
    right = pixels(OPERATIONS["TranslateX"].apply(image, -largest, random))
    np.testing.assert_array_equal(right[:, 150:], pixels(image)[:, :181])
    assert (right[:, :150] == 128).all()


def test_rand_augments_own_hole_is_small() -> None:
    image, sides = Image.new("RGB", (100, 100)), []
    for magnitude in range(1, 10):
        value = OPERATIONS["Cutout"].value(magnitude)
        boxes = [
            hole(image, OPERATIONS["Cutout"].apply(image, value, np.random.default_rng(n)))
            for n in range(20)
        ]
        sides.append(max(right - left for left, _, right, _ in boxes))
        assert sides[-1] == max(lower - upper for _, upper, _, lower in boxes)
    assert sides == [2, 4, 6, 8, 10, 12, 16, 18, 20]


def test_two_operations_are_drawn_and_each_is_applied_half_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    applied = record_operations(monkeypatch)
    counts: Counter[int] = Counter()
    for seed in range(4000):
        before = len(applied)
        apply_rand_augment(small_image(), np.random.default_rng(seed))
        counts[len(applied) - before] += 1
    assert counts.keys() == {0, 1, 2}
    for number, want in ((0, 1000), (1, 2000), (2, 1000)):
        assert abs(counts[number] - want) < 130  # 4 standard deviations
    pairs = list(zip(applied[::2], applied[1::2], strict=False))
    assert any(first[0] == second[0] for first, second in pairs)


def test_all_operations_and_magnitudes_are_as_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = record_operations(monkeypatch)
    random, image = np.random.default_rng(0), small_image()
    for _ in range(9000):
        apply_rand_augment(image, random)
    names = Counter(name for name, _ in applied)
    assert names.keys() == OPERATIONS.keys()
    for name, count in names.items():
        operation = OPERATIONS[name]
        assert abs(count - 600) < 100  # 4 standard deviations
        seen = Counter(value for each, value in applied if each == name)
        wanted = {value for magnitude in range(1, 10) for value in values(operation, magnitude)}
        assert seen.keys() == wanted
        # Of Invert and others like it the one value; of the signed, each of 18.
        assert max(seen.values()) < 2 * count / len(wanted)


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_share_of_the_side_is_accepted(share: float) -> None:
    check_augment(AugmentConfig(cutout=share))


@pytest.mark.parametrize("share", [-0.1, 1.0, 224.0, float("nan"), float("inf")])
def test_what_is_no_share_of_the_side_is_refused(share: float) -> None:
    with pytest.raises(MlcError, match=f"cutout: should be at least 0 and below 1, got {share}"):
        check_augment(AugmentConfig(cutout=share))
