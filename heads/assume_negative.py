"""Losses that take every label which is not an observed positive for a negative."""

import torch
from torch import Tensor

from mlc.heads.bce import bce_ls, negative_log


def an(logits: Tensor, labels: Tensor) -> Tensor:
    """Assume negative (AN): binary cross-entropy with unknown labels taken for negatives.

    Args:
        logits: (..., B, L), unbounded.
        labels: (..., B, L), +1 observed positive; all else is assumed negative.

    Returns:
        (..., B, L) cells, not reduced.

    Source: Cole et al. 2021, section 3; ``loss_an`` of the release.
    """
    return an_ls(logits, labels, smoothing=0.0)


def an_ls(logits: Tensor, labels: Tensor, *, smoothing: float | Tensor = 0.1) -> Tensor:
    """Assume negative with label smoothing, of observed positives and assumed negatives alike.

    Args:
        logits: (..., B, L), unbounded.
        labels: (..., B, L), +1 observed positive; all else is assumed negative.
        smoothing: weight off the target; 0.1 as released, where the paper's text means 0.05.

    Returns:
        (..., B, L) cells, not reduced.

    Source: Cole et al. 2021, section 3; ``loss_an_ls`` of the release.
    """
    return bce_ls(logits, torch.where(labels == 1, 1, -1), smoothing=smoothing)


def wan(logits: Tensor, labels: Tensor, *, negative_weight: float | Tensor | None = None) -> Tensor:
    """Weak assume negative (WAN): AN whose assumed negatives together weigh one positive.

    Args:
        logits: (..., B, L), unbounded.
        labels: (..., B, L), +1 observed positive; all else is assumed negative.
        negative_weight: by default the paper's 1 / (L - 1).

    Returns:
        (..., B, L) cells, not reduced.

    Source: Cole et al. 2021, section 3; ``loss_wan`` of the release.
    """
    if negative_weight is None:
        negative_weight = 1 / max(1, logits.shape[-1] - 1)
    probs = torch.sigmoid(logits)
    return torch.where(labels == 1, negative_log(probs), negative_weight * negative_log(1 - probs))
