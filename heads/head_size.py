"""HeadSize: what a head must know of its inputs and outputs, and how its seed reaches torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mlc.configs.errors import MlcError


@dataclass(frozen=True)
class HeadSize:
    """Sizes of a head's inputs and outputs.

    Attributes:
        width: of the features: D or C.
        classes: L.
        grid: (H, W) of the tokens, if it reads those and they have one.
    """

    width: int
    classes: int
    grid: tuple[int, int] | None = None

    def of_grid(self) -> tuple[int, int]:
        """Return the grid.

        Raises:
            MlcError: there is none.
        """
        if self.grid is None:
            raise MlcError(
                "head: needs to know where tokens lie, and the features have no grid; take a "
                "head that does not, as attention-pool"
            )
        return self.grid


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Have torch's own initial weights come from a generator's seed, and leave other numbers be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        yield
