"""recorder(): the lines of metrics.jsonl as event files of TensorBoard."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from mlc.configs.errors import MlcError
from mlc.finetune.config import FinetuneConfig
from mlc.finetune.processes import Processes

Record = Callable[[Mapping[str, float]], None]


@contextmanager
def recorder(config: FinetuneConfig, processes: Processes) -> Iterator[Record]:
    """Yield what writes the line of an epoch, in the first process and if it is asked for.

    Raises:
        MlcError: TensorBoard is not installed.
    """
    if not config.tensorboard or not processes.first:
        yield lambda line: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MlcError(
            "tensorboard: is not installed; pip install 'mlc[tensorboard]', or leave it out"
        ) from None
    assert config.out is not None
    folder = config.out.with_name(f"{config.out.name}-tensorboard")
    with SummaryWriter(str(folder)) as writer:

        def record(line: Mapping[str, float]) -> None:
            for name in line.keys() - {"epoch"}:
                writer.add_scalar(name, line[name], int(line["epoch"]))
            writer.flush()

        yield record
