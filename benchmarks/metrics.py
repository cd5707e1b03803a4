"""Metrics over scikit-learn and over plain per-image loops, and per head of a batch, in one run.

Scores are synthetic, of the size of COCO's validation split of MLSPL (16,416 images) or of its
test split (40,137). numpy's AVX-512 sort is four times slower than its AVX2 sort on AMD's Zen 4:
there ``NPY_DISABLE_CPU_FEATURES="AVX512_ICL X86_V4"`` speeds up both sides of the first ratio.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from mlc.heads import metrics_torch
from mlc.heads.metrics import best_classes, evaluate, mean_ap, precision_recall_at_k
from mlc.report.console import print_table

TEST_IMAGES, VAL_IMAGES, CLASSES, POSITIVES, REPEATS = 40_137, 16_416, 80, 2.9, 5
HEADS = 8


def main() -> None:
    """Print one table; times are medians, taken in turn."""
    probs, targets = split_of(TEST_IMAGES, heads=1)
    stack, val_targets = split_of(VAL_IMAGES, heads=HEADS)
    rows = [
        *map_rows(probs[0], targets),
        *batch_rows(stack, val_targets),
        *at_k_rows(probs[0], targets),
        ("evaluate in full, 40,137 images, s", f"{evaluate_seconds(probs[0], targets):.3f}"),
    ]
    print_table([{"figure": name, "value": value} for name, value in rows])


def split_of(images: int, *, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 probabilities (heads, N, L) and targets (N, L)."""
    generator = np.random.default_rng(0)
    targets = generator.random((images, CLASSES)) < POSITIVES / CLASSES
    logits = generator.standard_normal((heads, images, CLASSES)) + 2.5 * targets
    return (1 / (1 + np.exp(-logits))).astype(np.float32), targets


def map_rows(probs: np.ndarray, targets: np.ndarray) -> list[tuple[str, str]]:
    """MAP of the test split: mlc over scikit-learn, and the difference of their values."""
    seconds, values = in_turn(
        {
            "mlc": lambda: mean_ap(probs, targets),
            "scikit-learn": lambda: 100 * average_precision_score(targets, probs),
        }
    )
    ratios = seconds["scikit-learn"] / seconds["mlc"]
    return [
        *((f"{name}, s", f"{np.median(each):.3f}") for name, each in seconds.items()),
        ("mlc over scikit-learn", f"{np.median(ratios):.2f}"),
        ("least ratio", f"{ratios.min():.2f}"),
        ("difference of mAP", f"{abs(values['mlc'] - values['scikit-learn']):.1e}"),
    ]


def batch_rows(stack: np.ndarray, targets: np.ndarray) -> list[tuple[str, str]]:
    """MAP of several heads on the validation split, and the part of it that is the bare sort."""
    tensors = torch.from_numpy(stack), torch.from_numpy(targets)
    if torch.cuda.is_available():
        tensors = tensors[0].cuda(), tensors[1].cuda()
    seconds, values = in_turn(
        {
            "numpy": lambda: mean_ap(stack, targets),
            "one by one": lambda: np.array([mean_ap(each, targets) for each in stack]),
            "bare sort, one thread": lambda: [sorted_classes(each) for each in stack],
            f"torch, {tensors[0].device.type}": lambda: (
                metrics_torch.mean_ap(*tensors).cpu().numpy()
            ),
        }
    )
    numpy_values, alone, _, torch_values = values.values()
    size = f"({HEADS}, {VAL_IMAGES:,}, {CLASSES})"
    return [
        (f"mAP of {size}, s", f"{np.median(seconds['numpy']):.3f}"),
        *(
            (f"per head, {name}, ms", f"{1e3 * np.median(each) / HEADS:.1f}")
            for name, each in seconds.items()
        ),
        ("batch is bit-equal to one by one", str(bool((numpy_values == alone).all()))),
        ("torch's largest difference of mAP", f"{np.abs(numpy_values - torch_values).max():.1e}"),
    ]


def sorted_classes(scores: np.ndarray) -> np.ndarray:
    """Return the classes (L, N), each sorted: the least that an exact AP needs."""
    classes = scores.T.copy()
    classes.sort(axis=-1)
    return classes


def at_k_rows(probs: np.ndarray, targets: np.ndarray) -> list[tuple[str, str]]:
    """P@k and R@k of the test split over a loop over images."""
    seconds, values = in_turn(
        {
            "P@k and R@k": lambda: precision_recall_at_k(best_classes(probs, 5), targets),
            "the same, a loop over images": lambda: looped_at_k(probs, targets),
        }
    )
    ours, loop = values.values()
    ratio = np.median(seconds["the same, a loop over images"] / seconds["P@k and R@k"])
    return [
        *((f"{name}, s", f"{np.median(each):.3f}") for name, each in seconds.items()),
        ("P@k and R@k over the loop", f"{ratio:.1f}"),
        ("largest difference", f"{max(abs(ours[name] - loop[name]) for name in loop):.1e}"),
    ]


def looped_at_k(probs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return P@k and R@k as a plain script computes them, image by image."""
    sums = {f"{letter}@{k}": 0.0 for k in (1, 3, 5) for letter in "PR"}
    for scores, wanted in zip(probs, targets, strict=True):
        order = np.argsort(-scores, kind="stable")
        for k in (1, 3, 5):
            hits = wanted[order[:k]].sum()
            sums[f"P@{k}"] += hits / k
            sums[f"R@{k}"] += hits / wanted.sum() if wanted.any() else 0.0
    return {name: 100 * float(value) / len(probs) for name, value in sums.items()}


def evaluate_seconds(probs: np.ndarray, targets: np.ndarray) -> float:
    """Return the median seconds of everything that ``results.json`` says of a split."""
    names = [str(column) for column in range(CLASSES)]
    seconds, _ = in_turn({"evaluate": lambda: evaluate(probs, targets, names)})
    return float(np.median(seconds["evaluate"]))


def in_turn(
    jobs: Mapping[str, Callable[[], Any]],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Run the jobs in turn, several times; return each one's seconds and its last value."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    values = {}
    for _ in range(REPEATS):
        for name, job in jobs.items():
            start = time.perf_counter()
            values[name] = job()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(each) for name, each in seconds.items()}, values


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
