"""The honest opponent: what a good engineer writes in an afternoon with timm, torch, scikit-learn.

Features of a folder of images into one array, then a linear head by the MLSPL protocol. No resume,
no record of how the features were made, one head at a time.

    python benchmarks/plain_script.py FILES.txt BACKBONE STATE.pth OUT.npy

prints the seconds from the first image to the last.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from timm.data import resolve_model_data_config
from torch import nn
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


def train(
    features: dict[str, torch.Tensor],
    labels: dict[str, torch.Tensor],
    lr: float,
    batch_size: int,
    epochs: int,
) -> float:
    """Train a linear head with binary cross-entropy; return test mAP at the best val epoch."""
    head = nn.Linear(features["train"].shape[1], labels["train"].shape[1])
    optimiser = torch.optim.Adam(head.parameters(), lr=lr)
    loss_of = nn.BCEWithLogitsLoss()
    best = (-1.0, 0.0)
    for _ in range(epochs):
        for rows in torch.randperm(len(features["train"])).split(batch_size):
            loss = loss_of(head(features["train"][rows]), labels["train"][rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.inference_mode():
            found = {
                name: average_precision_score(labels[name], head(features[name]).sigmoid())
                for name in ("val", "test")
            }
        best = max(best, (found["val"], found["test"]))
    return 100 * best[1]


if __name__ == "__main__":
    listing, backbone, state_file, out = sys.argv[1:]
    paths = [Path(line) for line in Path(listing).read_text().splitlines()]
    weights = torch.load(state_file)
    start = time.perf_counter()
    extract(paths, backbone, weights, Path(out))
    print(time.perf_counter() - start)
