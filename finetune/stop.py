"""StopAsked: Ctrl-C and SIGTERM end a training after a step, with its state on the disk."""

import signal
from types import FrameType, TracebackType


class StopAsked:
    """Takes the first of the signals as a wish, the second as an order.

    A context: outside of it the signals are as before. Only the main thread gets signals; in others
    it never hears one.

    Attributes:
        name: of the signal that came; empty if none did.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopAsked":
        for each in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[each] = signal.signal(each, self._hear)
            except ValueError:  # not the main thread
                return self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)  # type: ignore[arg-type]

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            raise KeyboardInterrupt("stopped at once; the same command goes on from the last state")
        self.name = signal.Signals(number).name
