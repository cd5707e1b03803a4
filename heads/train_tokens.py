"""train_tokens(): a head on spatial features, batch by batch from memory or off the disk."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlc.configs.progress import Progress, silent
from mlc.heads.config import TrainConfig
from mlc.heads.explain import estimated_positives
from mlc.heads.inputs import EvalViews, Split, mean_of_views
from mlc.heads.losses import LOSSES, loss_value
from mlc.heads.metrics import mean_ap
from mlc.heads.modules import HEADS
from mlc.heads.order import batches_of_epoch, order_generators
from mlc.heads.tokens import TokenReader, Tokens
from mlc.heads.trained import Diverged, TrainedHead, selection_targets

SCORED_AT_ONCE = 64  # images


def train_tokens(
    config: TrainConfig, splits: Mapping[str, Split], progress: Progress = silent
) -> TrainedHead | Diverged:
    """Train a head of tokens on "train", select its epoch on "val", score "val" and "test" with it.

    The protocol is that of linear heads: Adam without schedule, the last partial batch of an epoch
    dropped, the order of images from ``order_seed`` alone. Features are held in memory or on the
    GPU if they fit there, and else read off the disk in each epoch, with the same numbers. Unlike
    those of linear heads, numbers may differ in the last bits with the number of torch's threads.

    Args:
        config: checked, its knobs settled.
        splits: "train", "val" and "test", joined with tokens.
        progress: told after each epoch.

    Returns:
        The head, or that its scores are not finite.

    Raises:
        MlcError: stored features are damaged.
    """
    val, device = splits["val"], splits["train"].features.device
    tokens = {name: split.of_tokens() for name, split in splits.items()}
    reader = _open(config, tokens, device)
    progress(0, config.epochs, reader.note)
    classes = splits["train"].observed.shape[1]
    head = HEADS[config.head](
        tokens["train"].width, classes, torch.Generator().manual_seed(config.seed)
    ).to(device)
    optimiser = _optimiser(head, config)
    history: list[dict[str, float]] = []
    best, best_epoch, best_map = _state(head), 0, -math.inf
    for epoch, batches in enumerate(_epochs(config, tokens["train"]), start=1):
        loss = _train(config, head, optimiser, splits["train"], reader, batches)
        logits = score_tokens(head, tokens["val"], reader, config.eval_views)
        if not np.isfinite(logits).all():
            return Diverged(config.loss)
        probs = torch.from_numpy(logits).sigmoid()
        val_map = float(mean_ap(probs.numpy(), selection_targets(val, config.val_labels)))
        line = {"epoch": epoch, "loss": loss, "val_mAP": val_map}
        history.append(line | {"val_estimated_positives": estimated_positives(probs)})
        if val_map > best_map:
            best, best_epoch, best_map = _state(head), epoch, val_map
        progress(epoch, config.epochs, f"val mAP {best_map:.2f}")
    head.load_state_dict(best)
    logits_of = {
        name: score_tokens(head, tokens[name], reader, config.eval_views)
        for name in ("val", "test")
    }
    return TrainedHead(best, best_epoch, history, logits_of)


@torch.inference_mode()
def score_tokens(
    head: nn.Module, tokens: Tokens, reader: TokenReader, eval_views: EvalViews
) -> NDArray[np.float32]:
    """Return a head's logits of a split, (n, L) float32, of the first view or the mean of all."""
    of_views = []
    for view in range(tokens.views if eval_views == "mean" else 1):
        units = tokens.units(view=view)
        parts = [
            units[start : start + SCORED_AT_ONCE] for start in range(0, len(units), SCORED_AT_ONCE)
        ]
        of_views.append(torch.cat([head(batch) for batch in reader.read(parts)]))
    logits: NDArray[np.float32] = mean_of_views(of_views).cpu().numpy()
    return logits


def score_split(
    head: nn.Module,
    tokens: Tokens,
    device: torch.device,
    eval_views: EvalViews,
    *,
    check: bool = True,
) -> NDArray[np.float32]:
    """Return a head's logits of a split that is read for this alone, (n, L) float32."""
    views = tokens.views if eval_views == "mean" else 1
    reader = TokenReader.open([tokens], device, SCORED_AT_ONCE, views=views, check=check)
    return score_tokens(head, tokens, reader, eval_views)


def _open(config: TrainConfig, tokens: Mapping[str, Tokens], device: torch.device) -> TokenReader:
    all_views = config.view_augment or config.eval_views == "mean"
    return TokenReader.open(
        list(tokens.values()),
        device,
        max(config.batch_size, SCORED_AT_ONCE),
        views=tokens["train"].views if all_views else 1,
        check=config.check,
    )


def _epochs(
    config: TrainConfig, train: Tokens
) -> Iterator[list[tuple[NDArray[np.intp], NDArray[np.intp]]]]:
    """Yield the batches of each epoch: which images, and their units in the views they are seen."""
    order, drawn = order_generators(config.order_seed)
    for _ in range(config.epochs):
        places = batches_of_epoch(len(train.rows), config.batch_size, order)
        views = torch.zeros_like(places)
        if config.view_augment:
            views = torch.randint(train.views, places.shape, generator=drawn)
        yield [
            (each.numpy(), train.units(each.numpy(), seen.numpy()))
            for each, seen in zip(places, views, strict=True)
        ]


def _train(
    config: TrainConfig,
    head: nn.Module,
    optimiser: torch.optim.Optimizer,
    train: Split,
    reader: TokenReader,
    batches: list[tuple[NDArray[np.intp], NDArray[np.intp]]],
) -> float:
    """Take a step for each batch; return the mean loss."""
    method, total = LOSSES[config.loss], 0.0
    tokens = reader.read([units for _, units in batches])
    for (places, _), batch in zip(batches, tokens, strict=True):
        labels = train.observed[torch.from_numpy(places).to(train.observed.device)]
        loss = loss_value(method, head(batch), labels, knobs=config.knobs)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        total += float(loss.detach())
    return total / len(batches)


def _optimiser(head: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW, which without decay is Adam; biases do not decay."""
    named = dict(head.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [each for name, each in named.items() if not name.endswith("bias")]},
        {
            "params": [each for name, each in named.items() if name.endswith("bias")],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def _state(head: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().cpu().clone() for name, each in head.state_dict().items()}
