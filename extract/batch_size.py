"""fit_batch_size(): how many images go through a network together, by what it runs on."""

import torch

from mlc.extract.forward import ForwardPass, sample_pixels

CPU_BATCH = 8  # more do not fit the caches
GPU_BATCH, GPU_PX = 256, 224  # so many pixels keep a GPU busy, and more gain nothing


def fit_batch_size(forward: ForwardPass) -> int:
    """Return the batch size that suits a device: a power of two.

    On a GPU 256 images of 224 px, or as many larger ones as have no more pixels, halved until one
    trial fits the memory. Nothing is timed: the batch size can change a feature's last bits, and
    one machine should come to the same one every time.

    Args:
        forward: eager torch, which takes more memory than the other engines.
    """
    if forward.device.type == "cpu":
        return CPU_BATCH
    size_px = forward.reader.network.size_px
    size = GPU_BATCH
    while size > 1 and (size * size_px**2 > GPU_BATCH * GPU_PX**2 or not _fits(forward, size)):
        size //= 2
    return size


@torch.inference_mode()
def _fits(forward: ForwardPass, size: int) -> bool:
    try:
        forward(sample_pixels(forward, size))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()  # without a GPU it does nothing
        return False
    return True
