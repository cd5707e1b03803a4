"""Augmentations: what training end to end does to the square of pixels of each image.

Pure functions of an image and a numpy Generator, with no state of their own or the program's: they
run in threads, and a generator for each image gives the same pixels whatever the threads do.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from mlc.configs import Config
from mlc.configs.errors import MlcError
from mlc.extract.images import INTERPOLATIONS

MAGNITUDES = 9  # 1 to 9; an operation's range has its lower end at 0, which is never drawn
DRAWN = 2  # operations for an image, each with its magnitude; both may be the same
APPLIED = 0.5  # the probability that an operation which was drawn is applied
GREY = (128, 128, 128)  # where an image was moved away
HOLE_COLOUR = (125, 122, 113)  # of RandAugment's own Cutout

Matrix = tuple[float, float, float, float, float, float]


class AugmentConfig(Config):
    """What is done to an image in training; by default nothing.

    Attributes:
        flip: mirror left and right with probability 1/2: MLSPL's.
        rand_augment: two operations of ``OPERATIONS``, see ``apply_rand_augment``: Query2Label's.
        cutout: side of one square hole as a share of the image's, see ``cut_out``; 0 is none.
            Query2Label's is 0.5.
    """

    flip: bool = False
    rand_augment: bool = False
    cutout: float = 0.0


def check_augment(config: AugmentConfig) -> None:
    """Raise an MlcError for a value out of its range."""
    if not 0 <= config.cutout < 1:
        raise MlcError(f"cutout: should be at least 0 and below 1, got {config.cutout}")


def augment(
    shown: Image.Image,
    size_px: int,
    interpolation: str,
    config: AugmentConfig,
    random: np.random.Generator,
) -> NDArray[np.uint8]:
    """Squash an image to a square and augment that, in the order of both papers' code.

    Resize and flip (MLSPL); resize, Cutout and RandAugment (Query2Label). With everything off it
    is what extraction shows the backbone, bit for bit.

    Args:
        shown: RGB, as ``images.as_shown`` gives it; left as it is.
        size_px: side of the square S.
        interpolation: a key of ``images.INTERPOLATIONS``.
        config: checked, see ``check_augment``.
        random: of this image alone; nothing is drawn for what is off.

    Returns:
        (S, S, 3) uint8 RGB, to be read only.
    """
    image = shown.resize((size_px, size_px), INTERPOLATIONS[interpolation])
    if config.flip and random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.cutout:
        image = cut_out(image, config.cutout, random)
    if config.rand_augment:
        image = apply_rand_augment(image, random)
    return np.asarray(image)


def cut_out(image: Image.Image, share: float, random: np.random.Generator) -> Image.Image:
    """Return an image with one square hole, of a colour and at a place that are drawn.

    The centre is any pixel, so that at the border a part of the hole is cut off. As in the
    authors' code, the pixels at both ends are painted: 225 px for half of 448. Their README's
    ``--cut_fact 0.5`` never reaches that code, which then draws next to nothing; this is what it
    means, and what ``--length 224`` does.

    Args:
        image: RGB.
        share: side of the hole as a share of the image's shorter side.
        random: see ``augment``.
    """
    half = int(share * min(image.size)) // 2
    red, green, blue = random.integers(256, size=3).tolist()
    return _with_hole(image, half, half + 1, (red, green, blue), random)


def apply_rand_augment(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Return an image after RandAugment, as in the package ``randaugment`` 1.0.2.

    That is a port of UDA's: of 15 operations at 9 magnitudes, all as likely, two are drawn, and
    each is applied with probability 1/2. It is neither the paper's RandAugment nor torchvision's.

    Args:
        image: RGB.
        random: see ``augment``.
    """
    operations = list(OPERATIONS.values())
    for _ in range(DRAWN):
        operation = operations[random.integers(len(operations))]
        magnitude = int(random.integers(1, MAGNITUDES + 1))
        if random.random() < APPLIED:
            sign = random.choice((-1, 1)) if operation.signed else 1
            image = operation.apply(image, float(sign * operation.value(magnitude)), random)
    return image


