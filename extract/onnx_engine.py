"""onnxruntime: the folded forward pass as one graph, on a CPU."""

import warnings
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from mlc.configs.errors import MlcError
from mlc.extract.fold import fold_batchnorms
from mlc.extract.forward import Engine, FixedBatch, ForwardPass
from mlc.extract.lanes import share_cores

MOST_BYTES = (1 << 31) - (1 << 24)  # protobuf's limit of a message, less room for the graph
PIXELS = "pixels"


def build_onnxruntime(forward: ForwardPass, batch_size: int, threads: int | None = None) -> Engine:
    """Return an engine that runs a forward pass, exported for one batch size, in onnxruntime.

    The batch size is fixed: a dynamic one would need a reader without checks of its shapes, and
    every batch of a store but its shards' last is of this size. Nothing is written to disk.

    Args:
        forward: what it does, on a CPU in float32.
        batch_size: of its batches.
        threads: that work on a batch; by default as in one of the ``Lanes``.

    Raises:
        MlcError: onnxruntime or what the export needs is not installed, it is for a GPU, the
            weights are above 2 GB, or the network cannot be exported.
    """
    if forward.device.type != "cpu":
        raise MlcError(
            f"engine: onnxruntime runs on a CPU here, got device {str(forward.device)!r}; "
            "choose torch or inductor"
        )
    runtime = _import_runtime()
    graph = export_graph(fold_batchnorms(forward), batch_size)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or share_cores().threads
    # Threads that wait would spin on the cores that decode the next images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(pixels: Tensor) -> dict[str, Tensor]:
        arrays = session.run(names, {PIXELS: pixels.contiguous().numpy()})
        return {name: torch.from_numpy(each) for name, each in zip(names, arrays, strict=True)}

    return FixedBatch(run, batch_size)


@torch.no_grad()
def export_graph(forward: ForwardPass, batch_size: int) -> bytes:
    """Return a forward pass as an ONNX model, (B, S, S, 3) uint8 -> its arrays by their names.

    Raises:
        MlcError: see ``build_onnxruntime``.
    """
    network = forward.reader.network
    size = sum(each.nbytes for each in network.module.state_dict().values())
    if size > MOST_BYTES:
        raise MlcError(
            f"engine: {network.architecture} has {size / 1e9:.1f} GB of weights, an ONNX model "
            "takes 2 GB; choose folded or torch"
        )
    pixels = torch.zeros(batch_size, network.size_px, network.size_px, 3, dtype=torch.uint8)
    names = list(forward(pixels[:1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries', of what is to come in their versions
            program: Any = torch.onnx.export(
                _Graph(forward).eval(),
                (pixels,),
                dynamo=True,
                input_names=[PIXELS],
                output_names=names,
                verbose=False,
            )
        graph: bytes = program.model_proto.SerializeToString()
    except Exception as error:  # of torch.export, onnxscript and onnx, without a common base
        raise MlcError(
            f"engine: {network.architecture} cannot be exported for onnxruntime "
            f"({' '.join(str(error).split())[:160]}); choose folded or torch"
        ) from None
    return graph


class _Graph(nn.Module):
    """A forward pass as the exporter wants it: a module that owns the weights."""

    def __init__(self, forward: ForwardPass) -> None:
        super().__init__()
        self.module = forward.reader.network.module
        self._run = forward

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._run(pixels).values())


def _import_runtime() -> Any:
    """Return onnxruntime; what torch's exporter needs beside it must be there too."""
    try:
        runtime = import_module("onnxruntime")
        import_module("onnxscript")
    except ModuleNotFoundError as error:
        raise MlcError(
            f"engine: onnxruntime needs the package {error.name}, which is not installed; "
            'pip install "mlc[onnx]"'
        ) from None
    except ImportError as error:
        reason = " ".join(str(error).split())[:160]
        raise MlcError(f"engine: onnxruntime cannot be loaded ({reason}); choose folded") from None
    return runtime
