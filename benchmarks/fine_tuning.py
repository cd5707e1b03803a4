"""Fine-tuning on photos, against the same steps on pixels that are ready.

    python benchmarks/fine_tuning.py [--photos FOLDER] [--weights-folder DIR] [--config RECIPE]

Without ``--photos`` the embedded digits; too few photos are repeated. Weights are
DIR/NAME.safetensors where there is such a file, else random, which the time does not depend on.
``--config`` has a recipe's settings, of which the options win. In each round three jobs take turns:

- ``ready``: the bare train step of a plain script, forward, cross-entropy, backward and optimiser,
  on batches that are on the device already.
- decoding: the photos read, decoded, resized and augmented one after the other, on one core.
- ``mlc``: an epoch of ``train``, from the first read to the last step. What it scores after the
  epoch is not in its time.

The columns:

- ``ready images/s``, ``mlc images/s``: medians of the rounds.
- ``ratio``, ``range``: of the two rates, the median, least and greatest of the rounds' ratios.
- ``F + D core-ms``: what an image costs in the bare step, of all cores, and in bare decoding.
- ``limit``: the ratio that the machine allows. On a CPU steps and decoding share the cores:
  F / (F + D), which can be passed if the bare step leaves cores idle. Beside a GPU decoding has the
  cores for itself: 1, or less if even all of them decode fewer images/s than the GPU trains on.
- ``of limit``: ``ratio`` over ``limit``, the median of the rounds; ``goal`` is its least.
- ``waited``: share of its time that mlc waited for images.
- ``GPU memory``: the peak of what torch took.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch
import torch.nn.functional as F
from bare_stages import Timed, cpu_config, enough_photos, timed

from mlc.configs import load
from mlc.configs.allocator import keep_freed_memory
from mlc.configs.cores import usable_cores
from mlc.extract.images import read_file
from mlc.extract.views import Squares
from mlc.finetune.config import FinetuneConfig, check_finetune
from mlc.finetune.loader import augmented
from mlc.finetune.model import ImageModel
from mlc.finetune.objective import Objective
from mlc.finetune.prepare import prepare_images
from mlc.finetune.processes import Processes, joined_processes
from mlc.finetune.run import resolve
from mlc.finetune.saved import SavedState
from mlc.finetune.scoring import Images, workers_of
from mlc.finetune.train import train
from mlc.finetune.training import FineTuning
from mlc.heads.optimiser import make_optimiser
from mlc.report.console import print_table

BACKBONE, CLASSES = "tf_efficientnet_lite0", 80
SCORED = 2  # images of validation, and as many of test: scoring is not what is timed
READY = 4  # batches of ready pixels, used again and again
WARM = 2  # steps of a first, untimed turn
GOAL, GB = 0.95, 1e9


@dataclass(frozen=True)
class Round:
    """What each job took.

    Attributes:
        bare: the steps on ready pixels.
        decoding: on one core.
        rate: mlc's images/s.
        waited: the share of its time that it waited for images.
    """

    bare: Timed
    decoding: Timed
    rate: float
    waited: float


@dataclass(frozen=True)
class Contest:
    """A model to be trained, and its photos.

    Attributes:
        config: resolved.
        model: on the device.
        images: those of the training split fill its steps.
        processes: this one.
    """

    config: FinetuneConfig
    model: ImageModel
    images: Images
    processes: Processes

    @property
    def files(self) -> Sequence[Path]:
        """Return the photos of the training split."""
        return self.images.prepared.files["train"]

    @property
    def steps(self) -> int:
        """Return how many steps a job has."""
        return len(self.files) // self.config.batch_size

    def begin(self) -> FineTuning:
        """Return a new training of the model as it is now."""
        observed = self.images.prepared.prepared.splits["train"].observed
        objective = Objective(self.config, observed, torch.Generator().manual_seed(0))
        return FineTuning(self.config, self.model, objective, self.processes, self.steps)


@click.command()
@click.option("--photos", type=click.Path(path_type=Path))
@click.option("--config", "recipe", help="A recipe of configs/finetune, or a file.")
@click.option("--backbone", help=f"By default the recipe's, else {BACKBONE}.")
@click.option("--weights-folder", type=click.Path(path_type=Path))
@click.option("--batch-size", type=int)
@click.option("--micro-batch", type=int)
@click.option("--size", "size_px", type=int, help="By default the recipe's, else the model's.")
@click.option("--images", default=96)
@click.option("--repeats", default=3)
@click.option("--device", default="cpu")
@click.option("--precision")
def main(
    photos: Path | None,
    recipe: str | None,
    backbone: str | None,
    weights_folder: Path | None,
    images: int,
    repeats: int,
    **flags: int | str | None,
) -> None:
    """Print one table."""
    keep_freed_memory()
    name = backbone or (None if recipe else BACKBONE)
    asked = load(FinetuneConfig, "finetune", recipe, flags={"backbone": name, **flags})
    weights = cpu_config(asked.backbone, weights_folder)
    with tempfile.TemporaryDirectory(prefix="mlc-fine-tuning-") as made:
        folder = Path(made)
        trained = max(1, images // asked.batch_size) * asked.batch_size
        files = enough_photos(photos, trained + 2 * SCORED, folder)
        settings = {
            "data": str(write_labels(files, folder / "files.csv")),
            "weights": weights.weights,
            "random_weights": weights.random_weights,
            "epochs": 1,
            "out": folder / "run",
        }
        with joined_processes(asked.device) as processes:
            contest = prepare(asked.model_copy(update=settings), processes)
            rounds = hold(contest, repeats, folder)
    print(f"{os.cpu_count()} cores, {asked.device}, {repeats} rounds, medians")
    print_table([record(contest, rounds)])


def write_labels(files: Sequence[Path], table: Path) -> Path:
    """Write a CSV of photos with random labels, all but a few to train on, and return its path."""
    random = np.random.default_rng(0)
    names = [f"class {column}" for column in range(CLASSES)]
    lines = ["file,labels,split"]
    splits = ["val", "test"] * SCORED + ["train"] * (len(files) - 2 * SCORED)
    for place, (file, split) in enumerate(zip(files, splits, strict=True)):
        # So that the classes are known, and in order, whatever is drawn.
        shown = random.choice(names, 3, replace=False) if place else names
        lines.append(f'"{file}",{";".join(shown)},{split}')
    table.write_text("\n".join(lines) + "\n")
    return table


def prepare(config: FinetuneConfig, processes: Processes) -> Contest:
    """Build the model and read the labels, as ``finetune`` does."""
    check_finetune(config)
    prepared = prepare_images(config, processes.device)
    resolved = resolve(config, prepared, config.out)
    model = ImageModel(resolved, CLASSES, torch.Generator().manual_seed(0))
    model.to(processes.device, memory_format=torch.channels_last)
    squares = Squares(model.network.size_px, config.interpolation or model.network.interpolation)
    images = Images(prepared, squares, workers_of(config, processes))
    return Contest(resolved, model, images, processes)


def hold(contest: Contest, repeats: int, folder: Path) -> list[Round]:
    """Run the jobs in turn."""
    take_steps(contest, WARM)
    rounds = []
    for number in range(repeats):
        bare = timed(partial(take_steps, contest, contest.steps))
        decoding = timed(partial(decode_all, contest))
        rounds.append(Round(bare, decoding, *run_mlc(contest, folder / str(number))))
        click.echo(f"round {number + 1} of {repeats}: done", err=True)
    return rounds


def take_steps(contest: Contest, steps: int) -> None:
    """Take steps on ready pixels as a plain script would: forward, loss, backward, optimiser."""
    config, device = contest.config, contest.processes.device
    model, size = contest.model.train(), config.micro_batch or config.batch_size
    rates = [(model.backbone, config.backbone_lr or config.lr), (model.head, config.lr)]
    optimiser = make_optimiser(rates, config, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    side = contest.images.squares.size_px
    ready = torch.randint(256, (READY, size, side, side, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(2, (READY, size, CLASSES), device=device).float()
    for step in range(steps):
        for part, left in enumerate(range(config.batch_size, 0, -size)):
            batch, count = (step + part) % READY, min(size, left)
            logits = model(ready[batch, :count])
            loss = F.binary_cross_entropy_with_logits(logits, labels[batch, :count])
            scaler.scale(loss * count / config.batch_size).backward()
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decode_all(contest: Contest) -> None:
    """Read, decode, resize and augment the photos of the training, one after the other."""
    for row, file in enumerate(contest.files):
        photo = augmented(file, contest.config, contest.config.order_seed, 1, row)
        for _ in photo.decode(read_file(file), contest.images.squares):
            pass


def run_mlc(contest: Contest, out: Path) -> tuple[float, float]:
    """Train for an epoch; return images/s, and the share of the time that it waited for them."""
    config = contest.config.model_copy(update={"out": out})
    saved = SavedState(config, contest.images.prepared.prepared.source)
    trained = train(config, contest.begin(), contest.images, contest.processes, saved)
    return trained.history[0]["images_per_second"], trained.history[0]["waited"]


def record(contest: Contest, rounds: Sequence[Round]) -> dict[str, str]:
    """Return the row of the table."""
    config, device = contest.config, contest.processes.device
    images = contest.steps * config.batch_size
    ready = [images / each.bare.wall for each in rounds]
    limits = [limit(each, images, device) for each in rounds]
    ratios = [each.rate / rate for each, rate in zip(rounds, ready, strict=True)]
    of_limit = median(ratio / most for ratio, most in zip(ratios, limits, strict=True))
    f, d = (
        1e3 * median(each) / images
        for each in zip(*((each.bare.cores, each.decoding.cores) for each in rounds), strict=True)
    )
    return {
        "backbone": config.backbone,
        "px": str(contest.images.squares.size_px),
        "batch": f"{config.batch_size}, {config.micro_batch or config.batch_size} at once",
        "precision": config.precision,
        "images": str(images),
        "ready images/s": f"{median(ready):.2f}",
        "mlc images/s": f"{median(each.rate for each in rounds):.2f}",
        "ratio": f"{median(ratios):.3f}",
        "range": f"{min(ratios):.3f} to {max(ratios):.3f}",
        "F + D core-ms": f"{f:.1f} + {d:.1f}",
        "limit": f"{median(limits):.3f}",
        "of limit": f"{of_limit:.3f}",
        "goal": f"{GOAL:.2f}",
        "holds": "yes" if of_limit >= GOAL else "no",
        "waited": f"{median(each.waited for each in rounds):.0%}",
        "GPU memory": peak_memory(device),
    }


def limit(each: Round, images: int, device: torch.device) -> float:
    """Return the ratio that the machine allows in a round."""
    f, d = each.bare.cores, each.decoding.cores
    if device.type == "cpu":
        return f / (f + d)
    decoded, trained = usable_cores() * images / d, images / each.bare.wall
    return min(1.0, decoded / trained)


def peak_memory(device: torch.device) -> str:
    """Return the most memory of a GPU that was in use."""
    if device.type != "cuda":
        return ""
    return f"{torch.cuda.max_memory_reserved(device) / GB:.2f} GB"


if __name__ == "__main__":
    main()
