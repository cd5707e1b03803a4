"""MovingAverage: an exponential moving average of a head's parameters."""

import torch
from torch import nn


class MovingAverage:
    """The average of a head's state over its steps.

    Attributes:
        state: its tensors; those that are no floats are the newest.
    """

    def __init__(self, head: nn.Module, decay: float, *, warm_up: bool) -> None:
        self._decay, self._warm_up = decay, warm_up
        self.state = {name: each.detach().clone() for name, each in head.state_dict().items()}

    @torch.no_grad()
    def update(self, head: nn.Module, step: int) -> None:
        """Take the state after a step, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step)) if self._warm_up else self._decay
        new = head.state_dict()
        floats = [name for name, each in self.state.items() if each.is_floating_point()]
        torch._foreach_lerp_(
            [self.state[name] for name in floats], [new[name] for name in floats], 1 - decay
        )
        for name in self.state.keys() - set(floats):
            self.state[name].copy_(new[name])
