"""A small data set for training end to end, whose labels are bright channels, and runs on it."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pictures
from safetensors.numpy import load_file

from mlc.configs.progress import Progress, silent
from mlc.finetune.config import FinetuneConfig
from mlc.finetune.run import Finetuned, finetune
from mlc.heads.run_folder import BACKBONE, HEAD, METRICS, Run

TRAIN, VAL, TEST = 32, 10, 10
CLASSES = ("red", "green", "blue")
SETTINGS: dict[str, Any] = {
    "backbone": "test_resnet",
    "random_weights": True,
    "size_px": 32,
    "device": "cpu",
    "loss": "bce",
    "labels": "full",
    "lr": 1e-2,
    "batch_size": 8,
    "epochs": 3,
    "workers": 2,
}
OF_THE_CLOCK = {"seconds", "images_per_second", "waited"}  # fields of a line of metrics.jsonl


def write_photos(
    folder: Path, broken: Collection[int] = (), left_out: Collection[int] = ()
) -> Path:
    """Write JPEGs of 40 px and their CSV.

    Args:
        folder: made if it is not there.
        broken: photos that are truncated, by number: those of training are the first.
        left_out: photos that are not in the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(3)
    lines = ["file,labels,split"]
    for index in range(TRAIN + VAL + TEST):
        present = random.random(len(CLASSES)) < 0.5
        present[index % len(CLASSES)] = True
        pixels = pictures.colours(40, 40, seed=index) // 2 + (100 * present).astype(np.uint8)
        data = pictures.encoded(pictures.Image.fromarray(pixels), "JPEG")
        name = f"{index:02d}.jpg"
        (folder / name).write_bytes(pictures.truncated(data) if index in broken else data)
        labels = ";".join(each for each, there in zip(CLASSES, present, strict=True) if there)
        if index not in left_out:
            lines.append(f"{name},{labels},{split_of(index)}")
    table = folder / "photos.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def split_of(index: int) -> str:
    """Return the split of a photo, by its number."""
    return "train" if index < TRAIN else "val" if index < TRAIN + VAL else "test"


def config_of(table: Path, out: Path, **settings: Any) -> FinetuneConfig:
    return FinetuneConfig(data=str(table), out=out, **(SETTINGS | settings))


def tuned(table: Path, out: Path, progress: Progress = silent, **settings: Any) -> Finetuned:
    """Train with ``SETTINGS`` and others."""
    done = finetune(config_of(table, out, **settings), progress)
    assert done is not None
    return done


def history(run: Run) -> list[dict[str, float]]:
    """Return the epochs of a run without what the clock says of them."""
    lines = [json.loads(line) for line in (run.path / METRICS).read_text().splitlines()]
    assert all(line.keys() >= OF_THE_CLOCK for line in lines)
    return [{name: line[name] for name in line.keys() - OF_THE_CLOCK} for line in lines]


def tensors(run: Run) -> dict[str, np.ndarray]:
    """Return all that was trained."""
    files = {name: load_file(run.path / name) for name in (HEAD, BACKBONE)}
    return {f"{file}/{name}": each for file, found in files.items() for name, each in found.items()}


def assert_same_bits(one: Run, other: Run) -> None:
    """Assert that two runs have the same weights, epochs, scores and estimates."""
    # Not the bytes of the files: safetensors has what is said beside the tensors in any order.
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.dtype == second[name].dtype, name
        assert values.tobytes() == second[name].tobytes(), name
    assert history(one) == history(other)
    pairs = [(one.scores(), other.scores())]
    assert one.config.loss == other.config.loss
    if one.config.loss == "role":
        pairs.append(tuple(dict(zip("ip", run.estimates(), strict=True)) for run in (one, other)))
    for first, second in pairs:
        for name, values in first.items():
            np.testing.assert_array_equal(values, second[name], err_msg=name)
    assert one.results["test"] == other.results["test"]
