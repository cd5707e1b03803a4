"""A file of a backbone's tensors, its classifier left out, and how it wants its images."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlc.configs.errors import MlcError
from mlc.extract.network import Network

MARK = "mlc_backbone"  # of the metadata: which architecture the tensors are of


@dataclass(frozen=True)
class BackboneFile:
    """A file that ``write_backbone_file`` wrote.

    Attributes:
        path: of the file.
        architecture: whose ``state_dict()`` it holds, without a classifier.
        mean: of the normalisation, per RGB channel, pixels in [0, 1].
        std: of the normalisation.
        licence: of the weights, "unknown" if nobody says.
    """

    path: Path
    architecture: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the names of our model.

        Raises:
            MlcError: the file is damaged.
        """
        try:
            return safetensors.torch.load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise MlcError(f"{self.path}: a damaged weights file ({error})") from None

    def fill(self, network: Network) -> Network:
        """Return a network, built without weights, with these and what they want of images.

        Raises:
            MlcError: they are of another architecture.
        """
        problem = ""
        if network.architecture != self.architecture:
            problem = f"are of {self.architecture}, got backbone {network.architecture}"
        else:
            try:
                network.module.load_state_dict(self.tensors(), strict=True)
            except RuntimeError as error:  # torch's own lists all keys that do not fit
                problem = f"do not fit {self.architecture} ({' '.join(str(error).split())})"
        if problem:
            raise MlcError(f"{self.path}: these weights {problem}; name the backbone they are of")
        return replace(network, mean=self.mean, std=self.std, licence=self.licence)


def write_backbone_file(file: BackboneFile, tensors: Mapping[str, Tensor]) -> None:
    """Write a backbone's tensors by the names of our model, without a classifier."""
    metadata = {
        MARK: file.architecture,
        "mean": json.dumps(file.mean),
        "std": json.dumps(file.std),
        "licence": file.licence,
    }
    # Tensors of a file that is mapped, or of one storage, are not to be written as they lie.
    owned = {
        name: each.clone(memory_format=torch.contiguous_format) for name, each in tensors.items()
    }
    safetensors.torch.save_file(owned, file.path, metadata)


def read_backbone_file(path: Path) -> BackboneFile | None:
    """Return what a weights file says of itself; None if it is not one of these."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):  # what reads the file as one of another kind says why
        return None
    if MARK not in metadata:
        return None
    return BackboneFile(
        path=path,
        architecture=metadata[MARK],
        mean=tuple(json.loads(metadata["mean"])),
        std=tuple(json.loads(metadata["std"])),
        licence=metadata["licence"],
    )
