"""A block of linear heads: the authors' trajectory, the plain path, and each head as if alone."""

from dataclasses import replace

import golden
import numpy as np
import pytest
import torch
from plain import PlainTraining

from mlc.configs.device import one_thread
from mlc.heads.block import RECORDED, LinearBlock, Start
from mlc.heads.inputs import Split
from mlc.heads.train import batches_of_epoch
from mlc.losses.table import LOSSES

GOLDEN = golden.load("mlspl/trajectory.json")
EXPECTED_POSITIVES = 1.5


def knobs_of(loss: str, expected_positives: float = EXPECTED_POSITIVES) -> dict[str, float]:
    """Its knobs; what changes does so early, and enough to be seen."""
    wanted = {"expected_positives": expected_positives, "warm_up": 2, "delta": 0.02}
    return {name: each for name, each in wanted.items() if name in LOSSES[loss].knobs()}


def golden_labels(loss: str) -> torch.Tensor:
    true, single = (torch.tensor(GOLDEN[name]) for name in ("true_labels", "single_positive"))
    return {
        "full": true * 2 - 1,
        "single-positive": single,
        "one-positive-one-negative": torch.tensor(GOLDEN["one_positive_one_negative"]),
        "one-positive-all-negatives": single - (true == 0).long(),
    }[LOSSES[loss].labels]


@pytest.mark.parametrize("loss", sorted(GOLDEN["results"]))
def test_24_adam_steps_end_where_the_authors_do(loss: str) -> None:
    want = GOLDEN["results"][loss]
    features, observed = torch.tensor(GOLDEN["features"]), golden_labels(loss)
    train = Split(np.arange(len(features)).astype(str), features, observed, None)
    size = GOLDEN["batch_size"]
    knobs = knobs_of(loss, GOLDEN["expected_positives"])
    start = Start(lr=GOLDEN["lr"], weight_decay=0.0, seed=0)
    block = LinearBlock(LOSSES[loss], knobs, [start], train, size)
    block.weight[0], block.bias[0] = torch.tensor(GOLDEN["weight"]), torch.tensor(GOLDEN["bias"])
    if block.estimator is not None:
        block.estimator.table[:, 0, 0] = torch.tensor(GOLDEN["estimator_logits"])
        assert float(block.estimator.lr[0]) == pytest.approx(GOLDEN["estimator_lr"])
    for order in GOLDEN["order"]:
        block.epoch(torch.tensor(order).view(-1, size))
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(block.weight[0], want["weight"], **close)
    np.testing.assert_allclose(block.bias[0], want["bias"], **close)
    if block.estimator is not None:
        np.testing.assert_allclose(block.estimator.logits(0), want["estimator_logits"], **close)
    moved = np.abs(np.array(want["weight"]) - np.array(GOLDEN["weight"])).max()
    assert moved > 100 * close["atol"]  # the tolerance can tell


def random_split(loss: str, images: int, width: int, classes: int, dtype=torch.float32) -> Split:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(images, width, generator=generator, dtype=dtype)
    true = torch.rand(images, classes, generator=generator) < 0.3
    true[:, 0] = True
    single = torch.zeros(images, classes, dtype=torch.int8)
    single[torch.arange(images), true.float().multinomial(1, generator=generator)[:, 0]] = 1
    observed = {
        "full": (true * 2 - 1).to(torch.int8),
        "single-positive": single,
        "one-positive-one-negative": single - (~true).to(torch.int8),
        "one-positive-all-negatives": single - (~true).to(torch.int8),
    }[LOSSES[loss].labels]
    return Split(np.arange(images).astype(str), features, observed, true.numpy())


