"""Evaluation: what is for stores is not silently ignored where images are read."""

from pathlib import Path

import made_runs
import pytest

from mlc.configs.errors import MlcError
from mlc.models.evaluate import evaluate_run


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"features": Path("a.zarr")}, "--features"),
        ({"labels_file": Path("a.npz")}, "--labels-file"),
        ({"eval_views": "mean"}, "--eval-views"),
        ({"check": False}, "--no-check"),
    ],
)
def test_what_is_for_stores_is_refused_beside_images(
    tmp_path: Path, given: dict, flag: str
) -> None:
    run = made_runs.write(tmp_path, "run")
    with pytest.raises(MlcError, match=rf"^evaluate: got --data, which reads images, and {flag};"):
        evaluate_run(run, {"data": "coco"} | given)
