"""profile(): a trace of some batches of the pipeline, to be looked at in a browser."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import profiler
from torch._C._profiler import _ExperimentalConfig

from mlc.configs.errors import MlcError
from mlc.configs.files import written_aside

BATCHES = 20
ENDINGS = (".json", ".json.gz")
NO_SPAN = nullcontext()  # one for all: it has no state


@contextmanager
def profile(
    path: Path | None, tell: Callable[[str], None], batches: int = BATCHES
) -> Iterator[Callable[[], None]]:
    """Record a trace of some batches while a block runs; yield what it calls after each batch.

    The first batch is left out, as it pays for what is set up once. After the last one the
    profiler is gone: the rest of the job runs as it does without. Where fewer batches come, or the
    block raises, the trace is of those that came. What it shows: torch's operators, GPU kernels
    and copies, and the blocks of ``span``, of all threads (before torch 2.7 of the calling thread
    alone). What torch itself logs of a GPU that it cannot trace, ``KINETO_LOG_LEVEL=0`` shows.

    Args:
        path: the trace, a Chrome trace in JSON, whole or absent; compressed if it ends in ".gz".
            None for no trace.
        tell: given a sentence on where it is and how to look at it, or why there is none. That it
            cannot be written does not stop the job.
        batches: that are recorded, at most.

    Raises:
        MlcError: the path does not end in one of ``ENDINGS``, or is a folder; before the block.
    """
    if path is None:
        yield lambda: None
        return
    check_trace_path(path)
    trace = _Trace(path, tell, batches)
    try:
        yield trace.step
    finally:
        trace.close()


def check_trace_path(path: Path) -> None:
    """Raise an MlcError if a trace cannot have this path."""
    if not path.name.endswith(ENDINGS):
        raise MlcError(f"profile: should end in {' or '.join(ENDINGS)}, got {path}")
    if path.is_dir():
        raise MlcError(f"{path}: is a folder; name a file")


def span(name: str) -> AbstractContextManager[object]:
    """Return a block that a trace shows under a name; it costs nothing where none is recorded."""
    return profiler.record_function(name) if _Trace.recording else NO_SPAN


class _Trace:
    """A trace in the making.

    Args:
        path: where it goes.
        tell: what came of it.
        batches: that it is to have.
    """

    recording = False  # any; torch has one profiler for all threads

    def __init__(self, path: Path, tell: Callable[[str], None], batches: int) -> None:
        self._path, self._tell, self._batches = path, tell, batches
        self._profiler: profiler.profile | None = None
        self._recorded = 0
        self._closed = False

    def step(self) -> None:
        """Count a batch, and start or end with it."""
        if self._closed:
            return
        if self._profiler is None:
            self._profiler = _start()
            _Trace.recording = True
            return
        self._recorded += 1
        if self._recorded == self._batches:
            self.close()

    def close(self) -> None:
        """Write what there is, once."""
        if self._closed:
            return
        self._closed = True
        if self._profiler is not None:
            _Trace.recording = False
            self._profiler.stop()
        if self._profiler is None or not self._recorded:
            self._tell("profile: there is none, as no batch came after the first")
            return
        try:
            _write(self._profiler, self._path)
        except (OSError, RuntimeError, MlcError) as error:
            self._tell(f"profile: {self._path} cannot be written ({error})")
        else:
            self._tell(
                f"profile: {self._path}, batches traced: {self._recorded}; open it at "
                "https://ui.perfetto.dev (it stays on your machine) or chrome://tracing"
            )
        self._profiler = None  # it holds all events


def _start() -> profiler.profile:
    # Torch's own log would be between our lines of JSON, with an error where there is no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(profiler.ProfilerActivity.CUDA)
    try:  # threads that decode were there before: torch would record those it starts itself alone
        config = _ExperimentalConfig(profile_all_threads=True)
    except TypeError:
        config = None
    started = profiler.profile(activities=activities, experimental_config=config)
    started.start()
    return started


def _write(recorded: profiler.profile, path: Path) -> None:
    """Write a trace; torch compresses by the ending, so the unfinished file has the same."""
    with written_aside(path) as partial:
        unfinished = partial.with_name(f"{partial.name}{path.suffix}")
        try:
            recorded.export_chrome_trace(str(unfinished))
            unfinished.replace(partial)
        finally:
            unfinished.unlink(missing_ok=True)
