"""Pace: how fast an extraction goes, which of its stages limits it, and what would make it faster.

The pipeline has three things to keep busy: threads that read and decode, lanes that run the
backbone (a single one on a GPU), and the writer, whose time is counted only where it keeps the
backbone waiting. Queues between them are short, so whichever is slowest is busy nearly all the time
and the others wait for it. On a CPU there is a fourth: the cores, that decoding and inference have
to share.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

STAGES = READ, DECODE, INFER, WRITE = "read", "decode", "infer", "write"
WINDOW_SECONDS = 10.0  # that "now" looks back on: some batches, whatever the machine
MOST_IDLE = 0.2  # of the time, that a GPU may be without a word
LEAST_SECONDS = 10.0  # before a warning: the first batches wait for what is set up once


@dataclass(frozen=True)
class Machine:
    """What an extraction has to run on.

    Attributes:
        workers: threads that read and decode.
        cores: that the process may use, by ``usable_cores``.
        threads: of a forward pass on a CPU.
        lanes: forward passes that run at once.
        on_gpu: the backbone runs on a GPU, and leaves the cores to the workers.
    """

    workers: int
    cores: int
    threads: int
    lanes: int = 1
    on_gpu: bool = False


class Pace:
    """How an extraction of ``total`` images goes, from now on.

    Args:
        total: images that are to be extracted.
        machine: what it runs on.
        clock: of seconds.
    """

    def __init__(
        self, total: int, machine: Machine, clock: Callable[[], float] = perf_counter
    ) -> None:
        self._total, self._machine, self._clock = total, machine, clock
        self._start = clock()
        self._counts = deque([(self._start, 0)])  # images so far, at the times of the window
        self._images = self._bad = 0
        self._busy = dict.fromkeys(STAGES, 0.0)

    def add(self, images: int, seconds: Mapping[str, float], bad: int = 0) -> None:
        """Take the news of a batch.

        Args:
            images: of it that are done now.
            seconds: busy time of each stage, as in ``Filled.seconds``: of "read" and "decode"
                summed over threads, of "infer" from the start of the forward pass until the
                features are there, of "write" the time that it kept the backbone waiting.
            bad: images of it that could not be read.
        """
        for stage, busy in seconds.items():
            self._busy[stage] += busy
        self._images += images
        self._bad += bad
        now = self._clock()
        self._counts.append((now, self._images))
        # One count from before the window is kept, so that a slow batch does not leave it empty.
        while len(self._counts) > 2 and self._counts[1][0] <= now - WINDOW_SECONDS:
            self._counts.popleft()

    def images_per_second(self) -> float:
        """Return the rate since the start."""
        return self._images / (self._seconds() or 1.0)

    def images_per_second_now(self) -> float:
        """Return the rate of the last ``WINDOW_SECONDS``, or of the last batch if it took longer.

        It falls while nothing comes.
        """
        then, images = self._counts[0]
        return (self._images - images) / (self._clock() - then or 1.0)

    def seconds_left(self) -> float | None:
        """Return the time that the other images will take at the rate since the start.

        Not at that of the last seconds, which goes up and down with every shard that is written.
        None until an image is done.
        """
        rate = self.images_per_second()
        return max(0, self._total - self._images) / rate if rate else None

    def limited_by(self) -> str | None:
        """Return the stage that keeps the others waiting, None before the first batch.

        Each resource's share of the wall time, in which it worked, is what its stages were busy
        over what it could have been::

            workers: (read + decode) / workers
            backbone: infer / lanes
            writer: write
            cores, where there is no GPU: (decode + infer * threads) / cores

        The resource with the largest share limits; of one that two stages share, the stage that
        takes more of it. Threads that wait for a core count as busy, of all stages alike: so where
        there are more of them than cores, the cores' share is above 1 and largest.
        """
        machine, busy = self._machine, self._busy
        if not any(busy.values()):
            return None
        resources = [
            {stage: busy[stage] / machine.workers for stage in (READ, DECODE)},
            {INFER: busy[INFER] / machine.lanes},
            {WRITE: busy[WRITE]},
        ]
        if not machine.on_gpu:
            core_seconds = {DECODE: busy[DECODE], INFER: busy[INFER] * machine.threads}
            resources.append({stage: each / machine.cores for stage, each in core_seconds.items()})
        limiting = max(resources, key=lambda resource: sum(resource.values()))
        return max(limiting, key=limiting.__getitem__)

    def idle_share(self) -> float | None:
        """Return the share of the time in which a GPU had no batch.

        None without a GPU, or before the first batch. It waited for decoded images or for the
        writer, and in the beginning for the first batch. Gaps within a forward pass are not seen
        from here.
        """
        if not self._machine.on_gpu or not any(self._busy.values()):
            return None
        return min(1.0, max(0.0, 1.0 - self._busy[INFER] / (self._seconds() or 1.0)))

    def line(self) -> str:
        """Return what a progress bar says beside its count, rate and time left, in a few words.

        E.g. ``412/s now, decode limits, GPU 34 % idle, 2 bad``.
        """
        rate, limiting, idle = self.images_per_second_now(), self.limited_by(), self.idle_share()
        return ", ".join(
            [f"{rate:.0f}/s now" if rate >= 100 else f"{rate:.1f}/s now"]
            + ([] if limiting is None else [f"{limiting} limits"])
            + ([] if idle is None else [f"GPU {100 * idle:.0f} % idle"])
            + ([f"{self._bad} bad"] if self._bad else [])
        )

    def warning(self) -> str | None:
        """Return a sentence on a GPU that waits more than ``MOST_IDLE`` of the time, and a remedy.

        None where there is nothing to say, or not yet.
        """
        idle, limiting, seconds = self.idle_share(), self.limited_by(), self._seconds()
        if idle is None or limiting is None or idle <= MOST_IDLE or seconds < LEAST_SECONDS:
            return None
        machine = self._machine
        more = machine.workers < machine.cores and limiting in (READ, DECODE)
        workers = f"more --workers ({machine.workers} on {machine.cores} cores), " if more else ""
        return (
            f"the GPU was idle {100 * idle:.0f} % of {seconds:.0f} s, {WAITED_FOR[limiting]}; "
            f"faster: {workers}{REMEDIES[limiting]}"
        )

    def summary(self) -> dict[str, Any]:
        """Return what is recorded of it: JSON values.

        ``busy_share`` is each stage's share of the time that stages worked (together 1),
        ``busy_seconds`` that time; the rest are this class's figures and the machine's.
        """
        busy = sum(self._busy.values()) or 1.0
        return {
            "images": self._images,
            "bad": self._bad,
            "seconds": self._seconds(),
            "images_per_second": self.images_per_second(),
            "busy_seconds": dict(self._busy),
            "busy_share": {stage: seconds / busy for stage, seconds in self._busy.items()},
            "limited_by": self.limited_by(),
            "idle_share": self.idle_share(),
            "workers": self._machine.workers,
            "cores": self._machine.cores,
            "threads": self._machine.threads,
            "lanes": self._machine.lanes,
        }

    def _seconds(self) -> float:
        return self._clock() - self._start


# By the stage that limits: what a GPU waits for, and what else than more workers would help.
WAITED_FOR = {
    READ: "waiting for images to be read",
    DECODE: "waiting for images to be decoded",
    INFER: "between its batches",
    WRITE: "waiting for features to be written",
}
REMEDIES = {
    READ: "images on a faster disk",
    DECODE: "--decode fast, a smaller --size, or images that are stored smaller",
    INFER: "a larger --batch-size",
    WRITE: "--out on a faster disk, or fewer bytes with --features pooled:float16",
}
