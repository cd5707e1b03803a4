"""The optimisers and the learning rate of heads of tokens."""

import math
from typing import Any

import torch
from torch import nn

from mlc.heads.recipe import RecipeConfig

BETA2 = 0.999
RISE = 0.2  # of all steps
START_DIVISOR, END_DIVISOR = 25.0, 1e4
BETA1_LOW, BETA1_HIGH = 0.85, 0.95


def make_optimiser(
    head: nn.Module, recipe: RecipeConfig, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return the optimiser of a head's parameters, those that decay in its first group."""
    named = {name: each for name, each in head.named_parameters() if each.requires_grad}
    apart = {
        name
        for name, each in named.items()
        if recipe.decay == "weights" and (name.endswith("bias") or each.dim() == 1)
    }
    groups: list[dict[str, Any]] = [
        {"params": [each for name, each in named.items() if name not in apart]},
        {"params": [named[name] for name in named if name in apart], "weight_decay": 0.0},
    ]
    make = torch.optim.AdamW if recipe.optimiser == "adamw" else torch.optim.Adam
    return make([group for group in groups if group["params"]], lr=lr, weight_decay=weight_decay)


def set_rate(
    optimiser: torch.optim.Optimizer, recipe: RecipeConfig, lr: float, step: int, steps: int
) -> None:
    """Set what the schedule says of a step, counted from 0."""
    if recipe.schedule == "constant":
        return
    rate, beta1 = one_cycle(step, steps, lr)
    for group in optimiser.param_groups:
        group["lr"], group["betas"] = rate, (beta1, BETA2)


def one_cycle(step: int, steps: int, peak: float) -> tuple[float, float]:
    """Return the learning rate and Adam's beta1 of a step.

    Along half a cosine each, the rate rises from peak / 25 to the peak in the first fifth of the
    steps and falls to peak / 250,000 in the rest, while beta1 goes from 0.95 to 0.85 and back.

    Args:
        step: from 0.
        steps: of the whole training.
        peak: the highest rate.

    Source: Smith and Topin 2019, https://arxiv.org/abs/1708.07120, as ``OneCycleLR`` of torch with
    ``pct_start=0.2``, which Query2Label's code uses.
    """
    top, last = RISE * steps - 1, steps - 1
    start = peak / START_DIVISOR
    if step <= top and top > 0:
        share = step / top
        return _cosine(start, peak, share), _cosine(BETA1_HIGH, BETA1_LOW, share)
    share = (step - top) / (last - top)
    return _cosine(peak, start / END_DIVISOR, share), _cosine(BETA1_LOW, BETA1_HIGH, share)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
