"""FittingBatches: a backbone whose batches are halved until they fit the GPU's memory."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlc.configs.errors import MlcError
from mlc.extract.backbone import Backbone


class FittingBatches:
    """Runs batches whole as long as they fit, and in parts from the first that did not.

    No work is lost: the batch that was too large is run again. The parts of a batch give the same
    features as the whole but for the last bits, in which a GPU differs between batch sizes.

    Attributes:
        most: images that fit, as far as is known; None while all did.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.most: int | None = None

    def __call__(self, pixels: NDArray[np.uint8]) -> dict[str, Tensor]:
        """Return the features of a batch.

        Raises:
            MlcError: not even one image fits.
        """
        while True:
            step = self.most or len(pixels)
            try:
                parts = [
                    self._backbone.features(pixels[start : start + step])
                    for start in range(0, len(pixels), step)
                ]
                break
            except torch.OutOfMemoryError as error:
                if step == 1:
                    raise self._too_large(pixels, error) from None
            # After the error, which holds what the larger batch took.
            torch.cuda.empty_cache()  # without a GPU it does nothing
            self.most = step // 2
            self._backbone = self._backbone.for_batches(self.most)
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _too_large(self, pixels: NDArray[np.uint8], error: Exception) -> MlcError:
        return MlcError(
            f"{self._backbone.name}: not one image of {pixels.shape[1]} px fits the GPU's memory "
            f"({str(error).splitlines()[0]}); free some of it, pass a smaller --size, or "
            "--device cpu"
        )
