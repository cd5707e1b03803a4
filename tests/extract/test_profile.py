"""A trace of some batches: which they are, what is in it, and that a job does not stop at it."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mlc.configs.errors import MlcError
from mlc.extract import profile as module
from mlc.extract.profile import profile, span


def work(batch: int) -> None:
    with span(f"infer {batch}"):
        torch.ones(8, 8) @ torch.ones(8, 8)


def record(path: Path, come: int, batches: int = 3) -> str:
    """Profile a job of some batches; return what was told."""
    told: list[str] = []
    with profile(path, told.append, batches) as step:
        for batch in range(come):
            work(batch)
            step()
    (sentence,) = told
    return sentence


def spans(path: Path) -> list[str]:
    """Names of what was recorded, in the order of time."""
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    events = [each for each in json.loads(text)["traceEvents"] if each.get("ph") == "X"]
    return [each["name"] for each in sorted(events, key=lambda each: each["ts"])]


def batches_in(path: Path) -> list[str]:
    return [name for name in spans(path) if name.startswith("infer")]


@pytest.mark.parametrize("name", ["trace.json", "new/folder/trace.json.gz", "a.b.json"])
def test_a_trace_is_of_the_batches_after_the_first(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    told = record(path, come=6)
    assert batches_in(path) == ["infer 1", "infer 2", "infer 3"]
    assert "aten::mm" in spans(path)
    assert str(path) in told
    assert "batches traced: 3;" in told
    assert "https://ui.perfetto.dev" in told
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # nothing half written


def test_nothing_is_recorded_after_the_last_of_them(tmp_path: Path) -> None:
    told: list[str] = []
    with profile(tmp_path / "trace.json", told.append, 2) as step:
        for batch in range(3):
            assert not told
            work(batch)
            step()
        assert len(told) == 1
        assert not torch.autograd.profiler._is_profiler_enabled
        written = (tmp_path / "trace.json").read_bytes()
        work(3)
        step()
    assert len(told) == 1
    assert (tmp_path / "trace.json").read_bytes() == written


def test_fewer_batches_are_a_shorter_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert "batches traced: 1;" in record(path, come=2)
    assert batches_in(path) == ["infer 1"]


@pytest.mark.parametrize("come", [0, 1])
def test_without_a_batch_after_the_first_there_is_no_trace(tmp_path: Path, come: int) -> None:
    assert "no batch came after the first" in record(tmp_path / "trace.json", come)
    assert list(tmp_path.iterdir()) == []
    assert not torch.autograd.profiler._is_profiler_enabled


def test_a_block_that_raises_leaves_a_trace_and_its_error(tmp_path: Path) -> None:
    path, told = tmp_path / "trace.json.gz", []

    def interrupted() -> None:
        with profile(path, told.append) as step:
            for batch in range(3):
                work(batch)
                step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert batches_in(path) == ["infer 1", "infer 2"]
    assert "batches traced: 2;" in told[0]
    assert record(tmp_path / "next.json", come=3)  # torch's profiler is free again


def test_threads_that_were_there_before_are_recorded(tmp_path: Path) -> None:
    """As those that decode are: they start with the first batch, the profiler after it."""
    pytest.importorskip("torch", minversion="2.7")
    with (
        ThreadPoolExecutor(1) as pool,
        profile(tmp_path / "trace.json", lambda _: None, 1) as step,
    ):
        for batch in range(2):
            pool.submit(work, batch).result()
            step()
    assert batches_in(tmp_path / "trace.json") == ["infer 1"]


def test_a_span_is_nothing_while_no_trace_is_recorded(tmp_path: Path) -> None:
    idle = span("infer")
    assert not isinstance(idle, torch.profiler.record_function)
    with idle, idle:  # of several threads at once
        pass
    with profile(tmp_path / "trace.json", lambda _: None) as step:
        assert not isinstance(span("infer"), torch.profiler.record_function)
        step()
        assert isinstance(span("infer"), torch.profiler.record_function)
    assert not isinstance(span("infer"), torch.profiler.record_function)


def test_a_span_that_is_open_when_recording_starts_or_ends_does_no_harm(tmp_path: Path) -> None:
    with profile(tmp_path / "trace.json", lambda _: None, 2) as step:
        with span("infer across the start"):
            step()
        work(1)
        step()
        with span("infer across the end"):
            step()
        work(2)
    assert "infer 1" in batches_in(tmp_path / "trace.json")
    assert "infer 2" not in batches_in(tmp_path / "trace.json")


def test_torch_does_not_talk_between_the_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Standard error is JSON lines where it is no terminal."""
    record(tmp_path / "trace.json", come=3)
    assert capfd.readouterr() == ("", "")


def test_a_trace_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("earlier")
    record(path, come=2)
    assert batches_in(path) == ["infer 1"]


@pytest.mark.parametrize("name", ["trace", "trace.txt", "trace.gz", "folder.json"])
def test_a_path_that_will_not_do_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.json").mkdir()
    with (
        pytest.raises(MlcError, match=rf"should end in \.json.*{name}|{name}: is a folder"),
        profile(tmp_path / name, pytest.fail),
    ):
        pytest.fail("the block was run")


def test_a_trace_that_cannot_be_written_does_not_stop_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.json"
    path.write_text("earlier")

    def full(*_: object) -> None:
        Path(_[1]).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.profiler.profile, "export_chrome_trace", full)
    told = record(path, come=5)
    assert "cannot be written" in told
    assert "No space left" in told
    assert path.read_text() == "earlier"
    assert [each.name for each in tmp_path.iterdir()] == ["trace.json"]
