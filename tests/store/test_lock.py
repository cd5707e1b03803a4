"""writer_lock(): one writer to a store, and what HDF5 itself says to a second."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_content import content, fill

from mlc.configs.errors import MlcError
from mlc.store.lock import writer_lock
from mlc.store.reader import FeatureStore
from mlc.store.writer import StoreWriter

HOLD_LOCK = """
import sys
from pathlib import Path
from mlc.store.lock import writer_lock
with writer_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""

HOLD_WRITER = """
import sys
from pathlib import Path
from mlc.store import schema
path = Path(sys.argv[1])
backend = schema.format_of(path).open(path, write=True)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def child(script: str, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def test_a_lock_that_another_process_holds_is_an_error_until_it_dies(path: Path) -> None:
    with child(HOLD_LOCK, path) as process:
        assert said(process) == "held"
        with pytest.raises(MlcError, match=r"another process is writing to it"), writer_lock(path):
            pytest.fail("two writers hold the lock")
        process.kill()
        process.wait()
    with writer_lock(path):
        assert not path.exists()


def test_locks_of_different_stores_do_not_meet(path: Path) -> None:
    other = path.with_name(f"other{path.suffix}")
    with writer_lock(path), writer_lock(other), pytest.raises(MlcError), writer_lock(path):
        pytest.fail("two writers hold the lock")


def test_workers_share_a_lock_and_keep_out_the_writer_of_all_shards(path: Path) -> None:
    with (
        writer_lock(path, shared=True),
        writer_lock(path, shared=True),
        pytest.raises(MlcError, match="is writing to it; wait"),
        writer_lock(path),
    ):
        pytest.fail("a writer of all shards beside a worker")
    with (
        writer_lock(path),
        pytest.raises(MlcError, match="writing to the whole of it, not to shards"),
        writer_lock(path, shared=True),
    ):
        pytest.fail("a worker beside a writer of all shards")


def test_a_lock_is_free_again_after_an_error(path: Path) -> None:
    with pytest.raises(KeyError), writer_lock(path):
        raise KeyError
    with writer_lock(path):
        pass


def test_an_hdf5_file_that_another_process_writes_is_said_to_be_so(tmp_path: Path) -> None:
    path = fill(tmp_path / "a.h5", content())
    with child(HOLD_WRITER, path) as process:
        assert said(process) == "held"
        with pytest.raises(MlcError, match="another process has it open"):
            FeatureStore(path)
        with pytest.raises(MlcError, match="another process has it open"):
            StoreWriter.create_or_resume(path, content().layout)
