"""Extraction on this machine's CPU: mlc against what its stages allow, and the plain script.

    python benchmarks/extraction.py [--photos FOLDER --photos FOLDER] [--weights-folder DIR]

Without ``--photos`` the embedded digits. Weights are DIR/NAME.safetensors where there is such a
file, else random, which the time does not depend on. Two rows for each folder and backbone:

- ``F/(F+D)``: decoding and the forward pass share the cores, so the limit is the rate of the bare
  forward pass times F / (F + D): the core-seconds that an image costs in it (same engine and batch
  size), and in bare reading, decoding and resizing on one core.
- ``plain script``: ``plain_script.py``, in a process of its own.

mlc's rate is that of its whole pipeline, from the first read to the last byte that is written;
loading, the check of the engine and the forecast come before it, as they do in the plain script.
Jobs take turns; rates are medians of the rounds, and ``ratio`` is the median of the rounds' ratios,
of which ``range`` has the least and the greatest.

Engines matter here beyond their speed: torch's threads spin while they wait for each other, on
cores that have images to decode; onnxruntime's are told not to. It comes with ``mlc[onnx]``.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import click
import timm
import torch
from bare_stages import (
    Timed,
    cpu_config,
    decode_all,
    enough_photos,
    run_all,
    timed,
    write_csv,
)

from mlc.extract.backbone import BackboneConfig, load_backbone
from mlc.extract.config import ExtractConfig
from mlc.extract.run import extract
from mlc.extract.weights import load_weights
from mlc.report.console import print_table

# Some ten seconds of each on two cores: filling and emptying the pipeline is a hundredth of it.
IMAGES = {"tf_efficientnet_lite0": 640, "resnet18": 320, "resnet50": 160}
OTHERS = 160  # images for a backbone that is not listed
WARM = 32  # images of a first, untimed turn
LIMIT_GOAL = 0.95
PLAIN_GOALS = {"tf_efficientnet_lite0": 1.5, "resnet18": 1.2, "resnet50": 1.2}
FORWARD, DECODE, MLC, PLAIN = "forward", "decode", "mlc", "plain"

Jobs = dict[str, Callable[[], float | None]]


@dataclass(frozen=True)
class Contest:
    """The jobs of one backbone on one folder of photos, and how they went.

    Attributes:
        photos: name of the folder.
        config: the backbone.
        engine: that ran.
        images: of each job.
        rounds: what each job took, by its name.
    """

    photos: str
    config: BackboneConfig
    engine: str
    images: int
    rounds: list[dict[str, Timed]]

    def core_ms(self, job: str) -> float:
        """Return the core-milliseconds that an image costs in a job."""
        return 1e3 * median(each[job].cores for each in self.rounds) / self.images

    def rates(self, job: str) -> list[float]:
        """Return a job's images/s in each round."""
        return [self.images / each[job].wall for each in self.rounds]

    def limits(self) -> list[float]:
        """Return the images/s that the bare stages allow in each round."""
        shares = [
            each[FORWARD].cores / (each[FORWARD].cores + each[DECODE].cores) for each in self.rounds
        ]
        return [rate * share for rate, share in zip(self.rates(FORWARD), shares, strict=True)]


@click.command()
@click.option("--photos", type=click.Path(path_type=Path), multiple=True, default=(None,))
@click.option("--weights-folder", type=click.Path(path_type=Path))
@click.option("--backbones", default=",".join(IMAGES))
@click.option("--engine", default="auto")
@click.option("--images", type=int, help="By default a number that suits each backbone.")
@click.option("--repeats", default=3)
def main(
    photos: tuple[Path | None, ...],
    weights_folder: Path | None,
    backbones: str,
    engine: str,
    images: int | None,
    repeats: int,
) -> None:
    """Print one table."""
    rows: list[dict[str, str]] = []
    for where in photos:
        with tempfile.TemporaryDirectory() as name:
            for backbone in backbones.split(","):
                config = cpu_config(backbone, weights_folder, engine)
                files = enough_photos(where, images or IMAGES.get(backbone, OTHERS), Path(name))
                contest = hold(where.name if where else "digits", files, config, repeats)
                rows += records(contest)
                click.echo(f"{contest.photos}, {backbone}: done", err=True)
    print_table(rows)


def hold(photos: str, files: Sequence[Path], config: BackboneConfig, repeats: int) -> Contest:
    """Run the jobs in turn: the bare stages, mlc, and the plain script."""
    backbone = load_backbone(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs: Jobs = {
            FORWARD: partial(run_all, backbone, len(files)),
            DECODE: partial(decode_all, files, backbone),
            MLC: partial(run_mlc, files, config, folder),
            PLAIN: partial(run_plain, files, save_state(config, folder), config.backbone, folder),
        }
        run_all(backbone, WARM)
        run_mlc(files[:WARM], config, folder)
        rounds = [{what: timed(job) for what, job in jobs.items()} for _ in range(repeats)]
    return Contest(photos, config, backbone.key.engine, len(files), rounds)


def run_mlc(files: Sequence[Path], config: BackboneConfig, folder: Path) -> float:
    """Extract files into a new store and return the seconds of its pipeline."""
    table = write_csv(files, folder / "files.csv")
    out = folder / f"{time.time_ns()}.zarr"
    report = extract(ExtractConfig(data=str(table), out=out, **config.model_dump()))
    return float(report.pace["seconds"])


def run_plain(files: Sequence[Path], state: Path, backbone: str, folder: Path) -> float:
    """Run the plain script and return the seconds that it prints."""
    listing = folder / "files.txt"
    listing.write_text("\n".join(map(str, files)))
    script = Path(__file__).with_name("plain_script.py")
    command = [sys.executable, script, listing, backbone, state, folder / "plain.npy"]
    return float(subprocess.run(command, capture_output=True, check=True).stdout)


def save_state(config: BackboneConfig, folder: Path) -> Path:
    """Save a backbone's weights as the plain script reads them."""
    model = timm.create_model(config.backbone)
    if config.weights is not None:
        load_weights(model, config.weights)
    path = folder / "state.pth"
    torch.save(model.state_dict(), path)
    return path


def records(contest: Contest) -> Iterator[dict[str, str]]:
    """Yield the two rows of a contest; a goal is the least ratio that is aimed at."""
    stages = f"{contest.core_ms(FORWARD):.1f} + {contest.core_ms(DECODE):.1f}"
    plain_goal = PLAIN_GOALS.get(contest.config.backbone)
    for against, rates, goal, cost in (
        ("F/(F+D)", contest.limits(), LIMIT_GOAL, stages),
        ("plain script", contest.rates(PLAIN), plain_goal, ""),
    ):
        ratios = [ours / theirs for ours, theirs in zip(contest.rates(MLC), rates, strict=True)]
        yield {
            "photos": contest.photos,
            "backbone": contest.config.backbone,
            "weights": "random" if contest.config.random_weights else "trained",
            "engine": contest.engine,
            "images": str(contest.images),
            "mlc images/s": f"{median(contest.rates(MLC)):.1f}",
            "against": against,
            "images/s": f"{median(rates):.1f}",
            "F + D core-ms": cost,
            "ratio": f"{median(ratios):.3f}",
            "range": f"{min(ratios):.3f} to {max(ratios):.3f}",
            "goal": "" if goal is None else f"{goal:.2f}",
            "holds": "" if goal is None else "yes" if median(ratios) >= goal else "no",
        }


if __name__ == "__main__":
    main()
