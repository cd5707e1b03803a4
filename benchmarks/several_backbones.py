"""Several backbones in one pass over the images against a pass for each.

    python benchmarks/several_backbones.py FOLDER [--backbones tf_efficientnet_lite0,resnet18]

FOLDER holds photos, the larger the more there is to gain: one pass reads and decodes each of them
once. Weights are DIR/NAME.safetensors with ``--weights-folder DIR`` and where there is such a file,
else random, which the time does not depend on.

``one pass`` and ``a pass each`` are seconds of the pipelines, without loading; ``ratio`` is the
first over the second, less is better, the median of rounds in which the jobs take turns; ``range``
has the least and the greatest. ``ideal`` is what the core-time of the bare stages allows, from the
same rounds, for two backbones (D + F1 + F2) / (D1 + D2 + F1 + F2): F of each backbone's bare
forward pass, D1 and D2 of reading, decoding and resizing for each alone, D for both, which decodes
once and resizes as often as their inputs differ. F and D are shown in core-milliseconds an image.
"""

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import click
from bare_stages import (
    Timed,
    cpu_config,
    decode_all,
    enough_photos,
    run_all,
    timed,
    write_csv,
)

from mlc.extract.backbone import Backbone, BackboneConfig, load_backbone
from mlc.extract.config import ExtractConfig
from mlc.extract.run import extract, extract_each
from mlc.report.console import print_table

ONE_PASS, PASS_EACH, DECODE, FORWARD = "one pass", "a pass each", "decode", "forward"
WARM = 32  # images of a first, untimed turn


@click.command()
@click.argument("photos", type=click.Path(path_type=Path))
@click.option("--backbones", default="tf_efficientnet_lite0,resnet18")
@click.option("--weights-folder", type=click.Path(path_type=Path))
@click.option("--engine", default="auto")
@click.option("--images", default=384)
@click.option("--repeats", default=3)
def main(
    photos: Path,
    backbones: str,
    weights_folder: Path | None,
    engine: str,
    images: int,
    repeats: int,
) -> None:
    """Print one table of one row."""
    configs = [cpu_config(name, weights_folder, engine) for name in backbones.split(",")]
    loaded = [load_backbone(config) for config in configs]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = enough_photos(photos, images, folder)
        run_one_pass(files[:WARM], configs, folder)
        rounds = [time_jobs(files, configs, loaded, folder) for _ in range(repeats)]
    print_table([record(photos, loaded, rounds, images)])


def time_jobs(
    files: Sequence[Path],
    configs: Sequence[BackboneConfig],
    loaded: Sequence[Backbone],
    folder: Path,
) -> dict[str, Timed]:
    """Time both ways and the bare stages, by their names and the backbones'."""
    jobs = {
        ONE_PASS: partial(run_one_pass, files, configs, folder),
        PASS_EACH: partial(run_a_pass_each, files, configs, folder),
        DECODE: partial(decode_all, files, *loaded),
        **{f"{DECODE} {each.name}": partial(decode_all, files, each) for each in loaded},
        **{f"{FORWARD} {each.name}": partial(run_all, each, len(files)) for each in loaded},
    }
    return {what: timed(job) for what, job in jobs.items()}


def run_one_pass(files: Sequence[Path], configs: Sequence[BackboneConfig], folder: Path) -> float:
    """Return the seconds of one pipeline that fills a store for each backbone."""
    reports = extract_each([request(files, config, folder) for config in configs])
    return max(float(report.pace["seconds"]) for report in reports)


def run_a_pass_each(
    files: Sequence[Path], configs: Sequence[BackboneConfig], folder: Path
) -> float:
    """Return the seconds of the pipelines of one backbone after the other."""
    reports = [extract(request(files, config, folder)) for config in configs]
    return sum(float(report.pace["seconds"]) for report in reports)


def request(files: Sequence[Path], config: BackboneConfig, folder: Path) -> ExtractConfig:
    """Return a request for a new store."""
    table = write_csv(files, folder / "files.csv")
    out = folder / f"{config.backbone}-{time.time_ns()}.zarr"
    return ExtractConfig(data=str(table), out=out, **config.model_dump())


def record(
    photos: Path, loaded: Sequence[Backbone], rounds: Sequence[dict[str, Timed]], images: int
) -> dict[str, str]:
    """Return the row of the table."""
    cost = {what: median(each[what].cores for each in rounds) / images for what in rounds[0]}
    forward = [cost[f"{FORWARD} {backbone.name}"] for backbone in loaded]
    alone = [cost[f"{DECODE} {backbone.name}"] for backbone in loaded]
    ideal = (cost[DECODE] + sum(forward)) / (sum(alone) + sum(forward))
    ratios = [each[ONE_PASS].wall / each[PASS_EACH].wall for each in rounds]
    seconds = {what: median(each[what].wall for each in rounds) for what in (ONE_PASS, PASS_EACH)}
    return {
        "photos": photos.name,
        "backbones": ", ".join(backbone.key.backbone for backbone in loaded),
        "engines": ", ".join(backbone.key.engine for backbone in loaded),
        "images": str(images),
        "one pass, s": f"{seconds[ONE_PASS]:.1f}",
        "a pass each, s": f"{seconds[PASS_EACH]:.1f}",
        "ratio": f"{median(ratios):.2f}",
        "range": f"{min(ratios):.2f} to {max(ratios):.2f}",
        "ideal": f"{ideal:.2f}",
        "F1, F2 core-ms": ", ".join(f"{1e3 * each:.1f}" for each in forward),
        "D1, D2 core-ms": ", ".join(f"{1e3 * each:.1f}" for each in alone),
        "D core-ms": f"{1e3 * cost[DECODE]:.1f}",
    }


if __name__ == "__main__":
    main()
