"""Each follow-up on a made-up problem where what it assumes is so, and on one where it is not."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from mlc.heads.config import TrainConfig
from mlc.heads.inputs import Split
from mlc.heads.metrics import mean_ap
from mlc.heads.train import train_head

CLASSES, WIDTH = 6, 10
SEEDS = (0, 1, 2)
# Most positives are hidden, at random; of frequent classes, and of rare ones. And none is hidden:
# what is not shown is absent, as AN assumes.
PROBLEMS = {"hidden": (-1.2, 0.3), "hidden-rare": (-4.5, 0.3), "nothing-hidden": (-1.2, 1.0)}
OF_PROBABILITIES = ("ll_r", "ll_ct", "ll_cp", "hill", "splc", "gr", "crisp", "nnpu")
OF_RANKS = ("em", "em_apl")  # what is undecided has the probability 0.5: only the order is told


def made_up(problem: str, seed: int, images: int) -> Split:
    """Return images whose classes follow their features by logistic models."""
    bias, shown = PROBLEMS[problem]
    weight = np.random.default_rng(99).normal(size=(WIDTH, CLASSES))
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(images, WIDTH))
    probs = 1 / (1 + np.exp(-(3 * features @ weight / np.sqrt(WIDTH) + bias)))
    true = generator.random(probs.shape) < probs
    observed = true & (generator.random(probs.shape) < shown)
    return Split(
        np.arange(images).astype(str),
        torch.from_numpy(features).float(),
        torch.from_numpy(observed.astype(np.int8)),
        true,
    )


def scores(loss: str, problem: str, seed: int, knobs: Mapping[str, float]) -> tuple[float, float]:
    """Return the log loss and the mAP on test images of a head trained on 1,500."""
    sizes = {"train": 1500, "val": 600, "test": 2000}
    splits = {
        name: made_up(problem, 10 * seed + part, images)
        for part, (name, images) in enumerate(sizes.items())
    }
    config = TrainConfig(
        loss=loss, epochs=12, lr=1e-2, batch_size=50, device="cpu", knobs=dict(knobs), seed=seed
    )
    state, test = train_head(config, splits).state, splits["test"]
    logits = test.features @ state["weight"].T + state["bias"]
    target = torch.from_numpy(test.true).float()
    cost = torch.nn.functional.binary_cross_entropy_with_logits(logits, target).item()
    return cost, float(mean_ap(logits.numpy(), test.true))


def gains(loss: str, problem: str, knobs: Mapping[str, float] | None = None) -> tuple[float, float]:
    """Return by how much a loss is better than AN: in log loss and in mAP, means over seeds."""
    own = np.array([scores(loss, problem, seed, knobs or {}) for seed in SEEDS])
    an = np.array([scores("an", problem, seed, {}) for seed in SEEDS])
    less, more = (own - an).mean(axis=0)
    return -less, more


@pytest.mark.parametrize("loss", OF_PROBABILITIES)
def test_with_positives_hidden_its_probabilities_are_better_than_those_of_an(loss: str) -> None:
    assert gains(loss, "hidden")[0] > 0.03


@pytest.mark.parametrize("loss", OF_RANKS)
def test_with_positives_hidden_its_order_is_better_than_that_of_an(loss: str) -> None:
    assert gains(loss, "hidden-rare")[1] > 0


@pytest.mark.parametrize("loss", [*OF_PROBABILITIES, *OF_RANKS])
def test_with_nothing_hidden_its_probabilities_are_worse_than_those_of_an(loss: str) -> None:
    assert gains(loss, "nothing-hidden")[0] < 0


@pytest.mark.parametrize("loss", ["crisp", "nnpu"])
def test_true_priors_help_and_wrong_ones_harm(loss: str) -> None:
    true, wrong = (gains(loss, "hidden", {"priors": prior})[0] for prior in (0.35, 0.7))
    assert true > 0.1
    assert wrong < true - 0.1