@dataclass(frozen=True)
class Operation:
    """One operation of RandAugment.

    Attributes:
        apply: of an RGB image, a value, and a generator that only Cutout has a use for; returns
            a new image of the same size.
        low: the value at magnitude 0.
        high: the value at magnitude 9, the others lie between in equal steps.
        signed: the value is taken away or added, as likely. Rotate's is not: its turns are all
            anticlockwise in the package.
    """

    apply: Callable[[Image.Image, float, np.random.Generator], Image.Image]
    low: float = 0.0
    high: float = 0.0
    signed: bool = False

    def value(self, magnitude: int) -> float:
        """Return the value at a magnitude, without its sign."""
        return float(np.linspace(self.low, self.high, MAGNITUDES + 1)[magnitude])


def _with_hole(
    image: Image.Image,
    before: int,
    after: int,
    colour: tuple[int, int, int],
    random: np.random.Generator,
) -> Image.Image:
    """Return an image with a hole from ``before`` pixels ahead of a drawn pixel to ``after``."""
    x, y = random.integers(image.size).tolist()
    holed = image.copy()
    holed.paste(colour, (x - before, y - before, x + after, y + after))  # cut off at the border
    return holed


def _small_hole(image: Image.Image, side_px: float, random: np.random.Generator) -> Image.Image:
    half = round(side_px) // 2
    return _with_hole(image, half, half, HOLE_COLOUR, random)


def _move(
    image: Image.Image, matrix: Matrix, resample: Image.Resampling = Image.Resampling.NEAREST
) -> Image.Image:
    """Return an image whose pixel (x, y) is the old one at (a x + b y + c, d x + e y + f)."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=GREY
    )


def _shear_x(image: Image.Image, value: float, _: np.random.Generator) -> Image.Image:
    return _move(image, (1, value, 0, 0, 1, 0), Image.Resampling.BICUBIC)


def _shear_y(image: Image.Image, value: float, _: np.random.Generator) -> Image.Image:
    return _move(image, (1, 0, 0, value, 1, 0), Image.Resampling.BICUBIC)


def _translate_x(image: Image.Image, value: float, _: np.random.Generator) -> Image.Image:
    return _move(image, (1, 0, value * image.width, 0, 1, 0))


def _translate_y(image: Image.Image, value: float, _: np.random.Generator) -> Image.Image:
    return _move(image, (1, 0, 0, 0, 1, value * image.height))


OPERATIONS = {
    "Invert": Operation(lambda image, _, __: ImageOps.invert(image)),
    "Cutout": Operation(_small_hole, 0, 20),  # px
    "Sharpness": Operation(
        lambda image, value, _: ImageEnhance.Sharpness(image).enhance(1 + value), 0, 0.9, True
    ),
    "AutoContrast": Operation(lambda image, _, __: ImageOps.autocontrast(image)),
    "Posterize": Operation(lambda image, value, _: ImageOps.posterize(image, round(value)), 8, 4),
    "ShearX": Operation(_shear_x, 0, 0.3, True),
    "TranslateX": Operation(_translate_x, 0, 150 / 331, True),  # of the side
    "TranslateY": Operation(_translate_y, 0, 150 / 331, True),
    "ShearY": Operation(_shear_y, 0, 0.3, True),
    "Rotate": Operation(  # degrees
        lambda image, value, _: image.rotate(value, fillcolor=GREY), 0, 30
    ),
    "Equalize": Operation(lambda image, _, __: ImageOps.equalize(image)),
    "Contrast": Operation(
        lambda image, value, _: ImageEnhance.Contrast(image).enhance(1 + value), 0, 0.9, True
    ),
    "Color": Operation(
        lambda image, value, _: ImageEnhance.Color(image).enhance(1 + value), 0, 0.9, True
    ),
    # Pillow's type is a whole number: the same pixels are below the next one up.
    "Solarize": Operation(
        lambda image, value, _: ImageOps.solarize(image, math.ceil(value)), 256, 0
    ),
    "Brightness": Operation(
        lambda image, value, _: ImageEnhance.Brightness(image).enhance(1 + value), 0, 0.9, True
    ),
}
