"""The way from a JPEG to squares on a GPU: decoded by nvJPEG, and resized where it lies."""

from collections.abc import Iterator, Sequence
from functools import cache, partial
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mlc.extract.fast_images import decode_views_fast, resize_view, suits_torch
from mlc.extract.images import exif_orientation, open_image
from mlc.extract.views import Squares, View, squash_views

GPU = torch.device("cuda")
END_OF_IMAGE = b"\xff\xd9"
TURNS = {  # of (3, H, W), by EXIF orientation: are the axes exchanged, and which are then flipped
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}

# One photo at a time is on the GPU, which bounds the memory; torchvision decodes one at a time in
# any case. It writes from a stream of its own, so pixels that another thread's resize has freed and
# may still read would be overwritten.
_ONE_PHOTO = Lock()


def decode_views_gpu(
    data: bytes, *asked: Squares, device: torch.device = GPU
) -> Iterator[NDArray[np.uint8]]:
    """Do what ``decode_views_fast`` does, with JPEGs decoded and resized on a GPU.

    What differs: a JPEG is decoded at its full scale by nvJPEG, whose colours are not libjpeg's
    to the last bit, and it is resized in float32, rounded once. Grey, CMYK and RGB-coded JPEGs,
    one without an end, other formats, other interpolations, photos smaller than the square, and
    what nvJPEG or the GPU's memory refuses go through ``decode_views_fast``, and so a file is bad
    for the same reasons.

    Args:
        data: the bytes of a file in any format that Pillow reads.
        asked: squares, all made of one decoded photo.
        device: that decodes; a CPU does with libjpeg what a GPU does with nvJPEG.

    Yields:
        Each view of each of them, (S, S, 3) uint8 RGB, to be read only.

    Raises:
        OSError, SyntaxError, ValueError, …: see ``decode_views``.
    """
    with open_image(data) as image:
        able = [each for each in asked if suits_torch(image, each) and _suits_gpu(image, data)]
        orientation = exif_orientation(image) if able else 1
    squares = _squares(data, orientation, able, device) if able else {}
    if not squares:
        yield from decode_views_fast(data, *asked)
        return
    for each in asked:
        yield from squares[each] if each in squares else decode_views_fast(data, each)


def decode_jpeg(data: bytes, device: torch.device) -> Tensor:
    """Return the pixels of a JPEG as they are in the file, (3, H, W) uint8 RGB on a device.

    Raises:
        RuntimeError: it cannot be decoded there, or this torchvision decodes none there.
    """
    from torchvision import io  # its decoders are deprecated, a later one may lack them

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    photo: Tensor = io.decode_jpeg(encoded, io.ImageReadMode.RGB, device)
    return photo


def _suits_gpu(image: Image.Image, data: bytes) -> bool:
    """Return whether nvJPEG can be trusted with an opened JPEG.

    It may fill in what a truncated file lacks, and take any three channels for YCbCr.
    """
    ycbcr = image.mode == "RGB" and image.info.get("adobe_transform", 1) == 1
    return ycbcr and data.rstrip(b"\0").endswith(END_OF_IMAGE)


def _squares(
    data: bytes, orientation: int, asked: Sequence[Squares], device: torch.device
) -> dict[Squares, list[NDArray[np.uint8]]]:
    """Return the views of a JPEG by squares; none if the device cannot do it."""
    try:
        with _ONE_PHOTO, torch.cuda.stream(_own_stream(device)):
            # CUDA resizes no uint8.
            photo = _turn(decode_jpeg(data, device), orientation).float()
            return {
                each: list(squash_views(each.views, partial(_squash, photo, each)))
                for each in asked
            }
    except RuntimeError:  # torch.OutOfMemoryError is one
        return {}


@cache
def _own_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream in which photos do not wait for the backbone's batches; a CPU has none."""
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _turn(photo: Tensor, orientation: int) -> Tensor:
    """Return a photo (3, H, W) upright."""
    exchanged, flipped = TURNS.get(orientation, (False, ()))
    upright = photo.transpose(1, 2) if exchanged else photo
    return upright.flip(flipped) if flipped else upright


def _squash(photo: Tensor, asked: Squares, view: View) -> NDArray[np.uint8]:
    """Return what a view shows of a photo (3, H, W) float32 before it is turned, (S, S, 3)."""
    square = resize_view(photo, asked, view).round().clamp(0, 255).byte()
    return square.permute(1, 2, 0).cpu().numpy()