def block_of(loss: str, starts: list[Start], train: Split, batch_size: int) -> LinearBlock:
    return LinearBlock(LOSSES[loss], knobs_of(loss), starts, train, batch_size)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_fast_path_is_the_plain_one(loss: str) -> None:
    """Hundreds of steps of autograd and dense Adam, over several epochs in random order."""
    train = random_split(loss, images=90, width=20, classes=6)
    plain = PlainTraining(loss, knobs_of(loss), train, lr=1e-3, seed=3)
    block = block_of(loss, [Start(1e-3, 0.0, seed=3)], train, 6)
    order = torch.Generator().manual_seed(0)
    for epoch in range(1, 21):
        batches = batches_of_epoch(90, 6, order)
        block.begin_epoch(epoch, 20)
        plain.begin_epoch(epoch, 20)
        mean = float(block.epoch(batches)[0])
        assert mean == pytest.approx(plain.epoch(batches), rel=1e-4)
    close = {"rtol": 1e-3, "atol": 2e-4}
    torch.testing.assert_close(block.weight[0], plain.head.weight.detach(), **close)
    torch.testing.assert_close(block.bias[0], plain.head.bias.detach(), **close)
    if block.estimator is not None:
        torch.testing.assert_close(block.estimator.logits(0), plain.table.detach(), **close)


def with_views(train: Split, views: int = 3) -> Split:
    """Return a split with views of which the first is that of the split."""
    noise = torch.randn(views, *train.features.shape, generator=torch.Generator().manual_seed(7))
    noise[0] = 0
    return replace(train, views=train.features + noise)


@pytest.mark.parametrize("loss", ["bce", "role"])
def test_a_step_sees_each_image_in_its_view_and_estimates_by_image(loss: str) -> None:
    """Against the plain path, whose features are those of the step's views."""
    train = with_views(random_split(loss, images=90, width=20, classes=6))
    plain = PlainTraining(loss, knobs_of(loss), train, lr=1e-3, seed=3)
    block = block_of(loss, [Start(1e-3, 0.0, seed=3)], train, 2)
    order = torch.Generator().manual_seed(0)
    for _ in range(3):
        batches = batches_of_epoch(90, 2, order)
        assert len(batches) > RECORDED
        views = torch.randint(3, batches.shape, generator=order)
        mean, losses = float(block.epoch(batches, views=views)[0]), []
        for rows, seen in zip(batches, views, strict=True):
            features = train.features.clone()
            features[rows] = train.all_views()[seen, rows]
            plain.train = replace(train, features=features)
            losses.append(plain.step(rows))
        assert mean == pytest.approx(np.mean(losses), rel=1e-4)
    close = {"rtol": 1e-3, "atol": 2e-4}
    torch.testing.assert_close(block.weight[0], plain.head.weight.detach(), **close)
    if block.estimator is not None:
        torch.testing.assert_close(block.estimator.logits(0), plain.table.detach(), **close)


@pytest.mark.parametrize("loss", ["bce", "role"])
def test_steps_see_the_first_view_unless_they_are_told(loss: str) -> None:
    train = random_split(loss, 30, 20, 6)
    batches = batches_of_epoch(30, 6, torch.Generator().manual_seed(0)).repeat(4, 1)
    with one_thread():
        blocks = [block_of(loss, STARTS, split, 6) for split in (train, *[with_views(train)] * 2)]
        told = (None, None, torch.zeros_like(batches))
        losses = [
            block.epoch(batches, views=views) for block, views in zip(blocks, told, strict=True)
        ]
    for block, mean in zip(blocks[1:], losses[1:], strict=True):
        assert torch.equal(block.parameters, blocks[0].parameters)
        assert torch.equal(mean, losses[0])


def test_weight_decay_is_that_of_adamw_and_spares_the_bias() -> None:
    train = random_split("bce", images=30, width=8, classes=3)
    plain = PlainTraining("bce", {}, train, lr=1e-2)
    weight, bias = plain.head.weight, plain.head.bias
    plain.optimiser = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": 0.5}, {"params": [bias], "weight_decay": 0.0}],
        lr=1e-2,
    )
    starts = [Start(1e-2, 0.0, seed=0), Start(1e-2, 0.5, seed=0)]
    block = block_of("bce", starts, train, 5)
    batches = batches_of_epoch(30, 5, torch.Generator().manual_seed(0)).repeat(10, 1)
    block.epoch(batches)
    plain.epoch(batches)
    torch.testing.assert_close(block.weight[1], weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.bias[1], bias.detach(), rtol=1e-4, atol=1e-5)
    assert (block.weight[0] - block.weight[1]).abs().max() > 0.05


