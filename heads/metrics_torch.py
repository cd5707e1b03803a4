"""The mAP of ``mlc.heads.metrics`` on the device of its tensors, without a copy to the host."""

import torch
from torch import Tensor

from mlc.configs.errors import MlcError


def step_ap(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each class as scikit-learn defines it: a step sum, ties grouped.

    Heads are taken one by one, each by the same kernels on the same shapes: about 50 bytes of
    memory per cell of one head, no read by the host, values that do not depend on other heads.

    Args:
        scores: (..., N, L), any monotone score, on any device.
        targets: (N, L) bool, the same for all heads, or (..., N, L); on the same device.

    Returns:
        (..., L) float64 in [0, 1] on that device; NaN for a class without positives, and for one
        that has NaN scores: raising there would need a read by the host.

    Raises:
        MlcError: the targets are not bool, of another shape or on another device.
    """
    _check(scores, targets)
    images, classes = scores.shape[-2:]
    heads = scores.reshape(-1, images, classes)
    shared = targets.reshape(-1, images, classes)
    values = [_head_ap(head, shared[index % len(shared)]) for index, head in enumerate(heads)]
    return torch.stack(values).reshape(*scores.shape[:-2], classes)


def mean_ap(scores: Tensor, targets: Tensor) -> Tensor:
    """Return (...) float64, mAP in per cent: ``step_ap``, a class without positives counts 0.

    It is NaN for a head that has NaN scores in a class with positives. Arguments and errors are
    those of ``step_ap``.
    """
    values = step_ap(scores, targets)
    return 100 * torch.where(targets.any(dim=-2), values, 0).mean(dim=-1)


def _head_ap(scores: Tensor, targets: Tensor) -> Tensor:
    """Return (L,) of one head's (N, L)."""
    values, order = scores.T.contiguous().sort(dim=1, descending=True)
    found = targets.T.contiguous().gather(1, order).cumsum(dim=1)
    # Precision counts where a group of ties ends, once for each positive in the group.
    ends_tie = torch.ones_like(values, dtype=torch.bool)
    ends_tie[:, :-1] = values[:, 1:] != values[:, :-1]
    found_at_ends = torch.where(ends_tie, found, 0)
    earlier = torch.zeros_like(found)
    earlier[:, 1:] = found_at_ends.cummax(dim=1).values[:, :-1]
    ranks = torch.arange(1, values.shape[1] + 1, device=values.device)
    precision = found.double() / ranks
    steps = torch.where(ends_tie, found - earlier, 0)
    ap = (precision * steps).sum(dim=1) / targets.sum(dim=0)
    return torch.where(values[:, 0].isnan(), torch.nan, ap)  # NaN is sorted above all numbers


def _check(scores: Tensor, targets: Tensor) -> None:
    if targets.dtype != torch.bool:
        raise MlcError(f"targets: should be bool, got {targets.dtype}; pass labels == 1")
    if targets.device != scores.device:
        raise MlcError(
            f"targets: should be on {scores.device} as the scores, got {targets.device}; move them"
        )
    if targets.shape not in (scores.shape, scores.shape[-2:]):
        raise MlcError(
            f"targets: should be {tuple(scores.shape[-2:])} as the scores or "
            f"{tuple(scores.shape)} with their heads, got {tuple(targets.shape)}; "
            "pass the targets of these images"
        )
