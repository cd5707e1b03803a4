"""calibrate_arrays(): the scales of int8 arrays, from a sample of the images."""

from dataclasses import replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from mlc.configs.errors import MlcError
from mlc.configs.progress import Progress
from mlc.datasets.images import ImageSet
from mlc.extract.backbone import Backbone
from mlc.extract.stream import stream_features
from mlc.store.layout import Layout
from mlc.store.quantize import calibrate, choose_sample


def calibrate_arrays(
    layout: Layout, backbone: Backbone, images: ImageSet, workers: int, progress: Progress
) -> Layout:
    """Return a layout with the scales of its int8 arrays, if it has any.

    Raises:
        MlcError: not one image of the sample is good.
    """
    int8 = [array for array in layout.arrays if layout.dtype(array) == np.int8]
    if not int8:
        return layout
    image_values = sum(len(layout.key.views) * prod(layout.arrays[array]) for array in int8)
    chosen = choose_sample(len(images.file), image_values)
    files = [images.root / name for name in images.file[chosen].tolist()]
    size = layout.batch_size
    batches = [range(at, min(at + size, len(files))) for at in range(0, len(files), size)]
    parts: dict[str, list[Tensor]] = {array: [] for array in int8}
    for batch in stream_features(backbone, files, batches, workers):
        for array in int8:
            values = batch.features[array][torch.from_numpy(batch.decoded & (batch.error == ""))]
            parts[array].append(values.flatten(0, 1).cpu())
        progress(batch.rows.stop, len(files), "calibrating int8")
    samples = {array: torch.cat(each) for array, each in parts.items()}
    if not all(len(sample) for sample in samples.values()):
        raise MlcError(
            f"{images.root}: not one of {len(files)} images can be read, and int8 needs some to "
            "choose its scales; mend them, or store float16"
        )
    scales = {array: calibrate(sample).numpy() for array, sample in samples.items()}
    return replace(layout, scales=scales)
