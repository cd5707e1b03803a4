"""The full-batch solver in training: one strength, chosen on validation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mlc.configs.errors import MlcError
from mlc.heads.config import TrainConfig, check_config
from mlc.heads.inputs import Split
from mlc.heads.metrics import mean_ap
from mlc.heads.train import probabilities, train_head

STRENGTHS = (1e-3, 1e-1, 10.0)


def split(seed: int, images: int = 150) -> Split:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, 12, generator=generator)
    noise = torch.randn(images, 3, generator=generator)
    true = features[:, :3] + 2 * noise > 0.5
    names = np.arange(images).astype(str)
    return Split(names, features, (true * 2 - 1).to(torch.int8), true.numpy())


@pytest.fixture
def splits() -> dict[str, Split]:
    return {name: split(seed) for seed, name in enumerate(("train", "val", "test"))}


def config(**changes: object) -> TrainConfig:
    return TrainConfig(**({"loss": "bce", "solver": "lbfgs", "strengths": STRENGTHS} | changes))


def test_each_strength_has_a_line_and_the_best_on_validation_is_kept(splits: dict) -> None:
    heard = []
    trained = train_head(config(), splits, lambda done, total, note="": heard.append((done, total)))
    assert [line["strength"] for line in trained.history] == list(STRENGTHS)
    maps = [line["val_mAP"] for line in trained.history]
    assert len(set(maps)) == 3
    assert trained.best_epoch == int(np.argmax(maps)) + 1
    assert mean_ap(probabilities(trained.logits["val"]), splits["val"].true) == max(maps)
    assert heard[-1] == (9, 9)


def test_the_head_is_scikit_learns_at_the_strength_it_chose(splits: dict) -> None:
    trained = train_head(config(), splits)
    strength = trained.history[trained.best_epoch - 1]["strength"]
    train, test = splits["train"], splits["test"]
    for column in range(3):
        theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=1000)
        theirs.fit(train.features.numpy(), train.true[:, column])
        np.testing.assert_allclose(trained.state["weight"][column], theirs.coef_[0], atol=2e-3)
        want = theirs.decision_function(test.features.numpy())
        np.testing.assert_allclose(trained.logits["test"][:, column], want, atol=1e-2)


def test_observed_labels_can_choose(splits: dict) -> None:
    val = splits["val"]
    observed = torch.zeros_like(val.observed)
    observed[torch.arange(len(observed)), torch.randint(3, (len(observed),))] = 1
    splits["val"] = Split(val.image_id, val.features, observed, val.true)
    trained = train_head(config(val_labels="observed"), splits)
    best = trained.history[trained.best_epoch - 1]["val_mAP"]
    assert best == mean_ap(probabilities(trained.logits["val"]), (observed == 1).numpy())


def test_an_optimum_of_the_first_view_is_scored_in_all_of_them(splits: dict) -> None:
    views = {}
    for seed, (name, each) in enumerate(splits.items()):
        other = torch.randn(each.features.shape, generator=torch.Generator().manual_seed(seed + 5))
        views[name] = replace(each, views=torch.stack([each.features, each.features + other]))
    trained = train_head(config(eval_views="mean"), views)
    best = trained.history[trained.best_epoch - 1]
    maps = [line["val_mAP"] for line in trained.history]
    assert mean_ap(probabilities(trained.logits["val"]), splits["val"].true) == max(maps)
    first = train_head(config(strengths=(best["strength"],)), splits)
    assert first.history[0]["val_mAP"] != best["val_mAP"]
    weight, bias = (trained.state[name] for name in ("weight", "bias"))
    np.testing.assert_allclose(weight, first.state["weight"], atol=2e-3)
    for name in ("val", "test"):
        want = (views[name].views @ weight.T + bias).mean(dim=0)
        np.testing.assert_allclose(trained.logits[name], want, rtol=1e-4, atol=1e-4)


def test_views_are_not_drawn_where_there_are_no_steps() -> None:
    with pytest.raises(MlcError, match=r"^view_augment: the solver lbfgs takes no steps .* adam$"):
        check_config(config(view_augment=True))


def test_a_loss_that_is_not_convex_has_no_optimum_to_find() -> None:
    with pytest.raises(MlcError, match=r"unknown loss of the solver lbfgs 'role'"):
        check_config(config(loss="role"))
