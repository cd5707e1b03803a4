"""How mlc talks: JSON lines where there is no terminal, a bar where there is, rates and tables."""

import json
import sys

import pytest

from mlc.report import console
from mlc.report.console import LOG_SECONDS, Speed, print_table, progress_bar, shares


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "perf_counter", clock)
    return clock


def json_lines(capsys: pytest.CaptureFixture) -> list[dict]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_pace_counts_from_the_first_news_on(clock: Clock) -> None:
    pace = Speed()
    clock.now += 60  # loading a model
    assert pace(8, 108) == (0.0, 0.0)
    clock.now += 5
    assert pace(18, 108) == (2.0, 45.0)
    clock.now += 15
    assert pace(108, 108) == (5.0, 0.0)


def test_pace_does_not_count_the_time_before_the_first_unit(clock: Clock) -> None:
    pace = Speed()
    pace(0, 10)
    clock.now += 60  # loading a model
    assert pace(0, 10) == (0.0, 0.0)
    clock.now += 2
    assert pace(4, 10) == (2.0, 3.0)


def test_pace_has_nothing_to_say_while_nothing_is_done(clock: Clock) -> None:
    pace = Speed()
    assert pace(3, 10) == (0.0, 0.0)
    clock.now += 5
    assert pace(3, 10) == (0.0, 0.0)


def test_news_at_the_very_same_moment_is_no_division_by_zero(clock: Clock) -> None:
    pace = Speed()
    pace(0, 10)
    rate, left = pace(5, 10)
    assert rate >= 0
    assert left >= 0


def test_without_a_terminal_progress_is_json_lines_some_seconds_apart(
    clock: Clock, capsys: pytest.CaptureFixture
) -> None:
    with progress_bar("extract", "images") as progress:
        for done in range(5, 106, 5):
            clock.now += 1
            progress(done, 200, "3 bad")
    lines = json_lines(capsys)
    assert [line["done"] for line in lines] == [25, 50, 75, 100]
    assert lines[1] == {
        "job": "extract",
        "done": 50,
        "total": 200,
        "seconds_left": 30.0,
        "images_per_second": 5.0,
        "note": "3 bad",
    }


def test_the_start_is_told_at_once(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    with progress_bar("extract", "images") as progress:
        progress(0, 200, "loading resnet50")
        progress(1, 200)
    (line,) = json_lines(capsys)
    assert (line["done"], line["total"], line["note"]) == (0, 200, "loading resnet50")


def test_the_end_is_always_told(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    with progress_bar("train", "epochs") as progress:
        clock.now += LOG_SECONDS / 10
        progress(1, 2)
        clock.now += LOG_SECONDS / 10
        progress(2, 2)
    (line,) = json_lines(capsys)
    assert (line["job"], line["done"], line["seconds_left"]) == ("train", 2, 0.0)
    assert line["epochs_per_second"] == 2.0


def test_on_a_terminal_progress_is_a_bar_and_no_json(
    clock: Clock, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("extract", "images") as progress:
        progress(0, 10)
        clock.now += 2
        progress(5, 10, "1 bad")
    text = capsys.readouterr().err
    assert "extract" in text
    assert "5/10" in text
    assert "2.5 images/s, 0:02 left  1 bad" in text
    assert "{" not in text


def test_an_error_passes_through_the_bar(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt), progress_bar("extract", "images"):
        raise KeyboardInterrupt
    assert json_lines(capsys) == []


def test_a_table_sets_numbers_right_and_text_left(capsys: pytest.CaptureFixture) -> None:
    records = [
        {"loss": "an", "mAP": "7.25", "behind": ""},
        {"loss": "class prior", "mAP": "61.30", "behind": "-1.00"},
    ]
    print_table(records)
    header, first, second = capsys.readouterr().out.rstrip("\n").split("\n")
    assert header.split() == ["loss", "mAP", "behind"]
    assert first.startswith("an ")
    assert second.startswith("class prior")
    assert first.index("7.25") + len("7.25") == second.index("61.30") + len("61.30")
    assert second.split()[-1] == "-1.00"


def test_a_table_does_not_read_marks_in_names(capsys: pytest.CaptureFixture) -> None:
    print_table([{"class": "[bold]x[/]", "images": "1"}])
    assert "[bold]x[/]" in capsys.readouterr().out


def test_a_wide_table_keeps_every_figure(capsys: pytest.CaptureFixture) -> None:
    """Where there is no terminal nothing is cut, however long the names are."""
    print_table([{"loss": "x" * 150, "mAP": "61.30"}])
    text = capsys.readouterr().out
    assert "x" * 150 in text
    assert "61.30" in text


def test_shares_are_of_the_time_that_stages_worked() -> None:
    seconds = {"read": 1.0, "infer": 3.0}
    assert shares(seconds, ("read", "decode", "infer")) == "read 25 %, decode 0 %, infer 75 %"
    assert shares({}, ("read",)) == "read 0 %"
