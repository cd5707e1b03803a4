"""The fast decoder against the exact one: milliseconds an image, and how far its pixels are.

    python benchmarks/decoding.py FOLDER [--sizes 224,448] [--enlarge 4032x3024]

FOLDER holds photos. One thread; medians of rounds in which the decoders take turns.
"""

import io
import time
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from mlc.datasets.images import find_images
from mlc.extract.fast_images import decode_views_fast
from mlc.extract.images import decode_views
from mlc.extract.views import Squares
from mlc.report.console import print_table

DECODERS = {"pillow": decode_views, "fast": decode_views_fast}  # both on one core


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--sizes", default="224,448", help="Sides of the square in pixels.")
@click.option("--enlarge", help="WIDTHxHEIGHT to resize the photos to before, as JPEG.")
@click.option("--images", default=64)
@click.option("--rounds", default=3)
def main(folder: Path, sizes: str, enlarge: str | None, images: int, rounds: int) -> None:
    """Print one table."""
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in find_images(folder)[:images]]
    if enlarge:
        width, height = map(int, enlarge.split("x"))
        files = [enlarged(data, (width, height)) for data in files]
    print_table(
        [
            record(files, int(size_px), interpolation, rounds)
            for size_px in sizes.split(",")
            for interpolation in ("bilinear", "bicubic")
        ]
    )


def enlarged(data: bytes, size: tuple[int, int]) -> bytes:
    """Return a photo of another size."""
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").resize(size).save(out, "JPEG", quality=90)
    return out.getvalue()


def record(files: list[bytes], size_px: int, interpolation: str, rounds: int) -> dict[str, str]:
    """Return a row of the table."""
    seconds: dict[str, list[float]] = {name: [] for name in DECODERS}
    squares = {}
    for _ in range(rounds):
        for name, decode in DECODERS.items():
            start = time.process_time()
            squares[name] = [next(decode(data, Squares(size_px, interpolation))) for data in files]
            seconds[name].append((time.process_time() - start) / len(files))
    exact, fast = (np.stack(squares[name]).astype(np.int16) for name in DECODERS)
    apart = np.abs(exact - fast)
    exact_ms, fast_ms = (1e3 * float(np.median(seconds[name])) for name in DECODERS)
    return {
        "square": f"{size_px} px",
        "interpolation": interpolation,
        "exact ms": f"{exact_ms:.2f}",
        "fast ms": f"{fast_ms:.2f}",
        "exact over fast": f"{exact_ms / fast_ms:.2f}",
        "mean difference": f"{apart.mean():.3f}",
        "greatest": str(apart.max()),
    }


if __name__ == "__main__":
    main()
