"""Engines: ways to run the same forward pass, each checked against eager torch before it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor

from mlc.configs.errors import MlcError, choose
from mlc.extract.fold import fold_batchnorms
from mlc.extract.forward import Engine, FixedBatch, ForwardPass, sample_pixels
from mlc.extract.onnx_engine import build_onnxruntime

AUTO = "auto"
# What "auto" tries on a CPU, see ``choose_engine``. On one core onnxruntime took 0.5 of eager
# torch's time for EfficientNet-Lite0, 0.77 for ResNet-50, 0.85 for a ViT and a Swin; folding alone
# 0.82, 0.96, and nothing. inductor was no faster than those and takes half a minute to compile.
PREFERENCE = ("onnxruntime", "folded", "torch")
TOLERANCE = 1e-5
IN_LANES = ("torch", "folded", "onnxruntime")  # that may run in several threads at once
REDUCED = (torch.float16, torch.bfloat16)
REDUCED_TOLERANCE = 0.05


@dataclass(frozen=True)
class Difference:
    """How far an engine is from eager torch where it is farthest.

    Attributes:
        array: name of the array; empty if there is no difference at all.
        largest: |engine - eager| / |eager|, Euclidean norms of what one image has in the array;
            infinite if the array is not there, is of another shape or dtype, or has no number
            somewhere.
    """

    array: str
    largest: float


@dataclass(frozen=True)
class ChosenEngine:
    """What runs.

    Attributes:
        name: of ``ENGINES``.
        engine: itself.
        note: why it is not the one that was hoped for, as sentences; empty if it is.
    """

    name: str
    engine: Engine
    note: str = ""


def choose_engine(asked: str, forward: ForwardPass, batch_size: int) -> ChosenEngine:
    """Return the engine that is asked for, built and checked.

    "auto" is eager torch on a GPU, and on a CPU the first of ``PREFERENCE`` that can be built and
    passes the check. That is an order, not a timing of this moment: the engine is part of what
    makes the features, and one machine must find its own stores again. An engine that comes out
    as the eager pass, for want of anything to fold, is called "torch".

    Args:
        asked: a name of ``ENGINES``, or "auto".
        forward: what it has to do.
        batch_size: of most batches.

    Raises:
        MlcError: there is no such engine, or the one that was asked for by name cannot be built
            here or is not within the tolerance.
    """
    if asked != AUTO:
        check_name(asked)
        return _checked(asked, forward, batch_size)
    passed_over = []
    for name in PREFERENCE if forward.device.type == "cpu" else ("torch",):
        try:
            chosen = _checked(name, forward, batch_size)
        except MlcError as error:
            passed_over.append(f"{name} is passed over: {error}")
        else:
            return ChosenEngine(chosen.name, chosen.engine, ". ".join(passed_over))
    raise AssertionError("eager torch is never passed over")


def check_name(asked: str) -> None:
    """Raise an MlcError if there is no such engine, and it is not "auto"."""
    choose({**ENGINES, AUTO: None}, asked, "engine")


@torch.inference_mode()
def check_engine(engine: Engine, eager: Engine, pixels: Tensor) -> Difference:
    """Compare an engine with eager torch, on images together and on the first one alone.

    Args:
        engine: on trial.
        eager: what it has to equal.
        pixels: (B, S, S, 3) uint8; one more than a batch tries a batch that is not full, too.
    """
    worst = Difference("", 0.0)
    for given in (pixels, pixels[:1]):
        want, got = eager(given), engine(given)
        for name in want.keys() | got.keys():
            largest = _largest(got.get(name), want.get(name))
            if largest > worst.largest:
                worst = Difference(name, largest)
    return worst


def tolerance_of(forward: ForwardPass) -> float:
    """Return the largest ``Difference`` that an engine may have.

    In float32 ``TOLERANCE``, which is what features may differ by from those of the reference
    pipeline. Two orders of summing came to 3e-6 with trained weights and 1e-6 with random ones,
    as far as eager torch itself is from float64; single numbers among an image's tokens, of which
    few are large, to 1e-4 of their root mean square, eager torch's again, so the norm is compared.
    Under autocast each layer is rounded to 8 or 11 bits, by each engine at other places.
    """
    return REDUCED_TOLERANCE if forward.dtype in REDUCED else TOLERANCE


def require_precision(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse autocast on a CPU: without instructions for it, it is ten times slower.

    Raises:
        MlcError: that is what is asked for.
    """
    if device.type == "cpu" and dtype != torch.float32:
        raise MlcError(
            f"precision: {str(dtype).removeprefix('torch.')} is for GPUs, on a CPU it is many "
            f"times slower than float32, got device {str(device)!r}; choose float32 or a GPU"
        )


def build_torch(forward: ForwardPass, _: int) -> Engine:
    """Return the forward pass itself: eager torch."""
    return forward


def build_folded(forward: ForwardPass, _: int) -> Engine:
    """Return eager torch with BatchNorms folded; the pass itself if there are none to fold."""
    return fold_batchnorms(forward)


def build_inductor(forward: ForwardPass, batch_size: int) -> Engine:
    """Return the folded pass, compiled by torch for one batch size.

    Raises:
        MlcError: there is no compiler here, or it cannot compile this network.
    """
    folded = fold_batchnorms(forward)
    compiled = torch.compile(
        folded.__call__, fullgraph=True, dynamic=False, options={"freezing": True}
    )
    engine = FixedBatch(compiled, batch_size)
    try:
        with torch.inference_mode():
            engine(sample_pixels(forward, batch_size))
    except Exception as error:  # of dynamo, inductor and the compiler, without a common base
        raise MlcError(
            f"engine: {forward.reader.network.architecture} cannot be compiled here "
            f"({' '.join(str(error).split())[:160]}); choose folded or torch"
        ) from None
    return engine


def _checked(name: str, forward: ForwardPass, batch_size: int) -> ChosenEngine:
    architecture = forward.reader.network.architecture
    try:
        engine = ENGINES[name](forward, batch_size)
        if engine is forward:
            note = "" if name == "torch" else f"{name}: there is no BatchNorm to fold, torch runs"
            return ChosenEngine("torch", engine, note)
        difference = check_engine(engine, forward, sample_pixels(forward, batch_size + 1))
    except torch.OutOfMemoryError:
        raise  # to be tried again with fewer images
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise MlcError(
            f"engine: {name} cannot run {architecture} here ({reason}); choose torch"
        ) from None
    tolerance = tolerance_of(forward)
    if difference.largest > tolerance:
        raise MlcError(
            f"engine: {name} does not give the features of eager torch for {architecture}, "
            f"{difference.array} differs by {difference.largest:.1e} of its size, "
            f"{tolerance:.0e} is allowed; choose torch"
        )
    return ChosenEngine(name, engine)


def _largest(got: Tensor | None, want: Tensor | None) -> float:
    """Return the difference of the image that differs most, see ``Difference``."""
    if got is None or want is None or (got.shape, got.dtype) != (want.shape, want.dtype):
        return inf
    size = want.flatten(1).double().norm(dim=1)
    apart = (got.double() - want.double()).flatten(1).norm(dim=1)
    # Features that are all zero have no size: what is there instead counts as it is.
    largest = float((apart / size.where(size > 0, 1.0)).max())
    return largest if isfinite(largest) else inf


ENGINES: dict[str, Callable[[ForwardPass, int], Engine]] = {
    "torch": build_torch,
    "folded": build_folded,
    "inductor": build_inductor,
    "onnxruntime": build_onnxruntime,
}
