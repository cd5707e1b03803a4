"""What is told of an extraction while it runs: its rate, what limits it, what a GPU waits for."""

import json

import pytest

from mlc.extract.pace import LEAST_SECONDS, MOST_IDLE, STAGES, WINDOW_SECONDS, Machine, Pace

CPU = Machine(workers=2, cores=2, threads=2)
GPU = Machine(workers=4, cores=16, threads=16, on_gpu=True)


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(
    clock: Clock, machine: Machine, wall: float = 20.0, total: int = 100, **busy: float
) -> Pace:
    """An extraction of which one batch of 10 images came after ``wall`` seconds."""
    pace = Pace(total, machine, clock)
    clock.now += wall
    pace.add(10, {stage: busy.get(stage, 0.0) for stage in STAGES})
    return pace


# --- rates ---------------------------------------------------------------------------------------


def test_the_rate_now_is_that_of_the_last_seconds(clock: Clock) -> None:
    pace = Pace(1000, CPU, clock)
    for _ in range(30):  # 10 a second
        clock.now += 1
        pace.add(10, {})
    for _ in range(30):  # then 2 a second
        clock.now += 1
        pace.add(2, {})
    assert pace.images_per_second() == pytest.approx(6.0)
    assert pace.images_per_second_now() == pytest.approx(2.0)
    assert pace.seconds_left() == pytest.approx((1000 - 360) / 6.0)
    assert len(pace._counts) <= WINDOW_SECONDS + 2  # not one for each batch there was


def test_the_rate_now_knows_of_a_change_within_the_window(clock: Clock) -> None:
    pace = Pace(1000, CPU, clock)
    for images in [10] * 20 + [0] * 5:
        clock.now += 1
        pace.add(images, {})
    assert pace.images_per_second_now() == pytest.approx(5.0)


def test_a_batch_that_takes_longer_than_the_window_has_a_rate(clock: Clock) -> None:
    pace = Pace(1000, CPU, clock)
    for _ in range(3):
        clock.now += 5 * WINDOW_SECONDS
        pace.add(100, {})
    assert pace.images_per_second_now() == pytest.approx(100 / (5 * WINDOW_SECONDS))


def test_the_rate_now_falls_while_nothing_comes(clock: Clock) -> None:
    pace = run(clock, CPU, wall=1.0)
    assert pace.images_per_second_now() == pytest.approx(10.0)
    clock.now += 99
    assert pace.images_per_second_now() == pytest.approx(0.1)
    assert pace.images_per_second() == pytest.approx(0.1)


def test_before_the_first_batch_there_is_nothing_to_say(clock: Clock) -> None:
    pace = Pace(10, GPU, clock)
    assert (pace.images_per_second(), pace.images_per_second_now()) == (0.0, 0.0)
    assert (pace.seconds_left(), pace.limited_by(), pace.warning()) == (None, None, None)
    json.dumps(pace.summary())
    clock.now += 2 * LEAST_SECONDS
    assert pace.warning() is None


def test_nothing_is_left_when_more_came_than_were_foreseen(clock: Clock) -> None:
    assert run(clock, CPU, total=5).seconds_left() == 0.0


# --- what limits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "busy", "want"),
    [
        # A GPU: four workers could have been busy for 80 s, the others for 20.
        (GPU, {"decode": 76, "infer": 8}, "decode"),
        (GPU, {"decode": 30, "infer": 19}, "infer"),
        (GPU, {"read": 60, "decode": 19, "infer": 12}, "read"),
        (GPU, {"read": 40, "decode": 20, "infer": 16}, "infer"),  # sums do not say it
        (GPU, {"decode": 30, "infer": 6, "write": 13}, "write"),
        (GPU, {"read": 39, "decode": 40, "infer": 18}, "decode"),  # shared workers are never idle
        # A CPU of two cores, two workers and two threads: the dearer of the two that share them.
        (CPU, {"decode": 30, "infer": 10}, "decode"),
        (CPU, {"decode": 16, "infer": 19}, "infer"),
        (CPU, {"decode": 25, "infer": 16}, "infer"),  # 16 s of two threads are 32 of cores
        (CPU, {"read": 38, "decode": 2, "infer": 3}, "read"),  # the cores have nothing to do
        (CPU, {"decode": 5, "infer": 4, "write": 15}, "write"),
        # One worker on eight cores is busy all the time, though the cores are not.
        (Machine(workers=1, cores=8, threads=8), {"decode": 19.9, "infer": 5}, "decode"),
        # So is the backbone on one thread.
        (Machine(workers=8, cores=8, threads=1), {"decode": 10, "infer": 19.9}, "infer"),
        # Two lanes of one thread each are busy half of the time that they sum up to.
        (Machine(workers=2, cores=4, threads=1, lanes=2), {"decode": 24, "infer": 22}, "decode"),
        (Machine(workers=2, cores=2, threads=1, lanes=2), {"decode": 10, "infer": 30}, "infer"),
        # Sixteen workers on two cores: all wait for a core, and the cores' time decides.
        (Machine(workers=16, cores=2, threads=2), {"decode": 130, "infer": 19}, "decode"),
    ],
)
def test_what_is_never_idle_limits(
    clock: Clock, machine: Machine, busy: dict[str, float], want: str
) -> None:
    assert run(clock, machine, **busy).limited_by() == want


