"""Tokens that tell labels, and runs trained on them, for the tests of heads of tokens."""

from pathlib import Path
from typing import Any

import numpy as np
from made_store import IDS, LAYER, WIDTH, features_of, table_of

from mlc.heads.config import TrainConfig
from mlc.heads.fit import fit, prepare, read_inputs
from mlc.heads.run_folder import Run
from mlc.store import schema

POOLED, TOKENS = schema.feature(LAYER, "pooled"), schema.feature(LAYER, "tokens")
BIT_EQUAL = ("head.safetensors", "metrics.jsonl")


def token_values(views: int = 1, noise: float = 1.0) -> np.ndarray:
    """Return (N, V, 4, WIDTH): what tells the labels is in one token of each image."""
    generator = np.random.default_rng(7)
    values = noise * generator.standard_normal((len(IDS), views, 4, WIDTH))
    place = generator.integers(4, size=len(IDS))
    values[np.arange(len(IDS)), :, place] += features_of(table_of())[:, None]
    return values.astype(np.float32)


def trained(store: Path, out: Path, **settings: Any) -> Run:
    given = {"head": "attention-pool", "epochs": 3, "lr": 1e-2, "device": "cpu"} | settings
    config = TrainConfig(features=store, out=out, **given)
    features, table = read_inputs(config)
    return fit(config, features, prepare(config, features, table))


def same(one: Run, other: Run) -> bool:
    """Return whether two runs are the same bit for bit."""
    files = [(run.path / name).read_bytes() for name in BIT_EQUAL for run in (one, other)]
    logits = [run.scores()["logits"] for run in (one, other)]
    return files[0::2] == files[1::2] and np.array_equal(*logits)
