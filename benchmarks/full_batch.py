"""Full-batch bce: mlc against scikit-learn's one-versus-rest, to the same optimum, in one run.

    python benchmarks/full_batch.py [--store FOLDER] [--strengths 1e-3,1e-2,1e-1,1] [--threads 2]

By default synthetic features: correlated, none negative, as pooled ones are. scikit-learn is
``OneVsRestClassifier(LogisticRegression())`` with its own solver (lbfgs) in the same float32, its
classes spread over all cores; each strength is fitted by itself, as DINOv3's evaluation does. Both
stop at one number for the gradient, of which mlc takes the Euclidean norm and scikit-learn the
largest entry. A difference of objectives is relative, the largest of all classes, computed in
float64; negative where mlc's is the lower one throughout.
"""

import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from torch.nn.functional import softplus

from mlc.datasets.protocol import apply_protocol
from mlc.heads.full_batch import fit_path
from mlc.heads.inputs import LabelsConfig, join, read_features, read_labels
from mlc.report.console import print_table

IMAGES, WIDTH, CLASSES, FACTORS = 4000, 512, 20, 64
CORES = os.cpu_count() or 1


def synthetic() -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (N, D) of a few factors and noise, and labels (N, L) that follow them."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(IMAGES, FACTORS, generator=generator)
    mix = torch.randn(FACTORS, WIDTH, generator=generator) / FACTORS**0.5
    features = (factors @ mix + 0.5 * torch.randn(IMAGES, WIDTH, generator=generator)).relu()
    scores = factors @ torch.randn(FACTORS, CLASSES, generator=generator) / FACTORS**0.5
    noise = torch.randn(IMAGES, CLASSES, generator=generator) / 2
    labels = torch.where(scores + noise > torch.linspace(0.5, 2.5, CLASSES), 1, -1)
    return features, labels.to(torch.int8)


def of_store(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training split of a store, with full labels."""
    table = apply_protocol(read_labels(LabelsConfig(features=path), path), "full")
    train = join(read_features(path), table, torch.device("cpu"), ("train",))["train"]
    return train.features, train.observed


def objectives(
    features: torch.Tensor, labels: torch.Tensor, strength: float, weight: object, bias: object
) -> torch.Tensor:
    """Return (L,) float64: |w|^2 / 2 + C sum_n loss."""
    weight, bias = (torch.as_tensor(each, dtype=torch.float64) for each in (weight, bias))
    logits = features.double() @ weight.T + bias
    loss = softplus(-labels.double() * logits).sum(dim=0)
    return weight.square().sum(dim=1) / 2 + strength * loss


def fit_own(
    features: torch.Tensor, labels: torch.Tensor, strengths: Sequence[float], tolerance: float
) -> tuple[float, torch.Tensor]:
    """Return mlc's seconds for a path, and its objectives (S, L)."""
    start = time.perf_counter()
    path = fit_path(features, labels, "bce", strengths, knobs={}, tolerance=tolerance)
    seconds = time.perf_counter() - start
    found = zip(strengths, path.weight, path.bias, strict=True)
    return seconds, torch.stack([objectives(features, labels, *each) for each in found])


def fit_peer(
    features: torch.Tensor, labels: torch.Tensor, strength: float, tolerance: float, jobs: int
) -> tuple[float, torch.Tensor]:
    """Return scikit-learn's seconds for one strength, and its objectives (L,)."""
    start = time.perf_counter()
    single = LogisticRegression(C=strength, tol=tolerance, max_iter=10_000)
    peer = OneVsRestClassifier(single, n_jobs=jobs).fit(features.numpy(), labels.numpy() == 1)
    seconds = time.perf_counter() - start
    weight = np.concatenate([each.coef_ for each in peer.estimators_])
    bias = np.concatenate([each.intercept_ for each in peer.estimators_])
    return seconds, objectives(features, labels, strength, weight, bias)


@click.command()
@click.option("--store", type=click.Path(path_type=Path))
@click.option("--strengths", default="1e-3,1e-2,1e-1,1")
@click.option("--tolerance", default=1e-5)
@click.option("--threads", default=CORES, help="Of mlc; scikit-learn takes as many processes.")
def main(store: Path | None, strengths: str, tolerance: float, threads: int) -> None:
    """Print one table: each strength by itself, then all of them as one path."""
    torch.set_num_threads(threads)
    features, labels = synthetic() if store is None else of_store(store)
    values = tuple(float(value) for value in strengths.split(","))
    few = features[:, :8].contiguous()  # to wake torch's threads and joblib's processes
    fit_own(few, labels, values[:1], tolerance)
    fit_peer(few, labels, values[0], tolerance, threads)
    rows, peers = [], []
    for value in values:
        own, (mine,) = fit_own(features, labels, (value,), tolerance)
        peers.append(fit_peer(features, labels, value, tolerance, threads))
        rows.append(row(f"C {value:g}", own, peers[-1][0], mine / peers[-1][1] - 1))
    own, mine = fit_own(features, labels, values, tolerance)
    other = sum(seconds for seconds, _ in peers)
    theirs = torch.stack([objective for _, objective in peers])
    rows.append(row(f"all {len(values)}", own, other, mine / theirs - 1))
    print(f"{len(features)} images, {features.shape[1]} features, {labels.shape[1]} classes")
    print_table(rows)


def row(name: str, own: float, other: float, difference: torch.Tensor) -> dict[str, str]:
    """Return a line of the table."""
    return {
        "strength": name,
        "mlc, s": f"{own:.2f}",
        "scikit-learn, s": f"{other:.2f}",
        "ratio": f"{other / own:.1f}",
        "objective, worst": f"{float(difference.max()):.1e}",
        "objective, mean": f"{float(difference.mean()):.1e}",
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
