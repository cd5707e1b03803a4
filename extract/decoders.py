"""Decoders: the ways from a file's bytes to squares of pixels, by name."""

from functools import cache, partial
from io import BytesIO

import torch
from PIL import Image

from mlc.configs.errors import MlcError, choose
from mlc.extract.fast_images import decode_views_fast
from mlc.extract.gpu_images import decode_jpeg, decode_views_gpu
from mlc.extract.images import Decode, decode_views

FAST_GPU = "fast-gpu"


def choose_decoder(name: str, device: torch.device) -> Decode:
    """Return a decoder by its name, for a backbone on a device; never a silent fallback.

    Args:
        name: a key of ``DECODERS``.
        device: where "fast-gpu" decodes, too.

    Raises:
        MlcError: the name is unknown, or it is "fast-gpu" and the device is no GPU or decodes no
            JPEG.
    """
    decode = choose(DECODERS, name, "decode")
    if name != FAST_GPU:
        return decode
    _require_gpu(device)
    return partial(decode_views_gpu, device=device)


@cache
def _require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise MlcError(
            f"decode: {FAST_GPU} decodes on a CUDA GPU, got device {str(device)!r}; "
            "choose fast, or a GPU"
        )
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    try:
        decode_jpeg(file.getvalue(), device)
    except (AttributeError, ImportError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise MlcError(
            f"decode: {FAST_GPU} needs a torchvision with nvJPEG, and the one here decodes no JPEG "
            f"on {str(device)!r} ({reason}); choose fast, or install one that is built for CUDA"
        ) from None


DECODERS: dict[str, Decode] = {
    "pillow": decode_views,
    "fast": decode_views_fast,
    FAST_GPU: decode_views_gpu,
}
