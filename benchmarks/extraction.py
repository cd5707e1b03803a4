"""Extraction on this machine: mlc against the plain script and against its own two limits.

    python benchmarks/extraction.py [--data coco --root DIR] [--backbone NAME --weights FILE]

By default the embedded digits with the weights of the extra ``demo``. The limit is the rate of the
bare forward pass times F / (F + D), with F and D the core-seconds that an image costs in the bare
forward pass and in bare decoding: both share the same cores.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import timm
import torch

from mlc.datasets.source import DataConfig, read_images
from mlc.extract.backbone import BackboneConfig, load_backbone
from mlc.extract.images import load_image
from mlc.extract.run import ExtractConfig, extract
from mlc.extract.weights import load_weights
from mlc.report.console import print_table
from mlc.report.demo import packaged_weights


@dataclass(frozen=True)
class Timed:
    """Wall and core seconds of one job over all images."""

    wall: float
    cores: float


def timed(job: Callable[[], float | None]) -> Timed:
    """Run a job and time it; one that returns seconds has timed its own loop."""
    wall, cores = time.perf_counter(), time.process_time()
    own = job()
    return Timed(own or time.perf_counter() - wall, time.process_time() - cores)


@click.command()
@click.option("--data", default="digits")
@click.option("--root", type=click.Path(path_type=Path))
@click.option("--backbone", default="tf_efficientnet_lite0")
@click.option("--weights", type=click.Path(path_type=Path), default=packaged_weights)
@click.option("--images", default=1024)
@click.option("--repeats", default=3)
def main(
    data: str, root: Path | None, backbone: str, weights: Path, images: int, repeats: int
) -> None:
    """Print one table; figures are medians of repeats that are taken in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listed = read_images(DataConfig(data=data, root=root or folder / "digits"))
        files = [(listed.root / str(file)).resolve() for file in listed.file[:images]]
        jobs = contestants(folder, files, BackboneConfig(backbone=backbone, weights=weights))
        for job in jobs.values():
            job()
        rounds = [{what: timed(job) for what, job in jobs.items()} for _ in range(repeats)]
    print_table(_records(rounds, len(files)))


def contestants(
    folder: Path, files: list[Path], config: BackboneConfig
) -> dict[str, Callable[[], float | None]]:
    """Return the jobs to time: the two limits, mlc, and the plain script in its own process."""
    listing, table, state = folder / "files.txt", folder / "files.csv", folder / "state.pth"
    listing.write_text("\n".join(map(str, files)))
    table.write_text("file,labels\n" + "".join(f'"{file}",x\n' for file in files))
    model = timm.create_model(config.backbone)
    load_weights(model, config.weights)
    torch.save(model.state_dict(), state)
    bare = load_backbone(config)
    size_px = bare.key.size_px
    pixels = np.zeros((bare.default_batch, size_px, size_px, 3), np.uint8)

    def forward() -> None:
        for _ in range(0, len(files), len(pixels)):
            bare.features(pixels)

    def decode() -> None:
        for file in files:
            load_image(file, bare.key.interpolation, ("orig",), pixels[:1])

    def ours() -> float:
        out = folder / f"{time.time_ns()}.zarr"
        asked = ExtractConfig(data=str(table), out=out, **config.model_dump())
        return float(extract(asked).pace["seconds"])

    def plain() -> float:
        script = Path(__file__).with_name("plain_script.py")
        command = [sys.executable, script, listing, config.backbone, state, folder / "plain.npy"]
        return float(subprocess.run(command, capture_output=True, check=True).stdout)

    return {"forward": forward, "decode": decode, "mlc extract": ours, "plain script": plain}


def _records(rounds: list[dict[str, Timed]], images: int) -> list[dict[str, str]]:
    rates = {name: np.median([images / each[name].wall for each in rounds]) for name in rounds[0]}
    limit, over_plain = [], []
    for each in rounds:
        f, d = each["forward"].cores, each["decode"].cores
        most = images / each["forward"].wall * f / (f + d)
        limit.append(images / each["mlc extract"].wall / most)
        over_plain.append(each["plain script"].wall / each["mlc extract"].wall)
    records = [
        {"figure": f"{name}, images/s", "median": f"{rate:.1f}", "range": ""}
        for name, rate in rates.items()
    ]
    for name, values in (("mlc over its limit", limit), ("mlc over the plain script", over_plain)):
        spread = f"{min(values):.2f} to {max(values):.2f}"
        records.append({"figure": name, "median": f"{np.median(values):.2f}", "range": spread})
    return records


if __name__ == "__main__":
    main()