def require_alone_equals_together(
    loss: str, starts: list[Start], train: Split, batch_size: int, steps: int
) -> None:
    """Train some heads together and each alone: the same bits, of parameters and losses.

    In views drawn at random, if the split has them.
    """

    def trained(which: list[Start]) -> tuple[LinearBlock, list[torch.Tensor]]:
        block, order = block_of(loss, which, train, batch_size), torch.Generator().manual_seed(1)
        images, losses, done, epoch = len(train.features), [], 0, 0
        while done < steps:
            epoch += 1
            block.begin_epoch(epoch, 5)
            batches = batches_of_epoch(images, batch_size, order)[: steps - done]
            views = None
            if train.views is not None:
                views = torch.randint(len(train.views), batches.shape, generator=order)
            losses.append(block.epoch(batches, views=views))
            done += len(batches)
        return block, losses

    with one_thread():
        together, losses = trained(starts)
        assert torch.isfinite(together.parameters).all()
        for head, start in enumerate(starts):
            alone, own = trained([start])
            assert torch.equal(alone.parameters[0], together.parameters[head])
            assert torch.equal(torch.stack(own)[:, 0], torch.stack(losses)[:, head])
            if alone.estimator is not None and together.estimator is not None:
                assert torch.equal(alone.estimator.logits(0), together.estimator.logits(head))


STARTS = [Start(lr, decay, seed) for seed in (0, 1) for lr, decay in ((1e-2, 0.0), (1e-3, 0.1))]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("width", "classes", "batch_size"),
    [(33, 1, 5), (127, 7, 16), (65, 21, 3), (64, 20, 8), (64, 16, 8)],
)
def test_a_head_is_bit_equal_alone_and_in_a_block(
    loss: str, width: int, classes: int, batch_size: int
) -> None:
    """Sizes at which BLAS and the vector loops meet odd ends and odd addresses."""
    train = random_split(loss, 100, width, classes)
    require_alone_equals_together(loss, STARTS[:3], train, batch_size, steps=25)


@pytest.mark.parametrize("loss", ["bce", "role"])
def test_a_head_is_bit_equal_alone_and_in_a_block_that_sees_views(loss: str) -> None:
    train = with_views(random_split(loss, 100, 127, 7))
    require_alone_equals_together(loss, STARTS[:3], train, 16, steps=25)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_bit_equal_over_1000_steps_at_the_papers_sizes(loss: str) -> None:
    train = random_split(loss, 4000, 2048, 80)
    starts = [Start(1e-2, 0.0, 0), Start(1e-2, 0.0, 1), Start(1e-3, 0.0, 0)]
    require_alone_equals_together(loss, starts, train, 8, steps=1000)


def test_check_is_asked_before_each_step_and_ends_training() -> None:
    train = random_split("an", 20, 4, 3)
    block, asked = block_of("an", STARTS[:1], train, 5), []

    def check() -> None:
        asked.append(block.weight.clone())
        if len(asked) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        block.epoch(torch.arange(20).view(4, 5), check)
    assert not torch.equal(asked[1], asked[2])
    assert torch.equal(block.weight, asked[2])


def test_scores_are_the_affine_map() -> None:
    train = random_split("an", 20, 5, 3)
    block = block_of("an", STARTS, train, 5)
    for head, scores in enumerate(block.scores(train.features)):
        want = train.features @ block.weight[head].T + block.bias[head]
        torch.testing.assert_close(scores, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("in_views", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_captured_step_is_the_step(loss: str, in_views: bool) -> None:
    train = random_split(loss, 200, 64, 20)
    on_gpu = Split(train.image_id, train.features.cuda(), train.observed.cuda(), train.true)
    batches, views = batches_of_epoch(200, 2, torch.Generator().manual_seed(0)), None
    if in_views:
        train = with_views(train)
        on_gpu = replace(on_gpu, views=train.all_views().cuda())
        views = torch.randint(3, batches.shape, generator=torch.Generator().manual_seed(1))
    blocks = [block_of(loss, STARTS, split, 2) for split in (train, on_gpu)]
    for block in blocks:
        block.begin_epoch(3, 5)
    losses = [block.epoch(batches, views=views) for block in blocks]
    torch.testing.assert_close(losses[0], losses[1].cpu(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        blocks[0].parameters, blocks[1].parameters.cpu(), rtol=1e-4, atol=1e-5
    )
