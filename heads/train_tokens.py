"""train_tokens(): heads on spatial features, batch by batch from memory or off the disk."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.configs.allocator import keep_freed_memory
from mlc.configs.progress import Progress, silent
from mlc.heads.checkpoint import Checkpoint, checkpoint_path
from mlc.heads.config import NOT_SETTINGS, TrainConfig
from mlc.heads.head_size import HeadSize
from mlc.heads.inputs import EvalViews, Split, mean_of_views
from mlc.heads.order import batches_of_epoch, order_generators, stream_seed
from mlc.heads.plan import require_memory
from mlc.heads.token_training import Part, TokenTraining
from mlc.heads.tokens import Scorer, TokenReader, Tokens
from mlc.heads.trained import Diverged, TrainedHead, selection_targets

SCORED_AT_ONCE = 64  # images


@dataclass(frozen=True)
class Batch:
    """The images of a step.

    Attributes:
        number: of the step, from 0.
        epoch: from 1.
        last: of its epoch.
        places: (B,) of the training split.
        units: (B,) of the store, each in the view in which it is seen.
    """

    number: int
    epoch: int
    last: bool
    places: NDArray[np.intp]
    units: NDArray[np.intp]


def train_tokens(
    configs: Sequence[TrainConfig], splits: Mapping[str, Split], progress: Progress = silent
) -> list[TrainedHead | Diverged]:
    """Train heads on "train", select the epoch of each on "val", score "val" and "test" with it.

    By default the protocol is that of linear heads: Adam without schedule, the last partial batch
    of an epoch dropped, the order of images from ``order_seed`` alone. Features are held in memory
    or on the GPU if they fit there, and else read off the disk in each epoch, with the same
    numbers; each batch is read once for all heads, whose numbers are those that each has alone.
    Unlike those of linear heads, they may differ in the last bits with the number of torch's
    threads. What is done is saved now and then, and the same call goes on from there.

    Args:
        configs: checked, their knobs settled; they differ in nothing of ``OF_A_PASS``.
        splits: "train", "val" and "test", joined with tokens.
        progress: told of each step.

    Returns:
        For each config its head, or that its scores are not finite.

    Raises:
        MlcError: stored features are damaged, or the heads take more memory than there is.
    """
    config, train = configs[0], splits["train"]
    if train.features.device.type == "cpu":
        keep_freed_memory()
    tokens = {name: split.of_tokens() for name, split in splits.items()}
    reader = _open(config, tokens, train.features.device)
    epoch_steps = max(1, len(train.image_id) // config.batch_size)
    steps = config.epochs * epoch_steps
    size = HeadSize(tokens["train"].width, train.observed.shape[1], tokens["train"].grid)
    require_memory(configs, size, train.features.device)
    heads = [TokenTraining(each, size, train.observed, steps) for each in configs]
    checkpoint = Checkpoint(
        checkpoint_path(config.out), _fingerprint(configs, splits), config.checkpoint_minutes
    )
    done = _restore(checkpoint, heads)
    progress(done, steps, f"goes on from step {done:,}" if done else reader.note)
    # What is drawn in a step has a seed of its own; here other numbers are kept as they were.
    with torch.random.fork_rng(_gpus(train.features.device)):
        for batch, parts in _steps(config, train, reader, done):
            active = [head for head in heads if not head.best.ended]
            _begin_epoch(active, batch, tokens["train"], reader, config)
            for part in parts:
                for head in active:
                    head.add(part, batch.number)
            for head in active:
                head.step(batch.number)
            if batch.last:
                _end_epoch(active, splits["val"], tokens["val"], reader, config, epoch_steps)
            if checkpoint.due(epoch_ended=batch.last):
                checkpoint.save(_state(heads, batch.number + 1))
            progress(batch.number + 1, steps, _note(heads, batch.epoch))
            if all(head.best.ended for head in heads):
                break
    return _finish(heads, tokens, reader, config.eval_views)


def score_tokens(
    scorers: Sequence[Scorer], tokens: Tokens, reader: TokenReader, eval_views: EvalViews
) -> list[NDArray[np.float32]]:
    """Return the logits (n, L) float32 that each of some heads gives a split.

    Of the first view, or the mean of all; each batch is read once.
    """
    of_views: list[list[Tensor]] = [[] for _ in scorers]
    with torch.inference_mode():
        for view in range(tokens.views if eval_views == "mean" else 1):
            units = tokens.units(view=view)
            parts = [
                units[start : start + SCORED_AT_ONCE]
                for start in range(0, len(units), SCORED_AT_ONCE)
            ]
            scored: list[list[Tensor]] = [[] for _ in scorers]
            for batch in reader.read(parts):
                for scorer, logits in zip(scorers, scored, strict=True):
                    logits.append(scorer(batch))
            for views, logits in zip(of_views, scored, strict=True):
                views.append(torch.cat(logits))
        return [mean_of_views(views).cpu().numpy() for views in of_views]


def score_split(
    head: Scorer,
    tokens: Tokens,
    device: torch.device,
    eval_views: EvalViews,
    *,
    check: bool = True,
) -> NDArray[np.float32]:
    """Return a head's logits of a split that is read for this alone, (n, L) float32."""
    views = tokens.views if eval_views == "mean" else 1
    reader = TokenReader.open([tokens], device, SCORED_AT_ONCE, views=views, check=check)
    return score_tokens([head], tokens, reader, eval_views)[0]


