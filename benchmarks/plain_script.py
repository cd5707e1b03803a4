"""The honest opponent: what a good engineer writes in an afternoon with timm, torch, scikit-learn.

Features of a folder of images into one array, then a linear head by the MLSPL protocol. No resume,
no record of how the features were made, one head at a time.

    python benchmarks/plain_script.py FILES.txt BACKBONE STATE.pth OUT.npy

prints the seconds from the first image to the last. ``train`` takes the quickest of the plain
public ways, as timed on two CPU cores: Adam with ``fused=True`` (about 1.3 times the default's
speed for a head, 4 times for ROLE's table), ``embedding`` for rows of that table (1.3 times
indexing), torch's own cross-entropy of logits (without the 1e-5 that the paper's code adds inside
the logarithm), targets and weights of the whole split made once.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.nn.functional import embedding
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class Photos(Dataset):
    """Image files, squashed to a square and normalised."""

    def __init__(self, files: Sequence[Path], size_px: int, cfg: dict) -> None:
        self.files = files
        self.transform = transforms.Compose(
            [
                transforms.Resize(
                    (size_px, size_px), transforms.InterpolationMode(cfg["interpolation"])
                ),
                transforms.ToTensor(),
                transforms.Normalize(cfg["mean"], cfg["std"]),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB"))


def extract(
    files: Sequence[Path], backbone: str, state: dict, out: Path, workers: int = 2
) -> np.ndarray:
    """Run a frozen backbone over the files and save one ``.npy``."""
    model = timm.create_model(backbone, pretrained=False)
    model.load_state_dict(state, strict=False)
    cfg = resolve_model_data_config(model)
    model.reset_classifier(0)
    model = model.eval().to(memory_format=torch.channels_last)
    loader = DataLoader(Photos(files, cfg["input_size"][-1], cfg), 32, num_workers=workers)
    with torch.inference_mode():
        rows = [model(images.to(memory_format=torch.channels_last)).numpy() for images in loader]
    features = np.concatenate(rows)
    np.save(out, features)
    return features


@dataclass(frozen=True)
class Trained:
    """Test mAP at the best val epoch in per cent, and where the seconds went.

    Seconds of steps and of metrics are per epoch; the test at the end is the metrics' last entry.
    """

    test_map: float
    step_seconds: list[float]
    metric_seconds: list[float]


def train(
    features: dict[str, torch.Tensor],
    labels: dict[str, torch.Tensor],
    lr: float,
    batch_size: int,
    epochs: int,
    *,
    loss: str = "bce",
    expected_positives: float = 2.9,
    steps: int | None = None,
) -> Trained:
    """Train a linear head with Adam; select its epoch on val, score it on test.

    Args:
        features: "train", "val", "test", each (n, D) float32, on the device of training.
        labels: "train" (n, L) of +1, 0 (unknown), -1; "val" and "test" (n, L) of 0 and 1.
        lr: of Adam; ten times it for ROLE's table of estimates.
        batch_size: the last partial batch of an epoch is dropped.
        epochs: passes over "train".
        loss: bce, bce_ls, iun, iu, an, an_ls, wan, epr or role, each with its own labels.
        expected_positives: k of epr and role.
        steps: stop each epoch after so many: the slice of a benchmark.
    """
    observed = labels["train"]
    targets, weights = targets_and_weights(loss, observed)
    head = nn.Linear(features["train"].shape[1], observed.shape[1]).to(observed.device)
    groups = [{"params": list(head.parameters())}]
    if loss == "role":
        table = nn.Parameter(initial_table(observed))
        groups.append({"params": [table], "lr": 10 * lr})
    optimiser = torch.optim.Adam(groups, lr=lr, fused=True)
    steps = min(steps or len(observed), len(observed) // batch_size)
    best, step_seconds, metric_seconds = (-1.0, {}), [], []
    for _ in range(epochs):
        start = time.perf_counter()
        order = torch.randperm(len(observed), device=observed.device)
        for rows in order[: steps * batch_size].split(batch_size):
            logits = head(features["train"][rows])
            weight = None if weights is None else weights[rows]
            if loss == "role":
                estimates = embedding(rows, table)
                value = role(logits, estimates, targets[rows], expected_positives)
            else:
                value = cross_entropy(logits, targets[rows], weight)
                if loss == "epr":
                    value = value + positives_term(logits, expected_positives)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        value.item()  # waits for a GPU
        step_seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        val_map = mean_ap(head, features["val"], labels["val"])
        if val_map > best[0]:
            best = (val_map, {name: each.clone() for name, each in head.state_dict().items()})
        metric_seconds.append(time.perf_counter() - start)
    head.load_state_dict(best[1])
    start = time.perf_counter()
    test_map = mean_ap(head, features["test"], labels["test"])
    metric_seconds.append(time.perf_counter() - start)
    return Trained(test_map, step_seconds, metric_seconds)


def targets_and_weights(
    loss: str, observed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what cross-entropy aims at in each cell and what the cell counts; None is 1."""
    targets = (observed == 1).float()
    if loss in ("bce_ls", "an_ls"):
        return 0.8 * targets + 0.1, None
    if loss == "wan":
        return targets, torch.where(observed == 1, 1.0, 1 / (observed.shape[1] - 1))
    if loss in ("iun", "iu"):
        return targets, (observed != 0).float()
    return targets, targets if loss == "epr" else None


def initial_table(observed: torch.Tensor) -> torch.Tensor:
    """Return ROLE's estimates as logits: sure of what is observed, undecided elsewhere."""
    undecided = (torch.rand_like(observed, dtype=torch.float32) * 2 - 1) * math.log(0.6 / 0.4)
    return torch.where(observed == 1, math.log(0.995 / 0.005), undecided)


def positives_term(logits: torch.Tensor, expected: float) -> torch.Tensor:
    """Return the penalty on the batch's mean number of positives."""
    return ((logits.sigmoid().sum(1).mean() - expected) / logits.shape[1]) ** 2


def role(
    logits: torch.Tensor, estimates: torch.Tensor, targets: torch.Tensor, expected: float
) -> torch.Tensor:
    """Return ROLE's loss: head and table each fit the observed positives and the other."""
    value = 0.0
    for own, other in ((logits, estimates), (estimates, logits)):
        value = value + cross_entropy(own, targets, targets)
        value = value + cross_entropy(own, other.detach().sigmoid())
        value = value + positives_term(own, expected)
    return value / 2


@torch.inference_mode()
def mean_ap(head: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> float:
    """Return a head's mAP in per cent."""
    return 100 * average_precision_score(labels.cpu(), head(features).sigmoid().cpu())


if __name__ == "__main__":
    listing, backbone, state_file, out = sys.argv[1:]
    paths = [Path(line) for line in Path(listing).read_text().splitlines()]
    weights = torch.load(state_file)
    start = time.perf_counter()
    extract(paths, backbone, weights, Path(out))
    print(time.perf_counter() - start)