def test_busy_times_of_all_batches_count(clock: Clock) -> None:
    pace = run(clock, GPU, infer=1.0)
    assert pace.limited_by() == "infer"
    pace.add(10, {"decode": 3.0})
    assert pace.limited_by() == "infer"
    pace.add(10, {"decode": 3.0})
    assert pace.limited_by() == "decode"


# --- an idle GPU ---------------------------------------------------------------------------------


def test_a_gpu_is_idle_while_it_has_no_batch(clock: Clock) -> None:
    assert run(clock, GPU, infer=15).idle_share() == pytest.approx(0.25)
    assert run(clock, GPU, infer=25).idle_share() == 0.0  # batches that overlap
    assert run(clock, CPU, infer=15).idle_share() is None


@pytest.mark.parametrize(
    ("busy", "parts"),
    [
        ({"decode": 70, "infer": 8}, ["decoded", "more --workers (4 on 16", "--decode fast"]),
        ({"read": 70, "infer": 8}, ["to be read", "more --workers (4 on 16", "faster disk"]),
        ({"infer": 3, "write": 15}, ["to be written", "--out on a faster disk"]),
        ({"decode": 30, "infer": 10}, ["between its batches", "--batch-size"]),
    ],
)
def test_a_gpu_that_waits_is_a_warning_with_a_remedy(
    clock: Clock, busy: dict[str, float], parts: list[str]
) -> None:
    warning = run(clock, GPU, **busy).warning()
    assert warning is not None
    assert warning.startswith(f"the GPU was idle {100 - 5 * busy['infer']:.0f} % of 20 s, ")
    for part in parts:
        assert part in warning
    assert ("--workers" in warning) == ("more --workers (4 on 16" in parts)


def test_more_workers_than_cores_are_no_remedy(clock: Clock) -> None:
    warning = run(clock, Machine(16, 16, 16, on_gpu=True), decode=300, infer=8).warning()
    assert warning is not None
    assert "--workers" not in warning
    assert "--decode fast" in warning


def test_a_warning_is_for_a_gpu_that_waits_and_for_more_than_a_moment(clock: Clock) -> None:
    busy, idle = 20 * (1 - MOST_IDLE + 0.01), 20 * (1 - MOST_IDLE - 0.01)
    assert run(clock, GPU, infer=busy).warning() is None
    assert run(clock, GPU, infer=idle).warning() is not None
    assert run(clock, CPU, infer=idle).warning() is None
    assert run(clock, GPU, wall=LEAST_SECONDS - 1, decode=30, infer=1).warning() is None
    assert run(clock, GPU, wall=LEAST_SECONDS, decode=30, infer=1).warning() is not None


# --- in words and for the store ------------------------------------------------------------------


def test_a_line_is_short(clock: Clock) -> None:
    assert Pace(5, GPU, clock).line() == "0.0/s now"
    pace = run(clock, GPU, wall=10.0, decode=38, infer=6.6)
    assert pace.line() == "1.0/s now, decode limits, GPU 34 % idle"
    pace.add(4120, {}, bad=2)
    assert pace.line() == "413/s now, decode limits, GPU 34 % idle, 2 bad"
    assert run(clock, CPU, decode=30).line() == "0.5/s now, decode limits"


def test_a_summary_is_json_and_says_it_all(clock: Clock) -> None:
    pace = run(clock, GPU, read=2, decode=76, infer=12)
    pace.add(2, {"write": 10}, bad=1)
    clock.now += 4  # until the last features are written
    summary = pace.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary == {
        "images": 12,
        "bad": 1,
        "seconds": 24.0,
        "images_per_second": 0.5,
        "busy_seconds": {"read": 2.0, "decode": 76.0, "infer": 12.0, "write": 10.0},
        "busy_share": {"read": 0.02, "decode": 0.76, "infer": 0.12, "write": 0.1},
        "limited_by": "decode",
        "idle_share": 0.5,
        "workers": 4,
        "cores": 16,
        "threads": 16,
        "lanes": 1,
    }
