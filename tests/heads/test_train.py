"""The training step: the authors' trajectory, and what a run's numbers may depend on."""

import golden
import numpy as np
import pytest
import torch

from mlc.heads.inputs import Split
from mlc.heads.linear import LinearHead
from mlc.heads.losses import LOSSES
from mlc.heads.train import run_epoch

GOLDEN = golden.load("mlspl/trajectory.json")


@pytest.mark.parametrize("name", LOSSES)
def test_24_adam_steps_end_where_the_authors_do(name: str) -> None:
    want = GOLDEN["results"][name]
    true = torch.tensor(GOLDEN["true_labels"])
    full = LOSSES[name].labels == "full"
    observed = true * 2 - 1 if full else torch.tensor(GOLDEN["single_positive"])
    features = torch.tensor(GOLDEN["features"])
    train = Split(np.arange(len(true)).astype(str), features, observed, true.bool().numpy())
    head = LinearHead(features.shape[1], true.shape[1], torch.Generator())
    weights = {name: torch.tensor(GOLDEN[name]) for name in ("weight", "bias")}
    head.load_state_dict(weights)
    estimator = None
    groups = [{"params": list(head.parameters())}]
    if LOSSES[name].has_estimator:
        estimator = torch.nn.Parameter(torch.tensor(GOLDEN["estimator_logits"]))
        groups.append({"params": [estimator], "lr": GOLDEN["estimator_lr"]})
    optimiser = torch.optim.Adam(groups, lr=GOLDEN["lr"], fused=True)
    known = LOSSES[name].knobs()
    knobs = {"expected_positives": GOLDEN["expected_positives"]}
    knobs = {key: value for key, value in knobs.items() if key in known}
    for order in GOLDEN["order"]:
        batches = torch.tensor(order).view(-1, GOLDEN["batch_size"])
        run_epoch(LOSSES[name], head, estimator, optimiser, train, batches, knobs)
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(head.weight.detach(), want["weight"], **close)
    np.testing.assert_allclose(head.bias.detach(), want["bias"], **close)
    if estimator is not None:
        np.testing.assert_allclose(estimator.detach(), want["estimator_logits"], **close)
    moved = np.abs(np.array(want["weight"]) - np.array(GOLDEN["weight"])).max()
    assert moved > 100 * close["atol"]  # the tolerance can tell