def _open(config: TrainConfig, tokens: Mapping[str, Tokens], device: torch.device) -> TokenReader:
    all_views = config.view_augment or config.eval_views == "mean"
    return TokenReader.open(
        list(tokens.values()),
        device,
        max(config.micro_batch or config.batch_size, SCORED_AT_ONCE),
        views=tokens["train"].views if all_views else 1,
        check=config.check,
    )


def _batches(config: TrainConfig, train: Tokens) -> Iterator[list[Batch]]:
    """Yield the batches of each epoch."""
    order, drawn = order_generators(config.order_seed)
    number = 0
    for epoch in range(1, config.epochs + 1):
        places = batches_of_epoch(len(train.rows), config.batch_size, order)
        views = torch.zeros_like(places)
        if config.view_augment:
            views = torch.randint(train.views, places.shape, generator=drawn)
        batches = []
        for index, (each, seen) in enumerate(zip(places.numpy(), views.numpy(), strict=True)):
            last = index == len(places) - 1
            batches.append(Batch(number + index, epoch, last, each, train.units(each, seen)))
        number += len(batches)
        yield batches


def _steps(
    config: TrainConfig, train: Split, reader: TokenReader, done: int
) -> Iterator[tuple[Batch, Iterator[Part]]]:
    """Yield each batch that is not done yet, and its images as they go through heads.

    The parts of a batch are to be taken before the next batch is.
    """
    for epoch in _batches(config, train.of_tokens()):
        left = [batch for batch in epoch if batch.number >= done]
        size = config.micro_batch or config.batch_size
        cuts = [
            [slice(start, start + size) for start in range(0, len(batch.units), size)]
            for batch in left
        ]
        read = reader.read(
            [batch.units[cut] for batch, own in zip(left, cuts, strict=True) for cut in own]
        )
        for batch, own in zip(left, cuts, strict=True):
            yield batch, _parts(config, train, batch, own, read)


def _kept_tokens(config: TrainConfig, tokens: Tokens, batch: Batch) -> Tensor | None:
    """Return which tokens (B, t) of each image a step sees, None if all."""
    if not config.token_dropout:
        return None
    count = tokens.count
    generator = torch.Generator().manual_seed(stream_seed(config.order_seed, batch.number))
    keep = max(1, round(count * (1 - config.token_dropout)))
    return torch.rand(len(batch.units), count, generator=generator).topk(keep, dim=1).indices


