"""Optimisers and learning rates of heads of tokens, and of end-to-end training."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mlc.heads.recipe import RecipeConfig

BETA2 = 0.999
PEAK = "peak"  # of a group of parameters: the highest learning rate of its schedule
RISE = 0.2  # of all steps
START_DIVISOR, END_DIVISOR = 25.0, 1e4
BETA1_LOW, BETA1_HIGH = 0.85, 0.95


def make_optimiser(
    parts: Sequence[tuple[nn.Module, float]], recipe: RecipeConfig, weight_decay: float
) -> torch.optim.Optimizer:
    """Return the optimiser of some modules' parameters, those that are trained.

    Args:
        parts: modules, each with its learning rate, or the peak of it.
        recipe: which optimiser, and what decays.
        weight_decay: of what decays: of each part the first group of parameters.
    """
    groups: list[dict[str, Any]] = []
    for module, lr in parts:
        named = {name: each for name, each in module.named_parameters() if each.requires_grad}
        apart = {
            name
            for name, each in named.items()
            if recipe.decay == "weights" and (name.endswith("bias") or each.dim() == 1)
        }
        decaying = [each for name, each in named.items() if name not in apart]
        still = [each for name, each in named.items() if name in apart]
        groups.append({"params": decaying, "lr": lr, PEAK: lr, "weight_decay": weight_decay})
        groups.append({"params": still, "lr": lr, PEAK: lr, "weight_decay": 0.0})
    make = torch.optim.AdamW if recipe.optimiser == "adamw" else torch.optim.Adam
    return make([group for group in groups if group["params"]])


def set_rate(optimiser: torch.optim.Optimizer, recipe: RecipeConfig, step: int, steps: int) -> None:
    """Set what the schedule says of a step, counted from 0."""
    if recipe.schedule == "constant":
        return
    for group in optimiser.param_groups:
        rate, beta1 = one_cycle(step, steps, group[PEAK])
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
