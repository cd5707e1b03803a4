"""Files that are opened once, whoever asks and however often."""

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlc.store.open_files import OpenFiles


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def write(folder: Path, count: int) -> list[Path]:
    paths = [folder / str(index) for index in range(count)]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


@pytest.mark.parametrize("most", [0, 3, 100])
def test_any_number_of_files_is_read_and_closed(tmp_path: Path, most: int) -> None:
    paths, before = write(tmp_path, 8), descriptors()

    def read(path: Path) -> bytes:
        with files.opened(path) as descriptor:
            return os.pread(descriptor, 10, 0)

    with OpenFiles(most) as files, ThreadPoolExecutor(4) as pool:
        asked = paths * 50
        assert list(pool.map(read, asked)) == [path.name.encode() for path in asked]
        kept = descriptors() - before
    assert kept <= min(most, len(paths)) + 4  # the pool's threads may be one beyond each
    assert descriptors() == before


def test_a_file_is_opened_once(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1)
    with OpenFiles() as files:
        with files.opened(path) as first:
            pass
        path.unlink()
        with files.opened(path) as second:
            assert second == first
            assert os.pread(second, 10, 0) == b"0"


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with OpenFiles() as files, pytest.raises(FileNotFoundError), files.opened(tmp_path / "no"):
        pass


def test_no_more_is_kept_than_a_quarter_of_what_a_process_may_open(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        before = descriptors()
        with OpenFiles() as files:
            for path in write(tmp_path, 300):
                with files.opened(path) as descriptor:
                    assert os.pread(descriptor, 10, 0) == path.name.encode()
            assert descriptors() - before == 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