def _parts(
    config: TrainConfig,
    train: Split,
    batch: Batch,
    cuts: Sequence[slice],
    read: Iterator[Tensor],
) -> Iterator[Part]:
    """Yield the parts of a batch as they are read."""
    kept = _kept_tokens(config, train.of_tokens(), batch)
    rows = torch.from_numpy(batch.places).to(train.observed.device)
    for index, (cut, tokens) in enumerate(zip(cuts, read, strict=False)):
        places = None
        if kept is not None:
            places = kept[cut].to(tokens.device)
            tokens = tokens.take_along_dim(places[:, :, None], dim=1)
        own = rows[cut]
        yield Part(index, len(own) / len(rows), tokens, places, own)
    if batch.last:
        next(read, None)  # at its end the reader is free for others


def _begin_epoch(
    heads: Sequence[TokenTraining],
    batch: Batch,
    tokens: Tokens,
    reader: TokenReader,
    config: TrainConfig,
) -> None:
    """Have losses change what they change, by the scores of all training images if need be."""
    for head in heads:

        def score(head: TokenTraining = head) -> Tensor:
            (logits,) = score_tokens(head.scorers()[:1], tokens, reader, "first")
            return torch.from_numpy(logits)[None].to(head.changing.observed.device)

        head.changing.begin_epoch(batch.epoch, config.epochs, score)


def _end_epoch(
    heads: Sequence[TokenTraining],
    val: Split,
    tokens: Tokens,
    reader: TokenReader,
    config: TrainConfig,
    steps: int,
) -> None:
    scorers = [head.scorers() for head in heads]
    logits = iter(
        score_tokens([each for own in scorers for each in own], tokens, reader, config.eval_views)
    )
    targets = selection_targets(val, config.val_labels)
    for head, own in zip(heads, scorers, strict=True):
        head.end_epoch([next(logits) for _ in own], targets, steps)


def _finish(
    heads: Sequence[TokenTraining],
    tokens: Mapping[str, Tokens],
    reader: TokenReader,
    eval_views: EvalViews,
) -> list[TrainedHead | Diverged]:
    sound = [head for head in heads if not head.best.diverged]
    scorers = [head.best_scorer() for head in sound]
    logits = {
        name: iter(score_tokens(scorers, tokens[name], reader, eval_views))
        for name in ("val", "test")
    }
    return [
        Diverged(head.config.loss)
        if head.best.diverged
        else TrainedHead(
            head.best.state,
            head.best.epoch,
            head.best.history,
            {name: next(each) for name, each in logits.items()},
        )
        for head in heads
    ]


def _state(heads: Sequence[TokenTraining], done: int) -> dict[str, Any]:
    return {"done": done, "heads": [head.state() for head in heads]}


def _restore(checkpoint: Checkpoint, heads: Sequence[TokenTraining]) -> int:
    """Bring heads to where they were; return how many steps are done."""
    saved = checkpoint.restore()
    if saved is None:
        return 0
    for head, state in zip(heads, saved["heads"], strict=True):
        head.restore(state)
    return int(saved["done"])


def _fingerprint(configs: Sequence[TrainConfig], splits: Mapping[str, Split]) -> str:
    """Return a hash of all that the numbers of a training depend on."""
    settings = [each.model_dump(mode="json", exclude=NOT_SETTINGS) for each in configs]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, split in sorted(splits.items()):
        tokens = split.of_tokens()
        digest.update(name.encode() + tokens.array.crc32c.tobytes() + tokens.rows.tobytes())
        digest.update(split.observed.cpu().numpy().tobytes() + split.true.tobytes())
    return digest.hexdigest()


def _note(heads: Sequence[TokenTraining], epoch: int) -> str:
    best = max((head.best.map for head in heads), default=0.0)
    return f"epoch {epoch}, val mAP {best:.2f}" if best > 0 else f"epoch {epoch}"


def _gpus(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
