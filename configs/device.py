"""Where tensors live: "auto", or a torch device by name."""

import torch

from mlc.configs.errors import MlcError


def choose_device(device: str) -> torch.device:
    """Return a device by name, "auto" being the GPU if there is one; never a silent fallback.

    Raises:
        MlcError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
        if chosen.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise MlcError(f"device: {device!r} is not to be had here ({reason})") from None
    return chosen
