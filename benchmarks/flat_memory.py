"""Memory of an extraction of many images: flat, or not.

    python benchmarks/flat_memory.py [--images 20000] [--plot memory.png]

The images are made: pictures of many sizes, so that no buffer fits twice in a row, all of
different content. A small backbone at a small size keeps the run short; what could grow with the
number of images does not depend on either. Two rows: ``resident`` is all memory of the process
that is in RAM, ``private`` is that without pages of files, which the kernel takes back when it
needs them. Columns: MB (1e6 bytes) when a quarter of the images is done, at the end, and at most;
``slope`` is a straight line's, in MB per 1,000 images, through the samples of the last three
quarters. It is flat if that is below ``bound``: a kilobyte an image, which is more than the hash
and the row that a store remembers of one, and less than its pixels or features.
"""

import tempfile
import threading
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import click
import numpy as np
from bare_stages import write_csv
from memory import STATUS
from numpy.typing import NDArray
from PIL import Image

from mlc.extract.config import ExtractConfig
from mlc.extract.job import ExtractReport
from mlc.extract.run import extract
from mlc.report.console import print_table

PICTURES, SIDES_PX = 64, (48, 480)  # pictures that differ in size
SECONDS = 0.05  # between two samples
KINDS = {"resident": "VmRSS", "private": "RssAnon"}  # in Linux's own words
BOUND = 1.0  # MB per 1,000 images


@dataclass
class Samples:
    """Memory while images are extracted.

    Attributes:
        images: done at each sample.
        megabytes: of each kind, at each sample.
    """

    images: list[int] = field(default_factory=list)
    megabytes: list[list[float]] = field(default_factory=list)

    def curves(self) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        """Return the images done, and the memory of each kind beside them."""
        values = np.array(self.megabytes).T
        return np.array(self.images, np.float64), dict(zip(KINDS, values, strict=True))


@click.command()
@click.option("--images", default=20_000)
@click.option("--backbone", default="tf_efficientnet_lite0")
@click.option("--size", default=64, help="Side of its input in pixels.")
@click.option("--engine", default="auto")
@click.option("--plot", type=click.Path(path_type=Path), help="A PNG of the curves.")
def main(images: int, backbone: str, size: int, engine: str, plot: Path | None) -> None:
    """Print one table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = ExtractConfig(
            data=str(write_csv(make_photos(folder, images), folder / "files.csv")),
            out=folder / "features.zarr",
            backbone=backbone,
            random_weights=True,
            size_px=size,
            device="cpu",
            engine=engine,
        )
        report, samples = watch(config)
    print_table([record(kind, report, samples) for kind in KINDS])
    if plot is not None:
        draw(samples, report, plot)


def make_photos(folder: Path, images: int) -> list[Path]:
    """Write JPEGs of different content: some pictures, each with a number after its end."""
    generator = np.random.default_rng(0)
    pictures = [picture(generator) for _ in range(PICTURES)]
    files = [folder / f"{number:06}.jpg" for number in range(images)]
    for number, file in enumerate(files):
        file.write_bytes(pictures[number % PICTURES] + number.to_bytes(4, "big"))
    return files


def picture(generator: np.random.Generator) -> bytes:
    """Return a JPEG of coloured patches, of a random size."""
    width, height = generator.integers(*SIDES_PX, size=2).tolist()
    patches = Image.fromarray(generator.integers(256, size=(8, 8, 3), dtype=np.uint8))
    out = BytesIO()
    patches.resize((width, height)).save(out, "JPEG")
    return out.getvalue()


def watch(config: ExtractConfig) -> tuple[ExtractReport, Samples]:
    """Extract, with a thread that looks at the memory from the first image on."""
    samples, ended, done = Samples(), threading.Event(), 0

    def progress(images: int, total: int, note: str = "") -> None:
        nonlocal done
        done = images

    def sample() -> None:
        while not ended.wait(SECONDS):
            if done:
                samples.images.append(done)
                samples.megabytes.append(memory_now())

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        report = extract(config, progress)
    finally:
        ended.set()
        watcher.join()
    return report, samples


def memory_now() -> list[float]:
    """Return the MB of each kind that the process has now; on Linux only."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return [int(fields[name].split()[0]) * 1024 / 1e6 for name in KINDS.values()]


def slope(images: NDArray[np.float64], megabytes: NDArray[np.float64]) -> float:
    """Return the MB per 1,000 images over the last three quarters, by least squares."""
    later = images >= images[-1] / 4
    return float(1e3 * np.polyfit(images[later], megabytes[later], 1)[0])


def record(kind: str, report: ExtractReport, samples: Samples) -> dict[str, str]:
    """Return a row of the table."""
    images, curves = samples.curves()
    curve = curves[kind]
    growth = slope(images, curve)
    return {
        "memory": kind,
        "images": f"{report.extracted:,}",
        "engine": report.engine,
        "images/s": f"{report.pace['images_per_second']:.0f}",
        "at a quarter, MB": f"{curve[np.searchsorted(images, images[-1] / 4)]:.0f}",
        "at the end, MB": f"{curve[-1]:.0f}",
        "at most, MB": f"{curve.max():.0f}",
        "slope, MB per 1,000 images": f"{growth:+.2f}",
        "bound": f"{BOUND:.2f}",
        "verdict": "flat" if growth <= BOUND else "grows",
    }


def draw(samples: Samples, report: ExtractReport, path: Path) -> None:
    """Save the curves of both kinds, from zero."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    images, curves = samples.curves()
    for kind, curve in curves.items():
        growth = slope(images, curve)
        axes.plot(images, curve, label=f"{kind}: {growth:+.2f} MB per 1,000 images", linewidth=1)
    axes.axvline(images[-1] / 4, color="grey", linestyle=":", label="slopes are of what follows")
    axes.set(xlim=(0, images[-1]), ylim=(0, None))
    axes.set(xlabel="images extracted", ylabel="memory of the process in MB")
    axes.set_title(f"mlc extract, {report.extracted:,} images, {report.backbone}, {report.engine}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
