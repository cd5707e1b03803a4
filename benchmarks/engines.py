"""Engines of the forward pass on this machine, each against eager torch in the same run.

    python benchmarks/engines.py [--backbones resnet18,resnet50] [--batch-size 8]

Weights are random, as the time does not depend on them. Building an engine, which every start of
``mlc extract`` pays once, has a column of its own.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter, process_time

import click
import numpy as np
import torch

from mlc.configs.device import torch_threads
from mlc.configs.errors import MlcError
from mlc.extract.backbone import BackboneConfig, load_backbone
from mlc.extract.engines import ENGINES, IN_LANES, check_engine
from mlc.extract.forward import Engine, ForwardPass, sample_pixels
from mlc.extract.lanes import Lanes, share_cores
from mlc.report.console import print_table

BACKBONES = (
    "tf_efficientnet_lite0,resnet18,resnet50,vit_small_patch16_224,swin_tiny_patch4_window7_224"
)


BATCHES = 2  # of each lane in a round


@dataclass(frozen=True)
class Built:
    """An engine, the seconds that building it took, and how far it is from eager torch."""

    engine: Engine
    seconds: float
    difference: float


@click.command()
@click.option("--backbones", default=BACKBONES)
@click.option("--engines", default=",".join(ENGINES))
@click.option("--batch-size", default=8)
@click.option("--repeats", default=5)
@click.option("--threads", type=int, default=torch.get_num_threads)
def main(backbones: str, engines: str, batch_size: int, repeats: int, threads: int) -> None:
    """Print one table; figures are medians of repeats that are taken in turn."""
    torch.set_num_threads(threads)
    for backbone in backbones.split(","):
        forward = eager(backbone)
        built = build(forward, engines.split(","), batch_size)
        pixels = sample_pixels(forward, batch_size)
        rounds = [
            {name: timed(name, each.engine, pixels) for name, each in built.items()}
            for _ in range(repeats)
        ]
        print_table(records(backbone, built, rounds, batch_size))


def eager(backbone: str) -> ForwardPass:
    """Return the forward pass of a backbone with random weights, on a CPU."""
    config = BackboneConfig(backbone=backbone, random_weights=True, device="cpu", engine="torch")
    return load_backbone(config).forward


def build(forward: ForwardPass, engines: list[str], batch_size: int) -> dict[str, Built]:
    """Build engines and compare each with eager torch; say which cannot be had."""
    built, pixels = {}, sample_pixels(forward, batch_size + 1)
    for name in engines:
        start = perf_counter()
        try:
            engine = ENGINES[name](forward, batch_size)
        except MlcError as error:
            click.echo(error, err=True)
            continue
        spent = perf_counter() - start
        built[name] = Built(engine, spent, check_engine(engine, forward, pixels).largest)
    return built


def timed(name: str, engine: Engine, pixels: torch.Tensor) -> tuple[float, float]:
    """Return the wall and core seconds for a batch, when as many run at once as in extraction."""
    lanes = share_cores() if name in IN_LANES else Lanes(1, torch.get_num_threads())

    @torch.inference_mode()
    def run(_: int) -> None:
        engine(pixels)

    wall, cores = perf_counter(), process_time()
    with torch_threads(lanes.threads), ThreadPoolExecutor(lanes.count) as runners:
        list(runners.map(run, range(BATCHES * lanes.count)))
    batches = BATCHES * lanes.count
    return (perf_counter() - wall) / batches, (process_time() - cores) / batches


def records(
    backbone: str, built: dict[str, Built], rounds: list[dict[str, tuple[float, float]]], count: int
) -> list[dict[str, str]]:
    """Return the rows of the table for batches of ``count``; ratios are of the same round."""
    rows = []
    for name, each in built.items():
        wall, cores = np.median([one[name] for one in rounds], axis=0) / count
        over = [one["torch"][0] / one[name][0] for one in rounds]
        rows.append(
            {
                "backbone": backbone,
                "engine": name,
                "images/s": f"{1 / wall:.1f}",
                "core-ms an image": f"{1000 * cores:.0f}",
                "over eager": f"{np.median(over):.2f}",
                "range": f"{min(over):.2f} to {max(over):.2f}",
                "difference": f"{each.difference:.1e}",
                "seconds to build": f"{each.seconds:.1f}",
            }
        )
    return rows


if __name__ == "__main__":
    main()
