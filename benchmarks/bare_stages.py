"""The bare stages of an extraction, that set its limit, and photos enough to time them with."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mlc.configs.device import torch_threads
from mlc.datasets.digits import read_digits
from mlc.datasets.images import find_images
from mlc.extract.backbone import Backbone, BackboneConfig
from mlc.extract.decoders import choose_decoder
from mlc.extract.forward import sample_pixels
from mlc.extract.images import read_file
from mlc.report.demo import BACKBONE, packaged_weights


@dataclass(frozen=True)
class Timed:
    """Wall and core seconds of a job."""

    wall: float
    cores: float


def timed(job: Callable[[], float | None]) -> Timed:
    """Run a job and time it; one that returns seconds has timed its own loop."""
    wall, cores = time.perf_counter(), time.process_time()
    own = job()
    return Timed(own or time.perf_counter() - wall, time.process_time() - cores)


def decode_all(files: Sequence[Path], *backbones: Backbone) -> None:
    """Read and decode files one after the other, and resize each as the backbones want it."""
    decode = choose_decoder(backbones[0].key.decode, backbones[0].device)
    squares = dict.fromkeys(backbone.squares for backbone in backbones)
    for file in files:
        for _ in decode(read_file(file), *squares):
            pass


def run_all(backbone: Backbone, images: int) -> None:
    """Run a backbone's engine on so many images, in its lanes; the last batch is full, too."""
    pixels = sample_pixels(backbone.forward, backbone.batch_size).numpy()
    batches = -(-images // len(pixels))
    lanes = backbone.lanes
    with torch_threads(lanes.threads), ThreadPoolExecutor(lanes.count) as runners:
        deque(runners.map(lambda _: backbone.features(pixels), range(batches)), maxlen=0)


def cpu_config(backbone: str, weights_folder: Path | None, engine: str = "auto") -> BackboneConfig:
    """Return a backbone with the weights that can be had, on a CPU.

    Args:
        backbone: name of a timm model.
        weights_folder: has NAME.safetensors of some; random weights for the others. Without it,
            those of the extra ``demo``.
        engine: of the forward pass.
    """
    weights = packaged_weights() if weights_folder is None and backbone == BACKBONE else None
    if weights_folder is not None:
        file = weights_folder / f"{backbone}.safetensors"
        weights = file if file.is_file() else None
    return BackboneConfig(
        backbone=backbone,
        weights=weights,
        random_weights=weights is None,
        device="cpu",
        engine=engine,
    )


def enough_photos(photos: Path | None, images: int, folder: Path) -> list[Path]:
    """Return so many photos that differ in content, from all over a folder.

    Those that are missing are copies with a number after the end of the image, which decoders
    ignore: a store takes features of the very same file over, and would have less to do.

    Args:
        photos: their folder; by default the embedded digits are drawn.
        images: how many.
        folder: where copies go.
    """
    if photos is None:
        read_digits(folder / "digits")
    found = find_images(photos or folder / "digits")
    if images <= len(found):
        return [found[place * len(found) // images].resolve() for place in range(images)]
    files = [file.resolve() for file in found]
    for place in range(len(found), images):
        original = found[place % len(found)]
        copy = folder / f"{original.parent.name}-{place}{original.suffix}"
        copy.write_bytes(original.read_bytes() + place.to_bytes(4, "big"))
        files.append(copy)
    return files


def write_csv(files: Sequence[Path], table: Path) -> Path:
    """Write a CSV that lists files as a data set with one label, and return its path."""
    table.write_text("file,labels\n" + "".join(f'"{file}",x\n' for file in files))
    return table
